"""One cell of the task benchmark: a system on a data set, with settings and a seed, and its scores.

MemGPT's own stages ingest the data into one folder per set. MemGPT and BERT share training loop, decoding and metrics,
so that they differ only in the model. SASRec has its own training loop.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import numpy as np
import peers_recommendation
import runner
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    set_seed,
)

from memgpt import atomic, config, predict, tuning
from memgpt.config import TABLES, Finetune
from memgpt.model import MemGPTForCausalLM
from memgpt.predict import ner
from memgpt.predict.batching import by_length, pad
from memgpt.predict.words import best_path, joined_words, spans_from_tags
from memgpt.stages import finetune, ingest, multitask, snapshot
from memgpt.tasks import judge, recommendation, rows_of
from memgpt.training import train

ROOT = Path(__file__).parents[1]
WORK = Path(".memgpt/benchmarks/tasks").resolve()
cells.WORK = cells.WORK.resolve()
RESULTS = Path(__file__).parent / "results" / "tasks"
STATISTICS = Path(__file__).parent / "results" / "statistics"  # each test example's part of a metric, for pairing
CORE, BERT = "memgpt-128-4M-1", "bert-128-4M-1"  # cells of benchmarks/core.py; a spec may name another `core`
Spec = dict[str, Any]
# Where trunks are compared: no re-ranking, because its other signals are learnt again on any trunk.
TRUNK: dict[str, Spec] = {"ner": {}, "sentiment": {}, "recommendation": {"rerank": False}}
Answers = list[Any]
Ask = Callable[[list[Any]], Answers]
SETS = {
    "wnut17": ("ner", "ner/wnut17"),
    "wikigold": ("ner", "ner/wikigold"),
    "sec_filings": ("ner", "ner/sec_filings"),
    "financial_phrasebank": ("sentiment", "sentiment/financial_phrasebank"),
    "sst2": ("sentiment", "sentiment/sst2"),
    "movielens": ("recommendation", "recommendation/ml_latest_small"),
}
# By set: epochs of MemGPT and BERT, and what else differs from params.yaml.
SETTINGS: dict[str, Spec] = {
    "wnut17": {"epochs": 5},
    "wikigold": {"epochs": 10, "batch_by_length": True},  # half the time, as good on validation
    "sec_filings": {"epochs": 10, "batch_by_length": True},
    "financial_phrasebank": {"epochs": 5},
    "sst2": {"epochs": 1, "batch_size": 32, "max_length": 64},
    "movielens": {"epochs": 1, "max_length": 16},
}


def prepare(name: str, source: Path) -> Path:
    """The folder of a data set, or of several whose names are joined by +, with the tables that the stages ingest."""
    place = WORK / "sets" / name
    if (place / "complete").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    parts = [SETS[part] for part in name.split("+")]
    unread = [f"data.{name}.uri=sample://newsroom?scale=0.05" for name in config.SOURCES]
    uris = [f"data.{task}.uri={(source / folder).resolve()}" for task, folder in parts]
    document = config.override(config.read(ROOT / "params.yaml"), [*unread, *uris])
    config.write(document, place / "params.yaml")
    with contextlib.chdir(place):
        snapshot.run(config.parse(document))
        for task, _ in parts:
            ingest.run(config.parse(document), task)
    (place / "complete").touch()
    return place


def start(core: str) -> Path:
    """The model directory of a pretrained cell; adds the tokenizer to it."""
    place = cells.WORK / "cells" / core / "model"
    if not place.is_dir():
        raise SystemExit(f"{place}: not pretrained here; `python benchmarks/core.py --full` does it")
    if not (place / "tokenizer.json").exists():
        shutil.copytree(cells.WORK / "tokenizer", place, dirs_exist_ok=True)
    return place


def settings(task: str, spec: Spec) -> Finetune:
    """finetune.<task> of params.yaml with the changes of the set and the cell."""
    document = config.read(ROOT / "params.yaml")
    changes = {**SETTINGS.get(spec["set"], {}), **spec.get("changes", {}), "seed": spec["seed"]}
    config.override(document, [f"finetune.{task}.{key}={json.dumps(value)}" for key, value in changes.items()])
    return getattr(config.parse(document).finetune, task)


# --- the systems: spec → (a function that predicts a task's inputs, numbers about the training)


def memgpt(task: str, spec: Spec, target: Path) -> tuple[Ask, Spec]:
    """MemGPT, trained by the stage finetune."""
    began = time.perf_counter()
    metrics = finetune.fit(settings(task, spec), task, target)
    told = {"minutes": round((time.perf_counter() - began) / 60, 2)}
    told |= {name: metrics[name] for name in ("trainable_parameters", "members") if name in metrics}
    return predict.load(task, target).predict, told


def bert(task: str, spec: Spec, target: Path) -> tuple[Ask, Spec]:
    params, module = settings(task, spec), judge(task)
    names = module.labels(TABLES)
    kind = {"ner": BertForTokenClassification, "sentiment": BertForSequenceClassification}[task]
    set_seed(params.seed)
    model = kind.from_pretrained(
        cells.WORK / "cells" / spec.get("core", BERT) / "model",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        hidden_dropout_prob=params.dropout,
        attention_probs_dropout_prob=params.dropout,
    )
    model.config.window, model.config.label_temperature = params.max_length, 1.0
    tokenizer = AutoTokenizer.from_pretrained(cells.WORK / "tokenizer")
    data = module.Training(TABLES, tokenizer, **params.model_dump())
    steps = params.epochs * math.ceil(len(data) / params.batch_size)
    began = time.perf_counter()
    # Never batches of texts of similar length: with these BERT may learn nothing (WNUT-17, one seed of three).
    train(model, data, data.collate, params, steps=steps, checkpoints=target, title=target.name)
    told = {"minutes": round((time.perf_counter() - began) / 60, 2)}
    if task == "ner":
        held_out = [row for row in rows_of(TABLES, "ner", "validation") if row["tokens"]]
        scores = ner.word_scores(model.eval(), tokenizer, [row["tokens"] for row in held_out])
        model.config.outside_bias = module.fit_outside_bias(scores, [row["tags"] for row in held_out], names)
        return _TagsOf(model, tokenizer).predict, told
    return _labels_of(model, tokenizer), told


class _TagsOf(ner.Predictor):
    """MemGPT's windows and decoding with another model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer


