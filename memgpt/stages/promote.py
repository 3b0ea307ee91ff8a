"""promote: register a trained model as challenger and let the gate decide whether it becomes champion."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memgpt import atomic, environment, gate, registry, tracking
from memgpt.config import MODELS, TABLES, Config, Gate
from memgpt.console import VERDICTS
from memgpt.errors import UserError
from memgpt.registry import CHAMPION, Change

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

WORK = Path(".memgpt/gate")
_ROUNDING = 0.001  # by which two computations of the same score may differ


@dataclass(frozen=True)
class Verdict:
    """A row of the table at the end of a run. value, interval and baseline are from the candidate's test report.
    version: the judged one, for "unchanged" the champion. reasons: first, what was settled for a killed run."""

    model: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    baseline: float
    champion: float | None  # the champion's score on the same rows, if the two were compared
    verdict: gate.Outcome
    version: str
    reasons: tuple[str, ...] = ()


@contextmanager
def deciding(model: str) -> Iterator[None]:
    """Lock: one decision per model at a time, in all of a user's checkouts on this machine that share the registry."""
    with tracking.locked(tracking.home() / "gate" / f"{model}.lock"):
        yield


def run(
    config: Config,
    model: str,
    *,
    replace: bool = False,
    ask: bool = False,
    actor: str | None = None,
    reason: str = "",
) -> Verdict:
    """Let the gate judge models/<model>, apply the verdict, and write it to .memgpt/verdicts/<model>.json.

    replace: promote what would be held (not comparable, or no certain gain). ask: hold what the gate would promote,
    until a person approves it (`approve.py`). actor, reason: who decides and why, stored with the decision.

    Raises:
        UserError: if the model, its report or its lineage is missing; nothing is registered then.
    """
    if model not in MODELS:
        raise UserError(f"{model}: no such model; one of {', '.join(MODELS)}")
    candidate = registry.candidate(model)
    tracking.use()
    client = tracking.client()
    with deciding(model):
        settled = registry.reconcile(client, model)
        champion = registry.aliases(client, model).get(CHAMPION)
        if champion and _same(client, candidate, champion):
            version, decision = champion, gate.Decision("unchanged", ["equal weights"])
        else:
            version = registry.register(client, candidate)
            decision = _judge(config, client, candidate, version, champion, replace)
            if ask and decision.verdict == "promote":
                why = [f"waits for approval: {decision.reasons[0]}", *decision.reasons[1:]]
                decision = dataclasses.replace(decision, verdict="hold", reasons=why)
        who = actor or registry.actor()
        registry.carry_out(
            client,
            Change(model, decision.verdict, version, champion, decision.reasons, who, reason, decision.numbers),
        )
    report = candidate.report
    verdict = Verdict(
        model=model,
        metric=report["primary"],
        value=report["value"],
        ci_low=report["ci_low"],
        ci_high=report["ci_high"],
        baseline=report["baseline"],
        champion=decision.numbers.get("champion"),
        verdict=decision.verdict,
        version=version,
        reasons=(*settled, *decision.reasons),
    )
    atomic.write_json(VERDICTS / f"{model}.json", dataclasses.asdict(verdict))
    return verdict


def _same(client: "MlflowClient", candidate: registry.Candidate, champion: str) -> bool:
    tags = registry.version_tags(client, candidate.model, champion)
    return tags.get("weights") == candidate.weights and registry.intact(candidate.model, champion)


