"""approve: a person's decision on a version that the gate holds. It becomes champion or is rejected."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memgpt import gate, registry, tracking
from memgpt.config import MODELS, Config
from memgpt.errors import UserError
from memgpt.registry import CHALLENGER, CHAMPION, Change
from memgpt.stages.promote import WORK, deciding

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Held:
    """A version that waits for approval. champion: the one it would replace, if any; numbers: the gate's metrics."""

    model: str
    version: str
    champion: str | None
    reasons: str
    numbers: dict[str, float] = field(default_factory=dict)


def held(client: "MlflowClient", model: str, version: str | None = None) -> Held:
    """The challenger that the gate holds. If `version` is given, it must be the challenger.

    Raises:
        UserError: if no version is held, a newer candidate has replaced it, or the champion has changed since the two
            were compared.
    """
    if model not in MODELS:
        raise UserError(f"{model}: no such model; one of {', '.join(MODELS)}")
    known = registry.aliases(client, model)
    challenger, champion = known.get(CHALLENGER), known.get(CHAMPION)
    if challenger is None or challenger == champion:
        raise UserError(f"{registry.name(model)}: no version is held; `memgpt promote {model}` judges a candidate")
    if version not in (None, challenger):
        raise UserError(f"{registry.uri(model, str(version))}: superseded, version {challenger} is the challenger now")
    for run in registry.records(client, model):
        tags = run.data.tags
        if tags["to"] == challenger and tags["state"] == "done":
            before = None if tags["from"] == "none" else tags["from"]
            if tags["verdict"] != "hold":
                break
            if before != champion:
                raise UserError(
                    f"{registry.uri(model, challenger)}: was compared with champion {before or 'none'}, and it is "
                    f"{champion or 'none'} now; `memgpt promote {model}` judges it anew"
                )
            return Held(model, challenger, champion, tags["reasons"], dict(run.data.metrics))
    raise UserError(f"{registry.uri(model, challenger)}: is not held; `memgpt promote {model}` judges it")


def run(
    config: Config,
    model: str,
    *,
    approve: bool,
    version: str | None = None,
    actor: str | None = None,
    reason: str = "",
) -> Held:
    """Carry out the decision. A version is approved only if it loads and predicts.

    Raises:
        UserError: if the version is not the held one (see `held`), or does not load and predict; nothing changes then.
    """
    tracking.use()
    client = tracking.client()
    with deciding(model):
        registry.reconcile(client, model)
        waiting = held(client, model, version)
        if approve:
            hint = "it stays held, and the champion is unchanged"
            gate.try_out(config, model, registry.uri(model, waiting.version), WORK / model, hint)
        who = actor or registry.actor()
        word = "approved" if approve else "rejected"
        registry.carry_out(
            client,
            Change(
                model,
                "promote" if approve else "reject",
                waiting.version,
                waiting.champion,
                [f"{word} by {who}", f"held because: {waiting.reasons}"],
                who,
                reason,
                waiting.numbers,
            ),
        )
    return waiting
