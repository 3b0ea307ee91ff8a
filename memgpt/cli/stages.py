"""One command per stage; those that train or evaluate run inside an MLflow run."""

import os
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memgpt import environment
from memgpt.cli.base import ModelName, SourceName, TaskName, compute_with, load_config, show

if TYPE_CHECKING:
    from memgpt.tracking import Run

PANEL = "Stages"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def snapshot(
    diff: Annotated[bool, typer.Option("--diff", help="Only show what has been added, changed or removed.")] = False,
) -> None:
    """Record the present content of every source, with digests, in data/sources.lock.json.

    Ingest fetches exactly that content: new data means a changed lock file.
    Example: [bold]memgpt snapshot[/], [bold]memgpt snapshot --diff[/]
    """
    if diff:
        from memgpt.stages import snapshot as stage

        show(stage.difference(load_config()) or ["nothing has changed since the snapshot"])
        return
    _stage("snapshot")


@app.command(rich_help_panel=PANEL)
def ingest(source: SourceName) -> None:
    """Fetch the locked content of a source and write its tables to data/tables.

    Example: [bold]memgpt ingest ner[/]
    """
    _stage("ingest", source)


@app.command(rich_help_panel=PANEL)
def validate(source: SourceName) -> None:
    """Check a source's tables; reports are in reports/validation, as JSON and as an HTML page.

    Example: [bold]memgpt validate sentiment[/]
    """
    _stage("validate", source)


@app.command(rich_help_panel=PANEL)
def tokenize() -> None:
    """Train the tokenizer and write the corpus as token ids, without the tasks' held-out texts.

    Example: [bold]memgpt tokenize[/]
    """
    _stage("tokenize", torch=True)


@app.command(rich_help_panel=PANEL)
def pretrain() -> None:
    """Train the core to predict the next token of the corpus: models/base.

    A killed run resumes from its last checkpoint. Example: [bold]memgpt pretrain[/]
    """
    _tracked("pretrain", log=True)


@app.command(rich_help_panel=PANEL)
def multitask() -> None:
    """Train the three tasks jointly on one trunk: models/multitask.

    Example: [bold]memgpt multitask[/]
    """
    _tracked("multitask", log=True)


@app.command(rich_help_panel=PANEL)
def finetune(task: TaskName) -> None:
    """Train a task's head on the shared core: models/TASK.

    Example: [bold]memgpt finetune ner[/]
    """
    _tracked("finetune", task, log=True)


@app.command(rich_help_panel=PANEL)
def evaluate(model: ModelName) -> None:
    """Evaluate a model and a simple baseline on the test split: reports/metrics and reports/plots.

    Example: [bold]memgpt evaluate base[/]
    """
    _tracked("evaluate", model)


def _stage(verb: str, item: str | None = None, *, torch: bool = False, **extra: Any) -> dict[str, float]:
    """Run one stage with its share of the cores; print its duration and main numbers, and return its metrics."""
    config = load_config()
    if torch:
        compute_with(config)
    began = time.monotonic()
    metrics = import_module(f"memgpt.stages.{verb}").run(config, *([item] if item else []), **extra)
    if "LOCAL_RANK" in os.environ:
        from memgpt import distributed

        distributed.leave()
    judged = [name for name in ("value", "ci_low", "ci_high", "baseline", "before") if name in metrics]
    numbers = ", ".join(f"{name} {metrics[name]:.6g}" for name in judged or metrics)
    if metrics:  # under torchrun only the first process has them
        print(f"{verb}{f' {item}' if item else ''}: done in {time.monotonic() - began:.1f} s; {numbers}", flush=True)
    return metrics


def _tracked(verb: str, item: str | None = None, *, log: bool = False) -> None:
    """Run a stage inside an MLflow run. Tracking only reads what the stage reports and never changes its output.

    log: whether the stage trains; it then occupies a slot (`memgpt.slots`).
    """
    from memgpt import slots, tracking
    from memgpt.config import TASKS

    if log and environment.rank():
        _stage(verb, item, torch=True)
        return
    config = load_config()
    params = getattr(config, verb).model_dump()
    named = {verb: {item: params[item]} if verb == "finetune" else params}  # as params.yaml names them
    reads = {"pretrain": ["corpus"], "multitask": TASKS}.get(verb) or ["corpus" if item == "base" else str(item)]
    slot = slots.slot(f"{verb} {item or ''}".strip(), config.runtime.slots) if log else nullcontext()
    made = False
    try:
        with slot, tracking.stage_run(verb, item, named) as run, run.machine() if log else nullcontext():
            run.inputs(reads, "training" if log else "evaluation")
            curve = _Curve(run)
            metrics = _stage(verb, item, torch=True, **({"log": curve} if log else {}))
            made = True
            tracking.patiently(curve.flush)
            run.metrics(metrics)
    except tracking.Unreachable as error:
        if not made:
            raise
        print(f"warning: what {verb} made is kept, its metrics are not in MLflow: {error}", file=sys.stderr)


class _Curve:
    """Collects a training curve and sends it in batches, since a request costs 20 ms, even with SQLite."""

    SECONDS = 10.0

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.points: list[dict[str, float]] = []
        self.sent = time.monotonic()

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        from memgpt import tracking

        self.points.append({**metrics, "step": step})
        if time.monotonic() - self.sent > self.SECONDS:
            try:
                self.flush()
            except Exception as error:  # training continues without a server; the points are kept for later
                if tracking.unreachable(error) is None:
                    raise
                self.sent = time.monotonic()

    def flush(self) -> None:
        if self.points:
            self.run.curve(self.points)
        self.points, self.sent = [], time.monotonic()
