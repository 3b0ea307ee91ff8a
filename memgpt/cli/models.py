"""Commands for models outside the stages: convert, tune, index, score and monitor."""

import dataclasses
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memgpt import environment
from memgpt.cli.base import AsJson, TaskName, compute_with, load_config, show
from memgpt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PANEL = "Models"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def convert(
    source: Annotated[str, typer.Argument(help="A directory or hub id: Llama, Mistral, Qwen2, Qwen3, SmolLM, GPT-2.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it: a new directory.")],
    memory_layers: Annotated[
        list[int] | None,
        typer.Option("--memory-layer", metavar="N", help="A block with a memory; may be repeated. Default: 0, 2, 4."),
    ] = None,
    memory_rows: Annotated[
        int | None, typer.Option(help="Rows per hash head. Default: by the model's size.", min=1)
    ] = None,
    memory_dim: Annotated[int | None, typer.Option(help="Width of a row. Default: by the model's size.", min=1)] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights. Default: the source's.")
    ] = None,
) -> None:
    """Convert an existing model and add an empty memory: same outputs at first, but more capacity to learn.

    Set pretrain.init to DIR to start from it. Example: [bold]memgpt convert HuggingFaceTB/SmolLM2-135M models/smollm[/]
    """
    if directory.exists():
        raise UserError(f"{directory}: is there already; name a new directory")
    os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads(None)))
    import torch

    from memgpt import atomic, lineage
    from memgpt.model.convert import convert as graft

    began = time.monotonic()
    torch.manual_seed(0)  # for new weights that are not initialised to zero
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
    table = 0 if model.model.memory_table is None else model.model.memory_table.weight.numel()
    print(
        f"convert {source}: done in {time.monotonic() - began:.1f} s; {directory} has "
        f"{(stored - table) / 1e6:.4g} M active parameters, {table / 1e6:.4g} M in the memory table: "
        f"{shape.memory_rows} rows of {shape.memory_dim} a hash head, for blocks {shape.memory_layers}"
    )


@app.command(rich_help_panel=PANEL)
def tune(
    task: TaskName,
    trials: Annotated[int, typer.Option(help="How many the study is to have in the end.", min=1)] = 20,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE",
            help="A key of finetune.TASK: low..high of a rate or fraction, or values a,b,c; may be repeated. Default: "
            "both learning rates, dropout and batch_size.",
        ),
    ] = None,
    range_test: Annotated[
        bool, typer.Option("--range-test", help="Instead: the loss while the learning rate rises, one short run.")
    ] = False,
) -> None:
    """Search for the fine-tuning settings with the best validation score; a stopped search resumes.

    At the end, prints the best settings as options of `memgpt retrain` and writes a picture to reports/plots.
    Example: [bold]memgpt tune ner --trials 20 --space learning_rate=0.0002..0.005 --space batch_size=16,32[/]
    """
    config = load_config()
    compute_with(config)
    from memgpt import search

    plots = Path("reports/plots")
    if range_test:
        points, rate = search.range_test(task, getattr(config.finetune, task))
        search.draw_range(points, rate, plots / f"range_test_{task}.png")
        found = "the loss falls at none by more than batches differ"
        if rate is not None:
            found = f"the loss falls most steeply at a learning rate of {rate:.2g}"
        print(f"{found}; see {plots}/range_test_{task}.png")
        return
    ranges = search.parse_space(task, space or search.DEFAULT_SPACE)

    def told(number: int, score: float | None, values: dict[str, Any], why: str) -> None:
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        reason = f"; {why}" if why else ""
        print(f"trial {number}: {'pruned' if score is None else f'{score:.4f}'}; {shown}{reason}", flush=True)

    study = search.search(task, ranges, trials, told)
    search.draw(study, plots / f"tune_{task}.png")
    print(f"best on validation: {study.best_value:.4f}, trial {study.best_trial.number}; see {plots}/tune_{task}.png")
    print(f"memgpt retrain {search.as_settings(task, study)}")


@app.command(rich_help_panel=PANEL)
def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A recommendation model's directory.")],
    items: Annotated[Path, typer.Argument(metavar="ITEMS", help="A file of items: id, title, description, tags.")],
) -> None:
    """Add new items to those that a recommendation model can recommend, without training it.

    Items that it already has stay unchanged. The columns are named as in data.recommendation.columns.
    Example: [bold]memgpt index models/recommendation new-items.csv[/]
    """
    from memgpt import tables

    if not (directory / "items.json").is_file():
        raise UserError(f"{directory}: no recommendation model; `memgpt finetune recommendation` makes one")
    config = load_config()
    arrived = tables.read_items(items, config.data.recommendation.columns)
    compute_with(config)
    import shutil

    from memgpt import atomic
    from memgpt.predict.recommendation import Predictor, extend_index

    with atomic.replacing(directory) as aside:
        shutil.copytree(directory, aside)
        predictor = Predictor(aside)
        added = extend_index(predictor.model, predictor.tokenizer, arrived, aside)
    print(f"index {directory}: {added} items added, {len(arrived) - added} known already")


@app.command(rich_help_panel=PANEL)
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

    If interrupted, the same command continues with the missing parts. For recommendation IN has a column `history`.
    Example: [bold]memgpt score sentiment@champion data/arriving .memgpt/scored[/]
    """
    from memgpt import scoring

    with _bar("row") as progress:
        done = scoring.score(
            load_config(), model, source, target, column=column, chunk=chunk, force=force, progress=progress
        )
    kept = f", {done.skipped} of them there already" if done.skipped else ""
    print(f"score {done.version}: {done.rows} rows in {target}, {done.parts} parts{kept}")


@app.command(rich_help_panel=PANEL)
def monitor(
    uri: Annotated[
        str | None, typer.Option(help="Where texts arrive: a file, glob, folder or s3://…. Default: monitor.uri.")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="What was scored and told already, and the pictures.")
    ] = Path(".memgpt/monitor"),
    as_json: AsJson = False,
) -> None:
    """Score the texts that arrived since the last run; show surges of negative texts by topic, and drift.

    Settings: section `monitor` of params.yaml. The flow of the same name also sends alerts: docs/monitoring.md.
    Example: [bold]memgpt monitor --uri data/arriving[/]
    """
    from memgpt import monitoring

    with _bar("text") as progress:
        report = monitoring.run(load_config(), directory, uri=uri, progress=progress)
    if as_json:
        show(dataclasses.asdict(report))
        return
    print(f"monitor: {report.new} new texts by {report.version}; pictures in {directory}")
    if report.blank:
        print(f"monitor: {report.blank} rows without text left out")
    show(monitoring.table(report))
    for line in [found.summary for found in report.surges] + [found.summary for found in report.drifting]:
        print(line)


@contextmanager
def _bar(unit: str) -> "Iterator[Callable[[int, int], None]]":
    """A progress bar on a terminal: yields a function that takes the number done and the total."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