def _labels_of(model: PreTrainedModel, tokenizer: Any) -> Ask:
    @torch.no_grad()
    def ask(inputs: list[Any]) -> Answers:
        rows = tokenizer([row["text"] for row in inputs], add_special_tokens=False)["input_ids"]
        rows = [row[: model.config.window] for row in rows]
        answers: Answers = [None] * len(rows)
        for batch in by_length(rows):
            logits = model(**pad([rows[i] for i in batch], tokenizer.pad_token_id)).logits
            for i, scores in zip(batch, logits.softmax(-1).tolist(), strict=True):
                named = {model.config.id2label[place]: score for place, score in enumerate(scores)}
                answers[i] = {"label": max(named, key=named.__getitem__), "scores": named, "topic": None}
        return answers

    return ask


def crf(task: str, spec: Spec, target: Path) -> tuple[Ask, Spec]:
    """A conditional random field (sklearn-crfsuite) on hand-made features of a word and its neighbours. The system
    crf_biased decodes like MemGPT, optimising F1, from each word's marginal probabilities."""
    from sklearn_crfsuite import CRF

    rows, module = rows_of(TABLES, "ner", "train"), judge("ner")
    model = CRF(algorithm="lbfgs", max_iterations=100, all_possible_transitions=True, **spec["changes"])
    model.fit([_features(row["tokens"]) for row in rows], [row["tags"] for row in rows])
    names, bias = module.labels(TABLES), 0.0

    def scores(texts: list[list[str]]) -> list[np.ndarray]:
        marginals = model.predict_marginals([_features(words) for words in texts])
        return [np.log([[word.get(name, 0) + 1e-9 for name in names] for word in text]) for text in marginals]

    def tagged(texts: list[list[str]]) -> list[list[str]]:
        if spec["system"] == "crf":
            return model.predict([_features(words) for words in texts])
        return [[names[i] for i in best_path(text, names, bias)] for text in scores(texts)]

    if spec["system"] == "crf_biased":
        held_out = [row for row in rows_of(TABLES, "ner", "validation") if row["tokens"]]
        told = scores([row["tokens"] for row in held_out])
        bias = module.fit_outside_bias(told, [row["tags"] for row in held_out], names)

    def ask(inputs: list[Any]) -> Answers:
        answers = []
        for words, tags in zip(inputs, tagged(inputs), strict=True):
            places = joined_words(words)
            answers.append(
                [
                    {"type": kind, "start": places[first][0], "end": places[last - 1][1]}
                    for kind, first, last in spans_from_tags(tags)
                ]
            )
        return answers

    return ask, {}


