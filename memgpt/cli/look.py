"""Commands that inspect models: their answers, the reasons for them, the use of the memory, and what to label next."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memgpt import environment
from memgpt.cli.base import ModelName, compute_with, load_config
from memgpt.errors import UserError

PANEL = "Look"

_CLASSES = {
    "ner": "MemGPTForTokenClassification",
    "sentiment": "MemGPTForSequenceClassification",
    "recommendation": "MemGPTForRecommendation",
}

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def predict(
    model: Annotated[str, typer.Argument(help="ner: models/ner. ner@champion, ner/3: from the registry.")],
    texts: Annotated[list[str], typer.Argument(help="Texts; for recommendation what a reader read, oldest first.")],
    topic: Annotated[str | None, typer.Option(help="For sentiment.")] = None,
    k: Annotated[int, typer.Option(help="For recommendation: how many.", min=1)] = 5,
) -> None:
    """Let a model predict; prints one line of JSON per answer.

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
    compute_with(load_config())
    from memgpt import predict as predictors

    return predictors.load(name, directory).predict(inputs)


def _registered(reference: str, inputs: list[Any]) -> list[Any]:
    """The answers of a registered version, computed in a separate process with its packaged code."""
    from memgpt import gate, registry, tracking

    config = load_config()
    tracking.use()
    name, version = registry.resolve(tracking.client(), reference)
    uri = registry.uri(name, version)
    with gate.Version(uri, Path(".memgpt/predict") / name, environment.threads(config.runtime.threads)) as served:
        served.ask(inputs)
        try:
            return served.answer()
        except gate.VersionError as error:
            raise UserError(str(error)) from None


def _model(name: str, directory: Path | None) -> Path:
    """A model's directory. A task's model must have that task's class; base accepts any, since all contain the core."""
    import json

    folder = directory or Path("models") / name
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there; `memgpt retrain` or `dvc repro` makes it")
    [kind] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    wanted = _CLASSES.get(name, kind)
    if kind != wanted:
        raise UserError(f"{folder}: holds a {kind}, no model for {name}, which is a {wanted}; name its directory")
    return folder


@app.command(rich_help_panel=PANEL)
def explain(
    model: ModelName,
    texts: Annotated[list[str], typer.Argument(help="Texts; for recommendation what a reader read, oldest first.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The model's directory. Default: models/MODEL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per answer, or token and layer.")] = False,
    html: Annotated[Path | None, typer.Option(help="Draw it too, as a page in this file; not for base.")] = None,
) -> None:
    """Show which tokens and memory entries contributed to an answer (integrated gradients).

    For base: which n-grams' memory entries each token read, and what recall found earlier in the text. gate: how much
    of it the context lets through, 0 to 2. strength: norm of what was added, relative to the hidden state's norm.
    Example: [bold]memgpt explain sentiment "Orders fell again."[/]
    """
    if model == "base" and html:
        raise UserError("--html: base gives no answer to draw; leave it out, or explain a task")
    compute_with(load_config())
    from memgpt import inside

    folder = _model(model, directory)
    if model != "base":
        inside.attribute(model, folder, texts, as_json, html)
        return
    for text in texts:
        inside.explain(folder, text, as_json)


@app.command("suggest-labels", rich_help_panel=PANEL)
def suggest_labels(
    task: Annotated[Literal["ner", "sentiment"], typer.Argument(help="Whose labels.")],
    file: Annotated[Path, typer.Argument(help="Unlabelled rows: .txt, .jsonl, .csv or .parquet, each also .gz.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 20,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The model's directory. Default: models/TASK.")
    ] = None,
) -> None:
    """List the unlabelled rows most worth labelling: uncertain and different from one another. One line of JSON each.

    Example: [bold]memgpt suggest-labels sentiment unlabelled.jsonl --count 50[/]
    """
    import json

    folder = _model(task, directory)
    compute_with(load_config())
    from memgpt import suggest

    for row in suggest.suggest(task, folder, file, count):
        print(json.dumps(row, ensure_ascii=False))


@app.command("pseudo-label", rich_help_panel=PANEL)
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
    """Self-training: write the rows that the model is sure of, with its labels, as additional training rows.

    Put OUT beside the files of the task's source and retrain.
    Example: [bold]memgpt pseudo-label sentiment unlabelled.jsonl data/reviews/train-pseudo.jsonl[/]
    """
    import json

    folder = _model(task, directory)
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: the rows are written as JSON lines; name a .jsonl file")
    if out.exists():
        raise UserError(f"{out}: is there already; name a new file")
    compute_with(load_config())
    from memgpt import atomic, suggest

    rows, read = suggest.pseudo_label(task, folder, file, least)
    if not rows:
        raise UserError(f"{file}: the model is sure of none of its {read} rows; nothing is written, lower --least")
    atomic.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} of {read} rows, those with a probability of {least} or more, each once")


@app.command(rich_help_panel=PANEL)
def usage(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A model directory.")] = Path("models/base"),
    tokens: Annotated[Path, typer.Option(metavar="DIR", help="What tokenize wrote.")] = Path("data/tokens"),
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which part of it.")] = "train",
    limit: Annotated[int, typer.Option(help="Read this many tokens at most.", min=1)] = 5_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per n-gram order.")] = False,
) -> None:
    """Show how a text uses the memory's rows: rows read (touched) and never read (dead), and n-grams that share a row.

    unlearned: rows that are still zero. in every head: n-grams that have no row of their own in any hash head.
    Example: [bold]memgpt usage --split validation[/]
    """
    compute_with(load_config())
    from memgpt import inside

    inside.usage(model, tokens, split, limit, as_json)


@app.command(rich_help_panel=PANEL)
def ui() -> None:
    """Print how to open the Prefect UI (runs, logs, tables) and the MLflow UI (curves, models).

    Example: [bold]memgpt ui[/]
    """
    from memgpt import console

    print("\n".join(console.ui_hints()))
