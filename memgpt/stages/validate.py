"""Validate: check one source's tables with its suite. Writes a report that later stages depend on, and an HTML page."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from memgpt import atomic, config, suites, validation_page
from memgpt.errors import UserError

REPORTS = Path("reports/validation")
ERRORS = Path("reports/errors")  # git-ignored; the only reports that contain the text of rows
SHOWN = 5


def run(settings: config.Config, source: str) -> dict[str, float]:
    """Run all checks, write report and page, then fail if any check failed.

    Raises:
        UserError: naming the first failed check and the page.
    """
    folder = config.TABLES / source
    manifest, read = _read(source, folder)
    frames = suites.frames(read)
    outcomes = suites.run({"schema": suites.schema_frame(source, read)}, suites.schema_checks())
    if all(outcome.success for outcome in outcomes):  # the other checks rely on the columns
        related = suites.relate(source, frames, manifest["labels"], _corpus(source))
        outcomes += suites.run(related, suites.checks(source, related, manifest["labels"], settings.validate_))
        pictures = _pictures(source, frames)
    else:
        related, pictures = {}, {}
    report = _report(source, manifest, outcomes, related)
    _write_errors(source, outcomes, frames)
    atomic.write_json(REPORTS / f"{source}.json", report)
    atomic.write_text(REPORTS / f"{source}.html", validation_page.render(report, pictures))
    if report["failed"]:
        raise UserError(_failure(source, report, outcomes, related))
    return {"checks": float(report["checks"]), "failed": 0.0}


def _read(source: str, folder: Path) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    expected = ["items", *suites.SPLITS] if source == "recommendation" else list(suites.SPLITS)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        # a corpus may come without a test split
        present = [
            name for name in expected if source != "corpus" or name != "test" or (folder / "test.parquet").exists()
        ]
        return manifest, {name: pq.read_table(folder / f"{name}.parquet") for name in present}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder}: not found; run `memgpt ingest {source}`") from None
    except (pa.ArrowInvalid, json.JSONDecodeError):
        raise UserError(f"{folder}: damaged; run `memgpt ingest {source}` again") from None


def _corpus(source: str) -> list[str] | None:
    """The corpus texts, for the sources whose held-out texts must not be among them (NER, sentiment). For others None:
    recommendation's items are known to the model by design."""
    if source not in ("ner", "sentiment"):
        return None
    path = config.TABLES / "corpus" / "train.parquet"
    if not path.exists():
        raise UserError(f"{path}: not found; run `memgpt ingest corpus`")
    return [text for text in pq.read_table(path, columns=["text"]).column("text").to_pylist() if text]


