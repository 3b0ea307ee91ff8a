"""monitor: score the texts that have arrived; emit surges of negative texts and drift as events, which trigger alerts.

`memgpt monitor` shows the same without events. What was reported is stored only after the events are sent, so that a
run that was interrupted reports it again.
"""

import base64
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, State

from flows import in_one_line, workspace
from flows.score import progress
from memgpt import config, environment, monitoring
from memgpt.monitoring import Report

RETRAIN = "retrain/retrain"  # the deployment
_PICTURES = 8  # in the artifact; all are in the folder


@flow(name="monitor")
@in_one_line
def monitor(uri: str | None = None, folder: str = str(monitoring.FOLDER)) -> State[Any]:
    """Score the texts that arrived since the last run; report surges of negative texts by topic, and drift.

    Args:
        uri: A file, glob or folder, or s3://bucket/prefix; if empty, monitor.uri of params.yaml.
        folder: Where scores, pictures and a record of what was reported are kept.
    """
    environment.prepare()
    place = Path(workspace.lasting("folder", folder))
    settings = config.load()
    report = monitoring.run(settings, place, uri=uri, progress=progress("monitor-progress", "new texts scored"))
    create_markdown_artifact(_page(report, place), key="monitor", description=report.summary)
    _tell(report)
    monitoring.announce(report, place)
    told = [report.summary, *_retrain(settings, report, place)]
    name = "Surge" if report.surges else "Drift" if report.drifts else "Completed"
    return Completed(name=name, message="; ".join(told))


def _tell(report: Report) -> None:
    """Emit one event per topic and one for drift, because alerts are limited to one a minute per resource."""
    for topic, surges in groupby(sorted(report.surges, key=lambda surge: surge.topic), lambda surge: surge.topic):
        found = list(surges)
        emit_event(
            "memgpt.monitor.surge",
            {"prefect.resource.id": f"memgpt.topic.{topic}", "prefect.resource.name": topic},
            payload={"summary": "; ".join(one.summary for one in found), "surges": [vars(one) for one in found]},
        )
    if report.drifts:
        emit_event(
            "memgpt.monitor.drift",
            {"prefect.resource.id": "memgpt.data.sentiment", "prefect.resource.name": report.source},
            payload={
                "summary": "; ".join(one.summary for one in report.drifts),
                "drifts": [vars(one) for one in report.drifts],
            },
        )


def _retrain(settings: config.Config, report: Report, place: Path) -> list[str]:
    """If a retraining is due, start one whose promotions need approval; returns what was done, in words."""
    last, now = monitoring.last_retraining(report, place), datetime.now(UTC)
    if not monitoring.retraining_is_due(settings.monitor, report, last, now):
        return []
    try:
        # The idempotency key allows one start after each retraining; before the first, one a day per folder and source.
        since = last.isoformat() if last else now.date().isoformat()
        key = f"memgpt-monitor-{report.source}-{place.resolve()}-{since}"
        run = run_deployment(RETRAIN, parameters={"approval": "manual"}, timeout=0, idempotency_key=key)
    except ObjectNotFound:
        return [f"no retraining: {RETRAIN} is not deployed"]
    monitoring.note_retraining(report, now, place)
    return [f"started {RETRAIN} ({run.name})"]


def _page(report: Report, place: Path) -> str:
    """Markdown: what is unusual, then the topics' latest day and trend plots, with surging and large topics first."""
    unusual = {surge.topic for surge in report.surges}
    rows = sorted(report.trends, key=lambda row: (row["topic"] not in unusual, -int(row["texts"])))
    lines = [f"# {report.day or 'No texts yet'}", "", report.summary]
    lines += [f"- {drift.summary}" for drift in report.drifting]
    lines += ["", "| topic | texts | negative | expected | at most |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', ' ') for cell in row.values())} |" for row in rows]
    for row in rows[:_PICTURES]:
        data = base64.b64encode(monitoring.picture(place, row["topic"]).read_bytes()).decode()
        lines += ["", f"![{row['topic']}](data:image/png;base64,{data})"]
    return "\n".join(lines)