def _features(words: list[str]) -> list[dict[str, Any]]:
    own = [
        {
            "lower": word.lower(),
            "prefix2": word[:2],
            "prefix3": word[:3],
            "suffix2": word[-2:],
            "suffix3": word[-3:],
            "shape": "".join("X" if c.isupper() else "x" if c.islower() else "9" if c.isdigit() else c for c in word)[
                :8
            ],
            "title": word.istitle(),
            "upper": word.isupper(),
            "digit": any(c.isdigit() for c in word),
        }
        for word in words
    ]
    features = []
    for place, mine in enumerate(own):
        seen = {"bias": 1.0, **mine}
        for offset in (-2, -1, 1, 2):
            if 0 <= place + offset < len(own):
                theirs = own[place + offset]
                seen |= {f"{offset}:{key}": theirs[key] for key in ("lower", "shape", "title", "suffix3")}
            else:
                seen[f"{offset}:edge"] = True
        features.append(seen)
    return features


def bag(task: str, spec: Spec, target: Path) -> tuple[Ask, Spec]:
    """TF-IDF of words and word pairs with logistic regression: the baseline of the stage evaluate, with a given C."""
    module = judge("sentiment")
    return (lambda inputs: module.baseline(TABLES, [{"input": row} for row in inputs], **spec["changes"])), {}


def collaborative(task: str, spec: Spec, target: Path) -> tuple[Ask, Spec]:
    """popularity, item_knn, ease or sasrec of benchmarks/peers_recommendation.py."""
    items = [item["item_id"] for item in rows_of(TABLES, "recommendation", "items")]
    place = {item: index for index, item in enumerate(items)}
    lines = [[place[item] for item in line] for line in recommendation.histories(TABLES, "train").values()]
    seeded = {"seed": spec["seed"]} if spec["system"] == "sasrec" else {}
    score = getattr(peers_recommendation, spec["system"])(lines, len(items), **spec.get("changes", {}), **seeded)

    def ask(inputs: list[Any]) -> Answers:
        answers = []
        for row in inputs:
            history = [place[item] for item in row["history"]]
            scores = np.array(score(history), dtype=np.float64)
            scores[history] = -np.inf
            best = np.argsort(-scores, kind="stable")[: row["k"]]
            answers.append([{"item_id": items[i], "score": float(scores[i])} for i in best])
        return answers

    return ask, {}


# "plain" is MemGPT from a core without memory, which the spec names.
SYSTEMS = (
    {"memgpt": memgpt, "plain": memgpt, "bert": bert, "bag_of_words": bag}
    | dict.fromkeys(("crf", "crf_biased"), crf)
    | dict.fromkeys(("popularity", "item_knn", "ease", "sasrec"), collaborative)
)


# --- cells