def _report(
    source: str, manifest: dict[str, Any], outcomes: list[suites.Outcome], related: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    return {
        "source": source,
        "uri": manifest["source"],
        "licence": manifest["licence"],
        "non_commercial": manifest["non_commercial"],
        "rows": manifest["rows"],
        "checks": len(outcomes),
        "failed": sum(not outcome.success for outcome in outcomes),
        "results": [_result(outcome, related) for outcome in outcomes],
    }


def _result(outcome: suites.Outcome, related: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """A check's counts and the ids of its first failing rows, also if there are few enough for the check to succeed."""
    check = outcome.check
    frame = related.get(check.table)
    named = [_name(check.table, frame, row) for row in outcome.rows[:SHOWN]]
    return {
        "table": check.table,
        "name": check.name,
        "column": check.column,
        "expectation": type(check.expectation).__name__,
        "success": outcome.success,
        "checked": outcome.checked,
        "unexpected": outcome.unexpected,
        "threshold": check.threshold,
        "rows": named,
    }


def _name(table: str, frame: pd.DataFrame | None, row: int) -> str:
    """The row's own id, or its number where the table has none or the id is missing."""
    column = "label" if table == "labels" else "id"
    if frame is None or column not in frame.columns:
        return f"row {row}"
    value = frame[column].iloc[row - 1]
    return value if isinstance(value, str) else f"row {row}"


def _write_errors(source: str, outcomes: list[suites.Outcome], frames: dict[str, pd.DataFrame]) -> None:
    """Write the first rows that fail a failed check, with their texts, for whoever must correct them."""
    path = ERRORS / f"{source}.jsonl"
    lines = []
    for outcome in outcomes:
        if not outcome.success and outcome.check.table in frames:
            frame = frames[outcome.check.table].drop(columns=suites.ROW)
            for row in outcome.rows:
                shown = {"table": outcome.check.table, "check": outcome.check.name, "row": row}
                lines.append(
                    json.dumps({**shown, "values": frame.iloc[row - 1].to_dict()}, ensure_ascii=False, default=str)
                )
    if lines:
        atomic.write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)


def _failure(
    source: str, report: dict[str, Any], outcomes: list[suites.Outcome], related: dict[str, pd.DataFrame]
) -> str:
    first, outcome = next(
        (result, outcome) for result, outcome in zip(report["results"], outcomes, strict=True) if not result["success"]
    )
    what = " ".join(part for part in (first["table"], first["column"]) if part)
    count = f" ({first['unexpected']} of {first['checked']} rows)" if first["unexpected"] else ""
    if first["name"] == "minimum rows":
        count = f" ({outcome.observed:g})"
    named = first["rows"]
    if "item_id" in (frame := related.get(first["table"], pd.DataFrame())):
        named = [f"{row} (item {frame['item_id'].iloc[i - 1]})" for row, i in zip(named, outcome.rows, strict=False)]
    rows = f", {', '.join(named)}" if named else ""
    knob, fix = suites.KNOBS.get(first["name"]), suites.FIXES.get(first["name"])
    if first["name"] == "length" and frame["characters"].iloc[outcome.rows[0] - 1] == 0:
        knob, fix = None, "it is empty: fill it in, or take the row out"
    if first["name"] == "minimum rows" and source == "recommendation" and first["table"] != "items":
        fix = "a reader of three items or more gives one to validation and one to test"
    allowed = f"; {knob} is {first['threshold']:g}" if knob else ""
    pages = [
        f"{REPORTS / source}.html",
        *([f"{ERRORS / source}.jsonl"] if (ERRORS / f"{source}.jsonl").exists() else []),
    ]
    return (
        f"{source}: {report['failed']} of {report['checks']} checks failed, first {first['name']} of "
        f"{what}{count}{rows}{allowed}{f'; {fix}' if fix else ''}; see {' and '.join(pages)}"
    )


def _pictures(source: str, frames: dict[str, pd.DataFrame]) -> dict[str, dict[str, int]]:
    """Title → bar chart: label balance and lengths per table; for recommendation, interactions per reader and item."""
    if source == "recommendation":
        every = pd.concat([frames[split] for split in suites.SPLITS])
        return {
            "Readers by number of interactions": _histogram(Counter(every["user_id"]).values()),
            "Items by number of interactions": _histogram(Counter(every["item_id"]).values()),
        }
    pictures: dict[str, dict[str, int]] = {}
    for split, frame in frames.items():
        if source != "corpus":
            what = "entities by type" if source == "ner" else "rows by label"
            pictures[f"{split}: {what}"] = dict(sorted(suites.label_counts(source, frame).items()))
    unit = "tokens" if source == "ner" else "characters"
    column = "tokens" if source == "ner" else "text"
    for split, frame in frames.items():
        pictures[f"{split}: rows by length in {unit}"] = _histogram(len(value) for value in frame[column].dropna())
    return pictures


def _histogram(values: Any) -> dict[str, int]:
    """Counts in bins of doubling width: 1, 2–3, 4–7, …; 0 has its own bin."""
    counts = Counter(int(value).bit_length() for value in values)
    bars = {}
    for bits in range(min(counts, default=0), max(counts, default=-1) + 1):
        low, high = (0, 0) if bits == 0 else (1 << (bits - 1), (1 << bits) - 1)
        bars[f"{low:,}" if low == high else f"{low:,}–{high:,}"] = counts[bits]
    return bars
