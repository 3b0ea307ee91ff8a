"""Two models side by side on the current test set: every metric with the interval of its difference, and the examples
for which their predictions differ."""

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.table import Table

from memgpt import bootstrap, environment, gate, mistakes, processes, registry, tracking
from memgpt.config import MODELS, TABLES, Config
from memgpt.errors import UserError
from memgpt.tasks import judge

WORK = Path(".memgpt/compare")
_RESAMPLES = 200  # for metrics that are not functions of summed statistics: each resample is recomputed in full


@dataclass(frozen=True)
class Row:
    """A metric of both models, its difference b - a with the 95 % interval, and the number of rows n."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """changed: examples {input, gold, a, b, effect}, the largest effect first. effect: how much worse a is than b, as
    `mistakes` measures it; above zero b is better."""

    model: str
    metrics: list[Row]
    changed: list[dict[str, Any]]


def compare(config: Config, a: str, b: str, model: str | None = None) -> Comparison:
    """a, b: a version (`ner@champion`, `ner/3`), a bare model (the local models/ner), or a DVC experiment or git
    commit. For the last two, `model` or the other side says which model.

    Raises:
        UserError: if one does not exist, the two are of different models, or one does not predict.
    """
    names = {registry.parse(side)[0] for side in (a, b) if registry.names_version(side)} | ({model} if model else set())
    if len(names) != 1:
        found = " and ".join(sorted(names)) or "neither"
        raise UserError(f"{a}, {b}: {found} named; compare two of one model, and name it with --model for experiments")
    (name,) = names
    if name not in MODELS:
        raise UserError(f"--model {name}: no such model; one of {', '.join(MODELS)}")
    judging = judge(name)
    if not (TABLES / ("corpus" if name == "base" else name)).is_dir():
        raise UserError(f"{TABLES}: no tables of {name} to compare on; run `dvc repro` or `dvc checkout`")
    rows = judging.test_rows(TABLES)
    first, second = _answers(config, name, [a, b], rows)
    metrics = _metrics(config, judging, rows, first, second)
    return Comparison(name, metrics, _changed(name, judging, rows, first, second))


def _answers(config: Config, model: str, sides: list[str], rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Each side's predictions: versions in separate processes with their own code, directories with this checkout's."""
    answers: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        stack.enter_context(tracking.locked(WORK / f"{model}.lock"))
        places: dict[str, str | Path] = {}
        for side in sides:
            if not registry.names_version(side):
                places[side] = _checkout(side, model, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            elif registry.parse(side)[1]:
                tracking.use()
                places[side] = registry.uri(*registry.resolve(tracking.client(), side))
            else:
                places[side] = Path("models") / model
        if len(set(places.values())) < len(sides):
            raise UserError(f"{' and '.join(sides)}: are both {places[sides[0]]}")
        uris = [place for place in places.values() if isinstance(place, str)]
        share = max(1, environment.threads(config.runtime.threads) // max(1, len(uris)))
        asked = {uri: stack.enter_context(gate.Version(uri, WORK / model, share)) for uri in uris}
        for version in asked.values():
            version.ask(*gate.as_served([row["input"] for row in rows]))
        for side, place in places.items():
            if isinstance(place, str):
                try:
                    answers[side] = asked[place].answer()
                except gate.VersionError as error:
                    raise UserError(str(error)) from None
            else:
                answers[side] = _local(model, place, rows)
    return [answers[side] for side in sides]


def _local(model: str, directory: Path, rows: list[dict[str, Any]]) -> list[Any]:
    from memgpt import predict

    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no model there; `dvc repro` makes it, `dvc checkout` restores it")
    return predict.load(model, directory).predict([row["input"] for row in rows])


def _checkout(revision: str, model: str, folder: Path) -> Path:
    """models/<model> of an experiment or commit, from DVC's cache."""
    target = folder / model
    processes.output_of(  # not --quiet, which hides why it fails
        [sys.executable, "-m", "dvc", "get", ".", f"models/{model}", "--rev", revision, "--out", str(target)],
        f"{revision}: neither a version (ner@champion, ner/3) nor an experiment or commit whose models/{model} is in "
        "the cache",
        "`dvc exp show` lists experiments",
    )
    return target


def _metrics(config: Config, judging: ModuleType, rows: list[dict[str, Any]], a: list[Any], b: list[Any]) -> list[Row]:
    resamples, seed = config.promote.bootstrap, config.promote.seed
    ours, theirs = judging.statistics(rows, a), judging.statistics(rows, b)
    everything = np.ones(len(rows), dtype=bool)
    slices = {name: chosen for name, chosen in judging.slices(rows, TABLES).items() if chosen.any()}
    found = []
    for name, chosen in {"": everything, **slices}.items():
        old, new = ours[chosen], theirs[chosen]
        difference, low, high = bootstrap.paired(new, old, judging.score, resamples, seed)
        title = f"{judging.PRIMARY}_{name}" if name else judging.PRIMARY
        values = float(judging.score(old.sum(0))), float(judging.score(new.sum(0)))
        found.append(Row(title, *values, difference, low, high, int(chosen.sum())))
    return found + _measured_anew(judging, rows, a, b, seed)


def _measured_anew(judging: ModuleType, rows: list[dict[str, Any]], a: list[Any], b: list[Any], seed: int) -> list[Row]:
    """The other metrics. A resample that lacks a metric, such as one of a rare label, is not counted for it."""
    from tqdm import tqdm

    whole = judging.metrics(rows, a), judging.metrics(rows, b)
    names = [name for name in whole[0] if name in whole[1] and name != judging.PRIMARY]
    differences: dict[str, list[float]] = {name: [] for name in names}
    random = np.random.default_rng(seed)
    for _ in tqdm(range(_RESAMPLES), desc="compare", leave=False, disable=None):
        drawn = random.integers(len(rows), size=len(rows))
        some = [rows[i] for i in drawn]
        old, new = (judging.metrics(some, [answers[i] for i in drawn]) for answers in (a, b))
        for name in names:
            if name in old and name in new:
                differences[name].append(new[name] - old[name])
    found = []
    for name in names:
        low, high = np.percentile(differences[name], [2.5, 97.5]) if differences[name] else (np.nan, np.nan)
        old, new = whole[0][name], whole[1][name]
        found.append(Row(name, old, new, new - old, float(low), float(high), len(rows)))
    return found


def _changed(
    model: str, judging: ModuleType, rows: list[dict[str, Any]], a: list[Any], b: list[Any]
) -> list[dict[str, Any]]:
    sides = [mistakes.judged(model, rows, side, judging.statistics(rows, side), TABLES) for side in (a, b)]
    changed = [
        {
            "input": old["input"],
            "gold": old["gold"],
            "a": old["prediction"],
            "b": new["prediction"],
            "effect": round(old["badness"] - new["badness"], 6),
        }
        for old, new, before, after in zip(*sides, a, b, strict=True)
        if _said(model, before) != _said(model, after)
    ]
    return sorted(changed, key=lambda example: -abs(example["effect"]))


def _said(model: str, answer: Any) -> Any:
    """The part of an answer that is compared: not its confidence."""
    if model == "sentiment":
        return answer["label"]
    if model == "ner":
        return sorted((entity["type"], entity["start"], entity["end"]) for entity in answer)
    if model == "recommendation":
        return [(item["item_id"], item["title"]) for item in answer[:10]]
    return round(answer["bits_per_byte"], 2)


def table(found: Comparison, a: str, b: str) -> Table:
    """Differences whose whole interval is on one side of zero are bold."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("metric", a, b, "difference", "95 % interval", "rows"):
        drawn.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for row in found.metrics:
        sure = row.low > 0 or row.high < 0
        cells = (f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}", f"{row.low:+.4f} to {row.high:+.4f}")
        drawn.add_row(row.metric, *cells, str(row.n), style="bold" if sure else "")
    return drawn


def lines(found: Comparison, count: int) -> list[str]:
    """How many answers changed, and the first of them."""
    better = sum(example["effect"] > 0 for example in found.changed)
    worse = sum(example["effect"] < 0 for example in found.changed)
    told = [f"{len(found.changed)} answers changed: {better} for the better, {worse} for the worse"]
    for example in found.changed[:count]:
        sign = "+" if example["effect"] > 0 else "-" if example["effect"] < 0 else "="
        text = example["input"] if isinstance(example["input"], str) else " | ".join(example["input"])
        gold = "" if example["gold"] is None else f"  right: {_compact(found.model, example['gold'])}"
        told.append(f"{sign} {text[:160]}")
        told.append(f"   {gold}  a: {_compact(found.model, example['a'])}  b: {_compact(found.model, example['b'])}")
    return told


def _compact(model: str, answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if model == "ner":
        return ", ".join(f"{entity['text']} {entity['type']}" for entity in answer) or "none"
    if model == "sentiment":
        return f"{answer['label']} {answer['scores'][answer['label']]:.2f}"
    if model == "recommendation":
        return " | ".join(answer[:3])
    return json.dumps(answer)
