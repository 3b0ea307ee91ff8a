"""The history of a model's champion: the records of promotions and rollbacks, for people and for scripts."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.table import Table

from memgpt import registry
from memgpt.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOVES = ("promote", "rollback")  # the verdicts that move the champion


@dataclass(frozen=True)
class Entry:
    """One decision. before: the champion's version at the time; version: the one decided on; state: done, intent (the
    process was killed; the next promotion settles it) or abandoned; why: a person's reason; reasons: the gate's."""

    when: str
    verdict: str
    who: str
    before: str | None
    version: str
    why: str
    reasons: str
    state: str
    flow_run: str | None
    numbers: dict[str, float]


def of(client: "MlflowClient", model: str, *, every: bool = False) -> list[Entry]:
    """The decisions on a model, newest first: those that moved the champion, or `every` one.

    Raises:
        UserError: if there was no decision on it.
    """
    found = registry.records(client, model)
    if not found:
        raise UserError(f"{registry.name(model)}: no decision is recorded; `memgpt promote {model}` makes the first")
    entries = []
    for run in found:
        tags = run.data.tags
        if every or (tags["verdict"] in MOVES and tags["state"] != "abandoned"):
            entries.append(
                Entry(
                    when=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
                    verdict=tags["verdict"],
                    who=tags["actor"],
                    before=None if tags["from"] == "none" else tags["from"],
                    version=tags["to"],
                    why="" if tags["reason"] == "none" else tags["reason"],
                    reasons=tags["reasons"],
                    state=tags["state"],
                    flow_run=None if tags["flow_run"] == "none" else tags["flow_run"],
                    numbers=dict(run.data.metrics),
                )
            )
    return entries


def table(entries: list[Entry]) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("when", "what", "from", "to", "who", "why", "numbers"):
        drawn.add_column(column, justify="right" if column in ("from", "to") else "left", no_wrap=column != "why")
    for entry in entries:
        what = entry.verdict if entry.state == "done" else f"{entry.verdict} ({entry.state})"
        why = "; ".join(filter(None, (entry.why, entry.reasons)))
        cells = (entry.when[:16].replace("T", " "), what, entry.before or "", entry.version, entry.who, why)
        drawn.add_row(*(cell.replace("[", r"\[") for cell in cells), _shown(entry.numbers).replace("[", r"\["))
    return drawn


def _shown(numbers: dict[str, float]) -> str:
    """The score with its interval, and the number of test rows."""
    if "value" not in numbers:
        return ""
    interval = f" [{numbers['ci_low']:.3f}, {numbers['ci_high']:.3f}]" if "ci_low" in numbers else ""
    rows = f", {numbers['rows']:.0f} rows" if "rows" in numbers else ""
    return f"{numbers['value']:.3f}{interval}{rows}"
