"""The command line: one command per stage, the flow, the registry, and a look at what came out.

Everything heavy is imported by the command that needs it, so that `memgpt --help` answers at once.
"""

import dataclasses
import errno
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memgpt import environment
from memgpt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow import MlflowClient

    from memgpt.config import Config
    from memgpt.tracking import Run

Source = Literal["corpus", "ner", "sentiment", "recommendation"]
Task = Literal["ner", "sentiment", "recommendation"]
Model = Literal["base", "ner", "sentiment", "recommendation"]

SourceName = Annotated[Source, typer.Argument(help="Which of the four sources.")]
TaskName = Annotated[Task, typer.Argument(help="Which of the three tasks.")]
ModelName = Annotated[Model, typer.Argument(help="The core, or one of the three tasks.")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="ner, its champion; ner@champion; ner/3.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Reason = Annotated[str, typer.Option(help="Why, in your words: kept in the record of the decision.")]

STAGES, FLOWS, MODELS, REGISTRY, LOOK, UPKEEP = "Stages", "Flows", "Models", "Registry", "Look", "Upkeep"

app = typer.Typer(
    help="MemGPT, the memory-augmented GPT for language tasks, and the pipeline that keeps it fresh. "
    "Run it in the root of the checkout; params.yaml holds every setting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit status 1; a stack trace is for our bugs."""
    environment.prepare()
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__name__ == "MlflowException":
            from memgpt import tracking

            if gone := tracking.away(error):
                sys.exit(f"error: {gone}")
        if not _disk_is_full(error):
            raise
        where = getattr(error, "filename", None) or Path.cwd()
        sys.exit(f"error: {where}: the disk is full; free some space and run the command again")


def _disk_is_full(error: Exception) -> bool:
    """Told by the system, or in words by a library that has no error of its own for it (safetensors, SQLite)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "database or disk is full"))


# --- stages -------------------------------------------------------------------


@app.command(rich_help_panel=STAGES)
def snapshot(
    diff: Annotated[bool, typer.Option("--diff", help="Only show what has been added, changed or removed.")] = False,
) -> None:
    """Write down what every source holds now, with digests, in data/sources.lock.json.

    Ingest fetches exactly that: new data means a changed lock.
    Example: [bold]memgpt snapshot[/], [bold]memgpt snapshot --diff[/]
    """
    if diff:
        from memgpt.stages import snapshot as stage

        _show(stage.difference(_config()) or ["nothing has changed since the snapshot"])
        return
    _stage("snapshot")


@app.command(rich_help_panel=STAGES)
def ingest(source: SourceName) -> None:
    """Fetch the locked content of a source and write its tables to data/tables.

    Example: [bold]memgpt ingest ner[/]
    """
    _stage("ingest", source)


@app.command(rich_help_panel=STAGES)
def validate(source: SourceName) -> None:
    """Check a source's tables; report in reports/validation, as JSON and as a page to read.

    Example: [bold]memgpt validate sentiment[/]
    """
    _stage("validate", source)


@app.command(rich_help_panel=STAGES)
def tokenize() -> None:
    """Train the tokenizer and write the corpus as token ids, less the tasks' held-out texts.

    Example: [bold]memgpt tokenize[/]
    """
    _stage("tokenize", torch=True)


@app.command(rich_help_panel=STAGES)
def pretrain() -> None:
    """Teach the core to predict the next token of the corpus: models/base.

    Killed, it continues where it was. Example: [bold]memgpt pretrain[/]
    """
    _tracked("pretrain", log=True)


@app.command(rich_help_panel=STAGES)
def multitask() -> None:
    """Train the three tasks jointly on one trunk: models/multitask.

    Example: [bold]memgpt multitask[/]
    """
    _tracked("multitask", log=True)


@app.command(rich_help_panel=STAGES)
def finetune(task: TaskName) -> None:
    """Train a task's head on the shared core: models/TASK.

    Example: [bold]memgpt finetune ner[/]
    """
    _tracked("finetune", task, log=True)


@app.command(rich_help_panel=STAGES)
def evaluate(model: ModelName) -> None:
    """Measure a model on its test split, beside a simple baseline: reports/metrics and reports/plots.

    Example: [bold]memgpt evaluate base[/]
    """
    _tracked("evaluate", model)


def _stage(verb: str, item: str | None = None, *, torch: bool = False, **extra: Any) -> dict[str, float]:
    """Run one stage of params.yaml on its share of the cores and say how it went."""
    config = _config()
    if torch:
        _compute_with(config)
    began = time.monotonic()
    metrics = import_module(f"memgpt.stages.{verb}").run(config, *([item] if item else []), **extra)
    if "LOCAL_RANK" in os.environ:
        from memgpt import distributed

        distributed.leave()
    judged = [name for name in ("value", "ci_low", "ci_high", "baseline", "before") if name in metrics]
    numbers = ", ".join(f"{name} {metrics[name]:.6g}" for name in judged or metrics)
    if metrics:  # those of several processes that only helped have none
        print(f"{verb}{f' {item}' if item else ''}: done in {time.monotonic() - began:.1f} s; {numbers}", flush=True)
    return metrics


def _tracked(verb: str, item: str | None = None, *, log: bool = False) -> None:
    """A stage inside an MLflow run. Tracking reads what the stage says and never changes its bytes.

    log: it trains, which takes a slot.
    """
    from memgpt import slots, tracking
    from memgpt.config import TASKS

    if log and environment.rank():
        _stage(verb, item, torch=True)
        return
    config = _config()
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
    except tracking.Away as error:
        if not made:
            raise
        print(f"warning: what {verb} made is kept, its metrics are not in MLflow: {error}", file=sys.stderr)


class _Curve:
    """Collects a training curve and sends it now and then: a request costs 20 ms, on SQLite too."""

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
            except Exception as error:  # training goes on without a server; the points are kept for later
                if tracking.away(error) is None:
                    raise
                self.sent = time.monotonic()

    def flush(self) -> None:
        if self.points:
            self.run.curve(self.points)
        self.points, self.sent = [], time.monotonic()


def _client() -> "MlflowClient":
    """Of the configured registry."""
    from memgpt import tracking

    tracking.use()
    return tracking.client()


def _show(told: Any) -> None:
    """Print lines, a table that a narrow terminal wraps, or anything else as JSON."""
    if isinstance(told, list) and all(isinstance(line, str) for line in told):
        print("\n".join(told))
    elif hasattr(told, "__rich_console__"):
        from rich.console import Console

        console = Console()
        Console(width=max(100, console.width)).print(told, crop=False)
    else:
        import json

        print(json.dumps(told, ensure_ascii=False, indent=2))


def _config() -> "Config":
    from memgpt import config

    return config.load()


def _compute_with(config: "Config") -> None:
    """Set the threads before torch is imported, which makes its pools then; OMP_NUM_THREADS from outside wins."""
    threads = str(environment.threads(config.runtime.threads))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


# --- flows --------------------------------------------------------------------


@app.command(rich_help_panel=FLOWS)
def retrain(
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change params.yaml first, comments kept; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Run every stage, unchanged ones too.")] = False,
    replace: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Let this model replace a champion it cannot be compared with."),
    ] = None,
    ask: Annotated[bool, typer.Option(help="Hold what the gate would promote, until `memgpt approve`.")] = False,
) -> None:
    """Everything: snapshot, the stages that changed, and promotion. Watch it in the Prefect UI.

    Example: [bold]memgpt retrain --set finetune.ner.epochs=2[/]
    """
    from memgpt import config

    if assignments:
        _edit(assignments)
    config.load()  # a broken file is told in one line, before anything starts
    for model in replace or []:
        if model not in config.MODELS:
            raise UserError(f"--replace {model}: no such model; one of {', '.join(config.MODELS)}")
    if not Path("flows/retrain.py").is_file():
        raise UserError("flows/retrain.py: not found; run the command in the root of the checkout")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the flow speaks for itself
    flags = [f"--replace={model}" for model in replace or []]
    flags += [*(["--force"] if force else []), *(["--ask"] if ask else [])]
    sys.stdout.flush()
    # The flow takes this process over, so that signals, terminal and exit status are its own.
    os.execv(sys.executable, [sys.executable, "-m", "flows.retrain", *flags])


def _edit(assignments: list[str]) -> None:
    """Write the assignments to params.yaml and print what changed."""
    import difflib

    from memgpt import config

    before = config.PARAMS.read_text(encoding="utf-8") if config.PARAMS.exists() else ""
    config.write(config.override(config.read(), assignments))
    after = config.PARAMS.read_text(encoding="utf-8")
    for line in list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]:
        if not line.startswith("@@"):
            print(f"params.yaml {line[0]} {line[1:].strip()}")


# --- models -------------------------------------------------------------------


@app.command(rich_help_panel=MODELS)
def convert(
    source: Annotated[str, typer.Argument(help="A directory or hub id: Llama, Mistral, Qwen2, Qwen3, SmolLM, GPT-2.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it: a new directory.")],
    memory_layers: Annotated[
        list[int] | None,
        typer.Option("--memory-layer", metavar="N", help="A block with a memory; may be repeated. Default: 0 and 2."),
    ] = None,
    memory_rows: Annotated[
        int | None, typer.Option(help="Rows per hash head. Default: by the model's size.", min=1)
    ] = None,
    memory_dim: Annotated[int | None, typer.Option(help="Width of a row. Default: by the model's size.", min=1)] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights. Default: the source's.")
    ] = None,
) -> None:
    """Graft an empty memory onto an existing model: the same answers at first, then more to learn with.

    Set pretrain.init to DIR to go on from it. Example: [bold]memgpt convert HuggingFaceTB/SmolLM2-135M models/smollm[/]
    """
    if directory.exists():
        raise UserError(f"{directory}: is there already; name a new directory")
    os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads(None)))
    import torch

    from memgpt import atomic, lineage
    from memgpt.model.convert import convert as graft

    began = time.monotonic()
    torch.manual_seed(0)  # of what is new and does not start at zero
    print(f"convert {source}: reading, mapping and comparing its logits", flush=True)
    with atomic.replacing(directory) as aside:
        try:
            model = graft(
                source,
                aside,
                memory_layers=memory_layers,
                memory_rows=memory_rows,
                memory_dim=memory_dim,
                dtype=getattr(torch, dtype) if dtype else None,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        parent = Path(source) if Path(source).is_dir() else None
        lineage.write(aside, "convert", [], {"source": source, "dtype": dtype}, parent, 0, {})
    stored, shape = model.num_parameters(), model.config
    tables = sum(part.numel() for name, part in model.named_parameters() if name.endswith("memory.table.weight"))
    print(
        f"convert {source}: done in {time.monotonic() - began:.1f} s; {directory} has "
        f"{(stored - tables) / 1e6:.4g} M active parameters, {tables / 1e6:.4g} M in memory tables: "
        f"{shape.memory_rows} rows of {shape.memory_dim} a hash head in blocks {shape.memory_layers}"
    )


@app.command(rich_help_panel=MODELS)
def tune(
    task: TaskName,
    trials: Annotated[int, typer.Option(help="How many the study is to have in the end.", min=1)] = 20,
    space: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=RANGE", help="A key of finetune.TASK: low..high, or values a,b,c; may be repeated."),
    ] = None,
    range_test: Annotated[
        bool, typer.Option("--range-test", help="Instead: the loss while the learning rate rises, one short run.")
    ] = False,
) -> None:
    """Search for the settings of a fine-tuning that do best on validation; a stopped search goes on.

    Ends with the best as options of `memgpt retrain`, and a picture in reports/plots.
    Example: [bold]memgpt tune ner --trials 20 --space learning_rate=0.0002..0.005 --space batch_size=16,32[/]
    """
    config = _config()
    _compute_with(config)
    from memgpt import search

    params, plots = getattr(config.finetune, task), Path("reports/plots")
    if range_test:
        points, rate = search.range_test(task, params)
        search.draw_range(points, rate, plots / f"range_test_{task}.png")
        print(f"the loss falls most steeply at a learning rate of {rate:.2g}; see {plots}/range_test_{task}.png")
        return
    ranges = search.parse_space(task, space or search.DEFAULT_SPACE)

    def told(number: int, score: float | None, values: dict[str, Any]) -> None:
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        print(f"trial {number}: {'pruned' if score is None else f'{score:.4f}'}; {shown}", flush=True)

    study = search.search(task, params, ranges, trials, told)
    search.draw(study, plots / f"tune_{task}.png")
    print(f"best on validation: {study.best_value:.4f}, trial {study.best_trial.number}; see {plots}/tune_{task}.png")
    print(f"memgpt retrain {search.as_settings(task, study)}")


@app.command(rich_help_panel=MODELS)
def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A recommendation model's directory.")],
    items: Annotated[Path, typer.Argument(metavar="ITEMS", help="A file of items: id, title, description, tags.")],
) -> None:
    """Add new items to what a recommendation model can offer, without training it.

    Items that it knows already stay as they are. Example: [bold]memgpt index models/recommendation new-items.csv[/]
    """
    from memgpt import tables

    if not (directory / "items.json").is_file():
        raise UserError(f"{directory}: no recommendation model; `memgpt finetune recommendation` makes one")
    arrived = tables.read_items(items)
    _compute_with(_config())
    import shutil

    from memgpt import atomic
    from memgpt.predict.recommendation import Predictor, extend_index

    with atomic.replacing(directory) as aside:
        shutil.copytree(directory, aside)
        predictor = Predictor(aside)
        added = extend_index(predictor.model, predictor.tokenizer, arrived, aside)
    print(f"index {directory}: {added} items added, {len(arrived) - added} known already")


@app.command(rich_help_panel=MODELS)
def score(
    model: Annotated[str, typer.Argument(help="ner, its champion; ner@champion; ner/3.")],
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A file, glob or folder of .jsonl, .csv, .parquet, .txt; s3://….")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A folder, or s3://bucket/prefix, for the parts.")],
    column: Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="Of the texts. Default: the usual names.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Rows of one part.", min=1)] = 2000,
    force: Annotated[bool, typer.Option(help="Start anew where OUT holds another version's or input's parts.")] = False,
) -> None:
    """Score files of texts with a registered version: Parquet parts with every input row and its answer.

    Cut short, the same command goes on with what is missing. For recommendation IN has a column `history`.
    Example: [bold]memgpt score sentiment@champion data/arriving .memgpt/scored[/]
    """
    from memgpt import scoring

    with _bar("row") as show:
        done = scoring.score(_config(), model, source, target, column=column, chunk=chunk, force=force, progress=show)
    kept = f", {done.skipped} of them there already" if done.skipped else ""
    print(f"score {done.version}: {done.rows} rows in {target}, {done.parts} parts{kept}")


@app.command(rich_help_panel=MODELS)
def monitor(
    uri: Annotated[
        str | None, typer.Option(help="Where texts arrive: a file, glob, folder or s3://…. Default: monitor.uri.")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="What was scored and told already, and the pictures.")
    ] = Path(".memgpt/monitor"),
    as_json: AsJson = False,
) -> None:
    """Score the texts that have arrived since the last time; show surges of negative ones by topic, and drift.

    Section `monitor` of params.yaml has the settings. The flow of this name also raises alerts: docs/monitoring.md.
    Example: [bold]memgpt monitor --uri data/arriving[/]
    """
    from memgpt import monitoring

    with _bar("text") as show:
        report = monitoring.run(_config(), directory, uri=uri, progress=show)
    if as_json:
        _show(dataclasses.asdict(report))
        return
    print(f"monitor: {report.new} new texts by {report.version}; pictures in {directory}")
    if report.blank:
        print(f"monitor: {report.blank} rows without text left out")
    _show(monitoring.table(report))
    for line in [found.summary for found in report.surges] + [found.summary for found in report.drifting]:
        print(line)


@contextmanager
def _bar(unit: str) -> "Iterator[Callable[[int, int], None]]":
    """A progress bar on a terminal, as a function of how many of how many are done."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


# --- registry -----------------------------------------------------------------


@app.command(rich_help_panel=REGISTRY)
def promote(
    model: ModelName,
    replace: Annotated[bool, typer.Option(help="Release a hold, as an operator's approval does.")] = False,
    ask: Annotated[bool, typer.Option(help="Hold what the gate would promote, until `memgpt approve`.")] = False,
    reason: Reason = "",
) -> None:
    """Register models/MODEL and let the gate decide whether it becomes champion. Exit status 1 if it is rejected.

    Example: [bold]memgpt promote ner[/]
    """
    from memgpt import registry
    from memgpt.stages import promote as stage
    from memgpt.stages import verify as check

    config = _config()
    verdict = stage.run(config, model, replace=replace, ask=ask, reason=reason)
    print(f"promote {model}: {verdict.verdict} version {verdict.version} ({'; '.join(verdict.reasons)})", flush=True)
    if verdict.verdict == "reject":
        raise UserError(f"memgpt-{model} version {verdict.version} is rejected: {'; '.join(verdict.reasons)}")
    if verdict.verdict != "promote" and "champion" in registry.aliases(_client(), model):  # it has just loaded that one
        check.run(config, model)


@app.command(rich_help_panel=REGISTRY)
def approve(
    model: ModelName,
    version: Annotated[str | None, typer.Option(help="Refuse if another one is held by now.")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Say no instead.")] = False,
    reason: Reason = "",
) -> None:
    """Decide on the version that the gate holds: it becomes champion, once it has been seen to load and predict.

    Example: [bold]memgpt approve ner --reason "checked the new tags by hand"[/]
    """
    from memgpt.stages import approve as stage

    done = stage.run(_config(), model, approve=not reject, version=version, reason=reason)
    print(f"approve {model}: version {done.version} {'rejected' if reject else 'is champion'} ({done.reasons})")


@app.command(rich_help_panel=REGISTRY)
def rollback(
    model: ModelName,
    to: Annotated[str | None, typer.Option(help="3 or ner/3. Default: the champion before this one.")] = None,
    reason: Reason = "",
) -> None:
    """Make an earlier version champion again, once it has been seen to load and predict.

    Example: [bold]memgpt rollback sentiment --to 3 --reason "wrong on negations"[/]
    """
    from memgpt import registry
    from memgpt.stages import rollback as stage

    if to and not to.isdecimal():
        named, to = registry.resolve(_client(), to)
        if named != model:
            raise UserError(f"--to {named}/{to}: is no version of {model}")
    done = stage.run(_config(), model, version=to, reason=reason)
    print(f"rollback {model}: version {done.before} → {done.version}")


@app.command(rich_help_panel=REGISTRY)
def verify(version: VersionName) -> None:
    """Load a version, a model's champion by default, in a process of its own and let it predict.

    Example: [bold]memgpt verify recommendation[/]
    """
    from memgpt.stages import verify as stage

    print(f"verify {version}: version {stage.run(_config(), version)} loads and predicts")


@app.command(rich_help_panel=REGISTRY)
def history(
    model: ModelName,
    every: Annotated[bool, typer.Option("--all", help="Rejections, holds and what changed nothing, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every promotion and rollback of a model, newest first: when, from, to, who, why, numbers.

    Example: [bold]memgpt history ner[/]
    """
    from memgpt import history as past

    entries = past.of(_client(), model, every=every)
    _show([dataclasses.asdict(entry) for entry in entries] if as_json else past.table(entries))


@app.command(rich_help_panel=REGISTRY)
def lineage(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A version; or a commit, flow run, hash or path, to see what came of it."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show where a version came from: commit, data, params, parent, flow run, metrics; and how to get its data again.

    The other way, the versions that came of a commit, of data or of a parent.
    Example: [bold]memgpt lineage ner@champion[/], [bold]memgpt lineage data/tables/ner[/]
    """
    from memgpt import provenance, registry

    client = _client()
    if registry.names_version(what):
        told = provenance.of(client, *registry.resolve(client, what))
        _show(told if as_json else provenance.lines(told))
    else:
        found = provenance.came_of(client, what)
        _show(found if as_json else [f"{version:<20} {', '.join(uses)}" for version, uses in found.items()])


@app.command(rich_help_panel=REGISTRY)
def compare(
    a: Annotated[str, typer.Argument(help="ner@champion, ner/3; ner: models/ner as it is here; an experiment.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    model: Annotated[Model | None, typer.Option(help="Of two experiments.")] = None,
    examples: Annotated[int, typer.Option(help="How many changed answers to show.", min=0)] = 5,
    as_json: AsJson = False,
) -> None:
    """Two versions or experiments on the present test set: metrics, b less a with paired intervals, changed answers.

    Example: [bold]memgpt compare ner@champion ner[/], [bold]memgpt compare slower faster --model sentiment[/]
    """
    config = _config()
    _compute_with(config)
    from memgpt import comparison

    found = comparison.compare(config, a, b, model)
    if as_json:
        _show(dataclasses.asdict(found))
        return
    _show(comparison.table(found, a, b))
    _show(["", *comparison.lines(found, examples)])


@app.command(rich_help_panel=REGISTRY)
def reproduce(
    version: VersionName,
    data: Annotated[bool, typer.Option("--data", help="Only the tables that it learned from.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the worktree also if the metrics match.")] = False,
) -> None:
    """Make a version anew from its commit, params and locked data, and say whether its metrics match.

    In a worktree with an empty cache, below .memgpt/worktrees. Exit status 1 if they do not match.
    Example: [bold]memgpt reproduce ner@champion[/]
    """
    from memgpt import console, provenance, registry

    client = _client()
    model, number = registry.resolve(client, version)
    with console.Board() as board:
        title = f"reproduce {model}/{number}"
        board.begin(title)
        made = provenance.reproduce(client, model, number, lambda line: board.note(title, line), data_only=data)
        board.end(title, "done")
    for note in made.notes:
        print(f"note: {note}")
    if data:
        print(f"{made.worktree}/data/tables: the tables of {model}/{number}")
        return
    _show(provenance.table(made))
    if made.match == "differs":
        raise UserError(f"{model}/{number}: does not come out again; what was made is in {made.worktree}")
    print(f"{model}/{number}: {made.match}")
    if not keep:
        provenance.remove_worktree(made.worktree)


# --- look ---------------------------------------------------------------------


@app.command(rich_help_panel=LOOK)
def predict(
    model: Annotated[str, typer.Argument(help="ner: models/ner. ner@champion, ner/3: from the registry.")],
    texts: Annotated[list[str], typer.Argument(help="Texts; for recommendation what a reader read, oldest first.")],
    topic: Annotated[str | None, typer.Option(help="For sentiment.")] = None,
    k: Annotated[int, typer.Option(help="For recommendation: how many.", min=1)] = 5,
) -> None:
    """Ask a model; one line of JSON per answer.

    Example: [bold]memgpt predict ner@champion "Ada Brandt of Norvale Systems"[/]
    """
    import json

    from memgpt import registry

    name, version = registry.parse(model)
    inputs: list[Any] = list(texts)
    if name == "recommendation":
        inputs = [{"history": texts, "k": k}]
    elif name == "sentiment" and topic:
        inputs = [{"text": text, "topic": topic} for text in texts]
    for answer in _registered(model, inputs) if version else _local(name, inputs):
        print(json.dumps(answer, ensure_ascii=False))


def _local(name: str, inputs: list[Any]) -> list[Any]:
    directory = Path("models") / name
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; `memgpt retrain` or `dvc repro` makes it, `dvc checkout` restores it")
    _compute_with(_config())
    from memgpt import predict as predictors

    return predictors.load(name, directory).predict(inputs)


def _registered(reference: str, inputs: list[Any]) -> list[Any]:
    """In a process of its own, with the version's own packaged code."""
    from memgpt import gate, registry, tracking

    config = _config()
    tracking.use()
    name, version = registry.resolve(tracking.client(), reference)
    uri = registry.uri(name, version)
    with gate.Version(uri, Path(".memgpt/predict") / name, environment.threads(config.runtime.threads)) as served:
        served.ask(inputs)
        try:
            return served.answer()
        except gate.VersionError as error:
            raise UserError(str(error)) from None


@app.command(rich_help_panel=LOOK)
def explain(
    model: ModelName,
    texts: Annotated[list[str], typer.Argument(help="Texts; for recommendation what a reader read, oldest first.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The model's directory. Default: models/MODEL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per answer, or token and layer.")] = False,
    html: Annotated[Path | None, typer.Option(help="Draw it too, as a page in this file; not for base.")] = None,
) -> None:
    """Show which tokens and which memory entries moved an answer (integrated gradients).

    For base: which n-grams' memory spoke for each token. gate: what the context let through, 0 to 1. strength: what
    the memory added, against what was there. Example: [bold]memgpt explain sentiment "Orders fell again."[/]
    """
    if model == "base" and html:
        raise UserError("--html: base gives no answer to draw; leave it out, or explain a task")
    _compute_with(_config())
    from memgpt import inside

    folder = directory or Path("models") / model
    if model != "base":
        inside.attribute(model, folder, texts, as_json, html)
        return
    for text in texts:
        inside.explain(folder, text, as_json)


@app.command("suggest-labels", rich_help_panel=LOOK)
def suggest_labels(
    task: Annotated[Literal["ner", "sentiment"], typer.Argument(help="Whose labels.")],
    file: Annotated[Path, typer.Argument(help="Unlabelled rows: .txt, .jsonl, .csv or .parquet, each also .gz.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 20,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The model's directory. Default: models/TASK.")
    ] = None,
) -> None:
    """List the unlabelled rows most worth labelling, uncertain and unlike one another; one line of JSON per row.

    Example: [bold]memgpt suggest-labels sentiment unlabelled.jsonl --count 50[/]
    """
    import json

    folder = directory or Path("models") / task
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there; `memgpt retrain` or `dvc repro` makes it")
    _compute_with(_config())
    from memgpt import suggest

    for row in suggest.suggest(task, folder, file, count):
        print(json.dumps(row, ensure_ascii=False))


@app.command("pseudo-label", rich_help_panel=LOOK)
def pseudo_label(
    task: Annotated[Literal["ner", "sentiment"], typer.Argument(help="Whose labels.")],
    file: Annotated[Path, typer.Argument(help="Unlabelled rows: .txt, .jsonl, .csv or .parquet, each also .gz.")],
    out: Annotated[
        Path, typer.Argument(help="Where to write them: .jsonl; a name with `train` in it joins that split.")
    ],
    least: Annotated[float, typer.Option(help="Keep rows that the model is at least so sure of.", min=0, max=1)] = 0.95,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The model's directory. Default: models/TASK.")
    ] = None,
) -> None:
    """Self-training: label the rows that the model is sure of, as further training rows.

    Put OUT beside the files of the task's source and retrain.
    Example: [bold]memgpt pseudo-label sentiment unlabelled.jsonl data/reviews/train-pseudo.jsonl[/]
    """
    import json

    folder = directory or Path("models") / task
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there; `memgpt retrain` or `dvc repro` makes it")
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: the rows are written as JSON lines; name a .jsonl file")
    _compute_with(_config())
    from memgpt import atomic, suggest

    rows, read = suggest.pseudo_label(task, folder, file, least)
    atomic.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} of {read} rows, those with a probability of {least} or more")


@app.command(rich_help_panel=LOOK)
def usage(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A model directory.")] = Path("models/base"),
    tokens: Annotated[Path, typer.Option(metavar="DIR", help="What tokenize wrote.")] = Path("data/tokens"),
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which part of it.")] = "train",
    limit: Annotated[int, typer.Option(help="Read this many tokens at most.", min=1)] = 5_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per layer and n-gram order.")] = False,
) -> None:
    """Show how a text uses the memory's rows: touched and dead ones, and n-grams that share a row.

    unlearned: rows that are still zero. in every head: n-grams without a row of their own.
    Example: [bold]memgpt usage --split validation[/]
    """
    _compute_with(_config())
    from memgpt import inside

    inside.usage(model, tokens, split, limit, as_json)


@app.command(rich_help_panel=LOOK)
def ui() -> None:
    """Say how to open the Prefect UI (runs, logs, tables) and the MLflow UI (curves, models).

    Example: [bold]memgpt ui[/]
    """
    from memgpt import console

    print("\n".join(console.ways_to_look()))


# --- upkeep -------------------------------------------------------------------


@app.command(rich_help_panel=UPKEEP)
def doctor(as_json: AsJson = False) -> None:
    """Check the installation, this checkout and what runs here; each finding comes with its fix. Changes nothing.

    Exit status 1 if something is broken. Example: [bold]memgpt doctor[/]
    """
    from memgpt import doctor as checks

    found = checks.examine()
    _show([dataclasses.asdict(finding) for finding in found] if as_json else checks.lines(found))
    if any(finding.state == "broken" for finding in found):
        sys.exit(1)


@app.command(rich_help_panel=UPKEEP)
def gc(
    days: Annotated[float, typer.Option(help="Keep checkpoints and worktrees that are younger.", min=0)] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Remove old checkpoints and worktrees that nothing works in, and unused objects of DVC's cache.

    Safe while stages run. Example: [bold]memgpt gc --dry-run[/]
    """
    from rich.console import Console

    from memgpt import housekeeping

    freed = 0
    with Console(stderr=True).status("DVC reads every commit"):
        for item in housekeeping.gc(days, dry_run):
            freed += 0 if item.kept else item.bytes
            word = f"kept, {item.kept}" if item.kept else "would go" if dry_run else "removed"
            print(f"{item.what}: {item.bytes / 1e6:.1f} MB, {word}", flush=True)
    print(f"gc: {freed / 1e6:.1f} MB {'to free' if dry_run else 'freed'}")


@app.command(rich_help_panel=UPKEEP)
def backup(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where: a new folder in it.")]) -> None:
    """Copy mlflow.db and Prefect's database, consistent while servers and runs write to them.

    To restore, stop what uses them and copy a file back. Example: [bold]memgpt backup .memgpt/backups[/]
    """
    from memgpt import housekeeping

    for path in housekeeping.backup(directory):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command(rich_help_panel=UPKEEP)
def upgrade() -> None:
    """Bring mlflow.db and Prefect's database to the installed versions' schema, after a backup. Stop servers first.

    Example: [bold]memgpt upgrade[/]
    """
    from memgpt import housekeeping

    saved, upgraded = housekeeping.upgrade()
    print(f"backup in {saved[0].parent}; upgraded: {', '.join(map(str, upgraded))}")


if __name__ == "__main__":
    main()