def compare(name: str, spec: Spec, target: Path) -> Spec:
    """Score one system on validation; a final cell on test, with the changes that were best in the trials `after`."""
    task = SETS[spec["set"]][0]
    if spec.get("test") and spec.get("after"):
        tried = [json.loads((RESULTS / f"{trial}.json").read_text()) for trial in spec["after"]]
        best = max(tried, key=lambda trial: trial["validation"])
        spec = {**spec, "changes": {**best["spec"].get("changes", {}), **spec.get("changes", {})}}
        if found := _untried(name, spec):
            return found
    ask, told = SYSTEMS[spec["system"]](task, spec, target)
    test = bool(spec.get("test"))
    found = {"changes": spec.get("changes", {}), **told, **judged(task, ask, name, test)}
    if task == "recommendation" and SYSTEMS[spec["system"]] is memgpt:  # the same model without re-ranking
        found["text"] = judged(task, lambda rows: ask([{**row, "rerank": False} for row in rows]), f"{name}-text", test)
    return found


def _untried(name: str, spec: Spec) -> Spec | None:
    """The result of the same settings without trials, if any, so that the test split is not read again."""
    twin = f"{spec['set']}-{spec['system']}-{spec['seed']}"
    found = runner.done(RESULTS, twin, {key: value for key, value in spec.items() if key != "after"})
    if not found:
        return None
    for part in ("", "-text"):
        if (kept := STATISTICS / f"{twin}{part}.npz").exists():
            shutil.copyfile(kept, STATISTICS / f"{name}{part}.npz")
    return {key: value for key, value in found.items() if key != "spec"}