def _judge(
    config: Config,
    client: "MlflowClient",
    candidate: registry.Candidate,
    version: str,
    champion: str | None,
    replace: bool,
) -> gate.Decision:
    """The gate's verdict on a registered version."""
    model = candidate.model
    registry.challenge(client, model, version)
    tags = registry.version_tags(client, model, version)
    if missing := registry.missing_lineage(tags):
        return gate.Decision("reject", [f"version {version} lacks lineage: {', '.join(missing)}"])
    for known in registry.versions(client, model):
        if "rolled_back" in known.tags and known.tags.get("weights") == candidate.weights and not replace:
            what = f"version {known.version} has the same weights and was rolled back ({known.tags['rolled_back']})"
            return gate.Decision("hold", [f"{what}; --replace promotes it again"])
    incomparable = _incomparable(tags, registry.version_tags(client, model, champion)) if champion else None
    with ExitStack() as stack:
        uris = [registry.uri(model, version)]
        if champion and not incomparable:
            uris.append(registry.uri(model, champion))
        share = max(1, environment.threads(config.runtime.threads) // len(uris))
        # Start the versions before importing the judge, because both take seconds.
        limit = config.promote.timeout_seconds
        new, *others = [stack.enter_context(gate.Version(uri, WORK / model, share, limit)) for uri in uris]
        old = others[0] if others else None

        from memgpt.tasks import judge

        judging = judge(model)
        rules: Gate = getattr(config.promote, model)
        rows = judging.test_rows(TABLES)
        if not rows:
            raise UserError(
                f"{TABLES}: no test rows for {model}; its source needs a test split or ingest.test_fraction"
            )
        slices = judging.slices(rows, TABLES)
        gate.check_slices(model, rules, slices)
        inputs, params = gate.as_served([row["input"] for row in rows])
        new.ask(inputs, params)
        if old:
            old.ask(inputs, params)
        champion_statistics = baseline = None
        try:
            challenger_statistics = _statistics(judging, rows, new)
        except gate.VersionError as error:
            return gate.Decision("reject", [str(error)])
        try:
            champion_statistics = _statistics(judging, rows, old) if old else None
        except gate.VersionError as error:
            incomparable, old = str(error), None
        try:
            costs = gate.cost(new, old, len(rows))
        except gate.VersionError as error:  # one of the two processes died after answering
            return gate.Decision("hold", [str(error)])
    if champion_statistics is None:
        baseline = judging.statistics(rows, judging.baseline(TABLES, rows))
    decision = gate.decide(
        rules,
        judging.score,
        challenger_statistics,
        champion=champion_statistics,
        baseline=baseline,
        slices=slices,
        resamples=config.promote.bootstrap,
        seed=config.promote.seed,
        incomparable=incomparable,
        replace=replace,
    )
    decision = dataclasses.replace(decision, numbers={**decision.numbers, **costs, "rows": len(rows)})
    return _doubt(decision, candidate)


def _doubt(decision: gate.Decision, candidate: registry.Candidate) -> gate.Decision:
    """Hold a version that the gate would promote if its test report does not fit: the model or the test rows have
    changed since, without a new evaluation. The report is shown and stored with the version."""
    said, found = candidate.report, decision.numbers.get("value")
    if found is None or decision.verdict != "promote":
        return decision
    if said["ci_low"] - _ROUNDING <= found <= said["ci_high"] + _ROUNDING:
        return decision
    why = (
        f"reports/metrics/{candidate.model}.json says {said['value']:.4f}, but the version scores {found:.4f}; run "
        f"`memgpt evaluate {candidate.model}` and promote again"
    )
    return dataclasses.replace(decision, verdict="hold", reasons=[why])


def _statistics(judging: ModuleType, rows: list[dict[str, Any]], version: gate.Version) -> "np.ndarray":
    answers = version.answer()
    try:
        return judging.statistics(rows, answers)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # its packaged code may return anything
        found = f"{type(error).__name__}: {error}"
        raise gate.VersionError(
            f"{version.uri} does not predict in the format of {judging.__name__} ({found})"
        ) from None


def _incomparable(new: dict[str, str], old: dict[str, str]) -> str | None:
    """Why the two versions' scores on one test set cannot be compared; None if they can."""
    for key, what in (("labels", "label set"), ("source_family", "source family")):
        if new[key] != old.get(key):
            return f"other {what}, {new[key]} instead of the champion's {old.get(key, 'unknown')}"
    return None
