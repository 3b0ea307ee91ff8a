"""rollback: move the champion alias back to an earlier version, if that loads and predicts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memgpt import gate, registry, tracking
from memgpt.config import MODELS, Config
from memgpt.errors import UserError
from memgpt.registry import CHAMPION, Change
from memgpt.stages.promote import WORK, deciding

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Rollback:
    model: str
    before: str
    version: str


def run(
    config: Config, model: str, *, version: str | int | None = None, actor: str | None = None, reason: str = ""
) -> Rollback:
    """Make `version` champion; by default the one that was superseded last.

    The version that was champion is tagged as rolled back; from then on the gate holds the same weights.

    Raises:
        UserError: if there is no such version, or it lacks lineage or does not load and predict; nothing changes then.
    """
    if model not in MODELS:
        raise UserError(f"{model}: no such model; one of {', '.join(MODELS)}")
    tracking.use()
    client = tracking.client()
    with deciding(model):
        registry.reconcile(client, model)
        champion = registry.aliases(client, model).get(CHAMPION)
        if champion is None:
            raise UserError(f"{registry.name(model)}: has no champion to roll back from")
        target = _target(client, model, champion, str(version) if version is not None else None)
        registry.lineage_tags(client, model, target)
        hint = f"choose another version, the champion stays {champion}"
        gate.try_out(config, model, registry.uri(model, target), WORK / model, hint)
        why = f"from version {champion}"
        registry.carry_out(
            client, Change(model, "rollback", target, champion, [why], actor or registry.actor(), reason)
        )
    return Rollback(model, champion, target)


def _target(client: "MlflowClient", model: str, champion: str, wanted: str | None) -> str:
    found = registry.versions(client, model)
    if wanted is None:
        # the tag starts with an ISO time, so the latest sorts last
        earlier = [version for version in found if "superseded" in version.tags and str(version.version) != champion]
        if not earlier:
            raise UserError(f"{registry.name(model)}: no version was champion before {champion}; name one with --to")
        return str(max(earlier, key=lambda version: version.tags["superseded"]).version)
    if wanted == champion:
        raise UserError(f"{registry.uri(model, wanted)}: is the champion already")
    if wanted not in {str(version.version) for version in found}:
        raise UserError(
            f"{registry.uri(model, wanted)}: no such version; `memgpt history {model}` shows which were champion"
        )
    return wanted