def judged(task: str, ask: Ask, name: str, test: bool) -> Spec:
    """The primary metric on validation or test; stores each test example's part of it."""
    module, split = judge(task), "test" if test else "validation"
    rows = module.test_rows(TABLES, split)
    answers = ask([row["input"] for row in rows])
    sums = module.statistics(rows, answers)
    if test:
        with atomic.replacing(STATISTICS / f"{name}.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, sums)
    extra = {}
    if task == "sentiment":
        extra["calibration_error"] = round(module.metrics(rows, answers)["expected_calibration_error"], 4)
    return {split: round(float(module.score(sums.sum(0))), 4), "n": len(rows), **extra}


def joint(name: str, spec: Spec, target: Path) -> Spec:
    """Run the stage multitask; then score each task as trained jointly, and tuned from there. Recommendation is without
    re-ranking, which is learnt again on any trunk. `NAME_trunk` (also without word votes) and `text_loss` (the core's
    loss on held-out text) can get worse by tuning."""
    document = config.read("params.yaml")
    assignments = [f"multitask.{key}={json.dumps(value)}" for key, value in spec["changes"].items()]
    config.override(document, [*assignments, f"multitask.seed={spec['seed']}"])
    began = time.perf_counter()
    multitask.run(config.parse(document))
    source = Path("models/multitask")
    found: Spec = {"minutes": (time.perf_counter() - began) / 60}
    found["text_loss_base"], found["text_loss"] = _text_loss(), _text_loss(source)
    for part in spec["set"].split("+"):
        task = SETS[part][0]
        params = settings(task, {**spec, "set": part, "changes": {"start": "multitask", **TRUNK[task]}})
        found[f"{task}_joint"] = _on_trunk(task, params, source, target / f"{task}-joint")
        found[f"{task}_trunk"] = _on_trunk(task, _without_votes(params), source, target / f"{task}-trunk")
        metrics = finetune.fit(params, task, target / f"{task}-tuned")
        found[f"{task}_joint_then_tuned"] = metrics[f"validation_{judge(task).PRIMARY}"]
    return {key: round(value, 4) for key, value in found.items()}


def forgetting(name: str, spec: Spec, target: Path) -> Spec:
    """Tune a task from the joint model by one method. Then, on the changed trunk, score the other tasks with their
    unchanged heads, and the core's loss on held-out text. The values before tuning are those that `joint` measured."""
    part, before = spec["part"], json.loads((RESULTS / f"{spec['after'][0]}.json").read_text())
    task = SETS[part][0]
    params = settings(task, {**spec, "set": part, "changes": {**spec["changes"], "start": "multitask", **TRUNK[task]}})
    began = time.perf_counter()
    metrics = finetune.fit(params, task, target)
    found = {
        "minutes": (time.perf_counter() - began) / 60,
        "trainable_parameters": metrics["trainable_parameters"],
        "validation": metrics[f"validation_{judge(task).PRIMARY}"],
        "text_loss_before": before["text_loss"],
        "text_loss_after": _text_loss(target),
    }
    for other in spec["set"].split("+"):
        their = SETS[other][0]
        if other != part:
            theirs = _without_votes(settings(their, {**spec, "set": other, "changes": {"start": "multitask"}}))
            found[f"{their}_before"] = before[f"{their}_trunk"]
            found[f"{their}_after"] = _on_trunk(their, theirs, Path("models/multitask"), target / their, target)
    return {key: round(value, 4) for key, value in found.items()}


def _without_votes(params: Finetune) -> Finetune:
    """Switch off what is added to the deep model (word votes, re-ranking), because it would hide what that forgets."""
    beside = {"word_votes": 0, "rerank": False}
    return params.model_copy(update={key: value for key, value in beside.items() if hasattr(params, key)})


def _on_trunk(task: str, params: Finetune, source: Path, directory: Path, trunk: Path | None = None) -> float:
    """Validation score of a task's head of the joint model in `source`, on its own or another model's trunk."""
    model = judge(task).model(source, TABLES, **params.model_dump())
    model = _with_trunk(model, trunk).eval() if trunk else model.eval()
    finetune.save(model, task, params, AutoTokenizer.from_pretrained(source), directory)
    return finetune.validate(task, directory)[judge(task).PRIMARY]


def _text_loss(trunk: Path | None = None) -> float:
    """The core's loss on held-out text, with its own or another model's trunk."""
    core = MemGPTForCausalLM.from_pretrained("models/base")
    return cells.held_out(_with_trunk(core, trunk) if trunk else core, "validation", False, 1)


def _with_trunk(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """A model with another's trunk. If that is wider because of a merged adapter, this one is widened by an adapter
    that adds nothing. A prefix is not copied, because it belongs to the other's task."""
    wider = AutoConfig.from_pretrained(directory).intermediate_size - model.config.intermediate_size
    if wider:
        adapter = config.load(ROOT / "params.yaml").finetune.ner.model_copy(update={"tune": "adapter", "rank": wider})
        model = tuning.whole(tuning.prepare(model, adapter, steps=1))
    trunk = load_file(directory / "model.safetensors")
    trunk = {name: value for name, value in trunk.items() if name.startswith("model.") and ".prefix." not in name}
    lacking = model.load_state_dict(trunk, strict=False)
    assert not lacking.unexpected_keys, lacking
    return model


KINDS = {"compare": compare, "joint": joint, "forgetting": forgetting}


def settle(name: str, spec: Spec) -> Path:
    """A separate folder for the cell, since cells run in parallel, with links to the set's tables, the core, and the
    joint model of the cell after which it runs."""
    source, place = WORK / "sets" / spec["set"], WORK / "places" / name
    links = {part: source / part for part in ("params.yaml", "data")}
    if SYSTEMS.get(spec.get("system", "memgpt")) is memgpt:
        links["models/base"] = start(spec.get("core", CORE))
    if spec.get("kind") == "forgetting":
        links["models/multitask"] = WORK / "places" / spec["after"][0] / "models/multitask"
    (place / "models").mkdir(parents=True, exist_ok=True)
    for part, target in links.items():
        if not (place / part).is_symlink():
            (place / part).symlink_to(target)
    return place


def measure(name: str, spec: Spec) -> Spec:
    """Run a cell in this process and return its result."""
    place = settle(name, spec)
    with contextlib.chdir(place):
        result = KINDS[spec.get("kind", "compare")](name, spec, place / "tuned")
    shutil.rmtree(place / "tuned" if spec.get("kind") == "joint" else place, ignore_errors=True)
    return result


def run(name: str, spec: Spec) -> None:
    """Run a cell in this process and write its JSON."""
    torch.set_num_threads(1)
    atomic.write_json(RESULTS / f"{name}.json", {"spec": spec, **measure(name, spec)})


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]))
