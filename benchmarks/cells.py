"""One cell of the core benchmark: a model with a seed and a token budget, pretrained or fine-tuned, and its scores.

A cell uses MemGPT's training loop, so it resumes where it was stopped. It is not run again once its JSON exists.
"""

import gzip
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers
import torch
from product_key import ProductKeyMemory
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    set_seed,
)

from memgpt import atomic, config
from memgpt.config import Pretrain, Training
from memgpt.model import (
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
    canonical_ids,
)
from memgpt.model.kernels import multiplies_bfloat16
from memgpt.objectives import Pretraining, mask, next_token_loss
from memgpt.optimizers import clip_gradients, for_pretraining
from memgpt.predict.words import best_path
from memgpt.stages.pretrain import PackedTokens
from memgpt.training import AfterEpoch, train

WORK = Path(".memgpt/benchmarks/core")  # tokenised texts, weights and checkpoints; not in git
CELLS = Path(__file__).parent / "results" / "core"
VALIDATION_ROWS = 640
# Settings that override those of `pretrain` in params.yaml.
RECIPE = dict(
    init=None,
    update="all",
    sequence_length=peers.CONTEXT,
    batch_size=16,
    learning_rate=2e-3,
    matrix_learning_rate=2e-2,
    memory_learning_rate=3e-2,
    weight_decay=0.02,
    warmup_fraction=0.05,
    decay_fraction=0.3,
    masked_share_start=0.0,
    masked_share_end=0.0,
    mask_fraction=0.3,
    z_loss=0.0,
    compile=True,
    checkpoint_steps=200,
)
TUNING = dict(
    batch_size=32,
    learning_rate=1e-3,
    memory_learning_rate=1e-4,
    weight_decay=0.01,
    warmup_fraction=0.1,
    decay_fraction=1.0,
    checkpoint_steps=1000,
)


# --- texts


def prepare(source: Path) -> None:
    """Tokenise the shared text once: train (documents shuffled), its validation split, and that of WikiText-2."""
    if (WORK / "tokens/complete").exists():
        return
    shards = sorted((source / "text").glob("train-*.jsonl.gz"))
    if not shards:
        raise SystemExit(f"{source}/text: no train-*.jsonl.gz; set MEMGPT_REAL_DATA to the folder with the data sets")
    documents = [text for shard in shards for text in _texts(shard)]
    random.Random(0).shuffle(documents)
    tokenizer = MemGPTTokenizer.train(documents[: len(documents) // 4], peers.VOCABULARY)
    tokenizer.save_pretrained(WORK / "tokenizer")
    splits = {
        "train": documents,
        "validation": list(_texts(source / "text/validation.jsonl.gz")),
        "wikitext2": list(_texts(source / "text/wikitext2/validation.jsonl.gz")),
    }
    (WORK / "tokens").mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        ids: list[int] = []
        starts: list[int] = []
        for first in range(0, len(texts), 256):
            for encoded in tokenizer.backend_tokenizer.encode_batch(texts[first : first + 256]):
                starts.append(len(ids))
                ids += [tokenizer.eos_token_id, *encoded.ids]
        np.save(WORK / f"tokens/{split}.npy", np.asarray(ids, dtype=np.uint16))
        np.save(WORK / f"tokens/{split}_starts.npy", np.asarray(starts))
    (WORK / "tokens/complete").touch()


def _texts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


# --- models


def build(spec: dict[str, Any]) -> PreTrainedModel:
    """The model of a spec. kind: memgpt, llama or bert, with a width; or a MemGPT preset of kind memgpt or plain. For
    memgpt also: rows; changes to the configuration; ablations outside the configuration, gate=False and
    product_key=True (replaces the fourth feed-forward layer); least: memory_least of params.yaml; recall: the longest
    run that recall looks for, 0 for no recall."""
    set_seed(spec["seed"])
    if spec["kind"] == "llama":
        return peers.llama(spec["width"])
    if spec["kind"] == "bert":
        return peers.bert(spec["width"])
    if "preset" in spec:
        model = peers.preset(spec["preset"], memory=spec["kind"] == "memgpt")
    else:
        changes = {"recall_length": spec.get("recall", 0), **spec.get("changes", {})}
        model = peers.memgpt(spec["width"], spec["rows"], **changes)
    model.model.ngram_hash.canonical_ids.copy_(canonical_ids(_tokenizer()))
    if spec.get("least") and model.model.memory_table is not None:
        length = recipe(**spec.get("recipe", {})).sequence_length
        model.model.ngram_hash.claim(
            DataLoader(PackedTokens(WORK / "tokens", "train", length), batch_size=64), spec["least"]
        )
    if not spec.get("gate", True):
        for layer in model.model.layers:
            if layer.memory is not None:
                layer.memory.gate = lambda hidden, entry: 1.0
    if spec.get("product_key"):
        model.model.layers[3].mlp = ProductKeyMemory(spec["width"])
    return model


def _tokenizer() -> MemGPTTokenizer:
    return MemGPTTokenizer.from_pretrained(WORK / "tokenizer")


# --- pretraining


class _Masked:
    """BERT's objective on packed rows."""

    def __init__(self, params: Pretrain):
        self.params = params
        self.loss = torch.compile(_masked_loss, dynamic=False)

    def __call__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.params.seed * 1_000_003 + step)
        ids, positions = batch["input_ids"], batch["position_ids"]
        shown, labels = mask(ids, positions, self.params.mask_fraction, 2, peers.VOCABULARY, draw)
        return self.loss(model, shown.to(model.device), labels.to(model.device))


def _masked_loss(model: PreTrainedModel, shown: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=shown).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def recipe(**changes: Any) -> Pretrain:
    pipeline = config.load(Path(__file__).parents[1] / "params.yaml").pretrain.model_dump()
    return Pretrain(**{**pipeline, **RECIPE, **changes})


def pretrain(name: str, spec: dict[str, Any], go_on: AfterEpoch | None = None) -> dict[str, Any]:
    """Pretrain a cell. go_on: called at every checkpoint; if false, raises TimeoutError, and the next call resumes."""
    params = recipe(tokens=spec["tokens"], seed=spec["seed"], **spec.get("recipe", {}))
    steps = params.tokens // (params.batch_size * params.sequence_length)
    model = build(spec)
    data: Dataset = PackedTokens(WORK / "tokens", "train", params.sequence_length)
    if steps > (batches := len(data) // params.batch_size) > 0:
        # With several epochs: drop the smaller last batch, for which everything would be compiled again.
        data = Subset(data, range(batches * params.batch_size))
    masked = spec["kind"] == "bert"
    directory = WORK / "cells" / name
    directory.mkdir(parents=True, exist_ok=True)
    curve = directory / "curve.jsonl"  # a file, so that points logged before a stop are kept

    def log(numbers: dict[str, float], step: int) -> None:
        with curve.open("a") as lines:
            seen = step * params.batch_size * params.sequence_length
            lines.write(json.dumps([seen, numbers["loss"], time.time()]) + "\n")

    stopped_at = steps

    def ask(model: PreTrainedModel, step: int) -> bool:
        nonlocal stopped_at
        if go_on and step < steps and not go_on(model, step):
            stopped_at = step
        return stopped_at == steps

    train(
        model,
        data,
        default_collate,
        params,
        steps=steps,
        checkpoints=directory / "checkpoints",
        title=name,
        optimizer=for_pretraining(model, params),
        loss=_Masked(params) if masked else Pretraining(params, steps, peers.VOCABULARY, 2),
        log=log,
        epoch_steps=params.checkpoint_steps,
        after_epoch=ask if go_on else None,
    )
    if stopped_at < steps:
        raise TimeoutError(f"stopped at the checkpoint of step {stopped_at} of {steps}; the next call goes on from it")
    told = [json.loads(line) for line in curve.open()]
    result: dict[str, Any] = {
        "multiply_adds": peers.multiply_adds(model),
        "stored": model.num_parameters(),
        "curve": sorted({tokens: round(loss, 4) for tokens, loss, _ in told}.items()),
        # The median excludes time for compilation, checkpoints and stops.
        "tokens_per_second": round(median((b[0] - a[0]) / (b[2] - a[2]) for a, b in itertools.pairwise(told))),
    }
    if torch.cuda.is_available():
        model.to("cuda")
    for split in ("validation", "wikitext2"):
        result[split] = round(held_out(model, split, masked, params.seed), 4)
    model.save_pretrained(directory / "model")
    return result


@torch.no_grad()
def held_out(model: PreTrainedModel, split: str, masked: bool, seed: int) -> float:
    """Nats per predicted token on held-out rows; attention stays within documents, except that of BERT."""
    data = PackedTokens(WORK / "tokens", split, peers.CONTEXT)
    rows = Subset(data, range(min(VALIDATION_ROWS, len(data))))
    losses = []
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
        for step, batch in enumerate(DataLoader(rows, batch_size=16, drop_last=True)):
            batch = {name: values.to(device) for name, values in batch.items()}
            if masked:
                draw = torch.Generator().manual_seed(step)
                shown, labels = mask(batch["input_ids"], batch["position_ids"], 0.15, 2, peers.VOCABULARY, draw)
                losses.append(_masked_loss(model, shown, labels).item())
            else:
                ids, positions = batch["input_ids"], batch["position_ids"]
                losses.append(next_token_loss(model, ids, positions, batch["labels"], 0.0).item())
    return float(np.mean(losses))


def training_speed(spec: dict[str, Any], rounds: int = 12) -> dict[str, Any]:
    """Our training speed relative to the peer's; steps alternate, and the first ones, which compile, do not count."""
    params = recipe()
    data = PackedTokens(WORK / "tokens", "train", params.sequence_length)
    seconds: dict[str, list[float]] = {"memgpt": [], "llama": []}
    trained = {}
    for kind in seconds:
        model = build({**spec, "kind": kind, "seed": 1}).train()
        trained[kind] = model, for_pretraining(model, params), Pretraining(params, rounds, peers.VOCABULARY, 2)
    for step in range(3 + rounds):
        batch = default_collate([data[step * params.batch_size + row] for row in range(params.batch_size)])
        for kind, (model, optimizer, loss) in trained.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu"))):
                value = loss(model, batch, step)
            value.backward()
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[kind].append(time.perf_counter() - start)
    ratios = [peer / ours for peer, ours in zip(seconds["llama"][3:], seconds["memgpt"][3:], strict=True)]
    return {"tokens_per_second_ratio": round(float(np.median(ratios)), 4), "rounds": rounds}


# --- fine-tuning


class Examples(Dataset):
    """Texts as token ids, with a label per word (NER) or per text (sentiment)."""

    def __init__(self, rows: list[tuple[Any, Any]], labels: list[str], words: bool, length: int = 128):
        self.labels, self.words, self.rows = labels, words, rows
        tokenizer = _tokenizer()
        encoded = tokenizer([x for x, _ in rows], is_split_into_words=words, truncation=True, max_length=length)
        self.items = []
        for index, (_, gold) in enumerate(rows):
            ids = encoded["input_ids"][index]
            if words:
                target = [-100] * len(ids)
                places = encoded.word_ids(index)
                for position, word in enumerate(places):
                    if word is not None and (position == 0 or places[position - 1] != word):
                        target[position] = labels.index(gold[word])
            else:
                target = labels.index(gold)
            self.items.append((ids, target))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[list[int], Any]:
        return self.items[index]

    def collate(self, items: list[tuple[list[int], Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in items)
        pad = [longest - len(ids) for ids, _ in items]
        batch = {
            "input_ids": torch.tensor([[*ids, *[0] * n] for (ids, _), n in zip(items, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(items, pad, strict=True)]),
        }
        if self.words:
            batch["labels"] = torch.tensor([[*t, *[-100] * n] for (_, t), n in zip(items, pad, strict=True)])
        else:
            batch["labels"] = torch.tensor([target for _, target in items])
        return batch


def examples(task: str, source: Path) -> tuple[Examples, Examples]:
    """(train, held-out) examples. NER: WikiGold and SEC filings, with one tag set. Sentiment: Financial PhraseBank."""
    if task == "ner":
        folders = [source / "ner/wikigold", source / "ner/sec_filings"]
        train_rows = [row for folder in folders for row in _conll(folder / "train.conll")]
        test_rows = [
            row for folder in folders for split in ("dev", "test") for row in _conll(folder / f"{split}.conll")
        ]
        labels = sorted({tag for _, tags in train_rows + test_rows for tag in tags})
        return Examples(train_rows, labels, True), Examples(test_rows, labels, True)
    folder = source / "sentiment/financial_phrasebank"
    splits = {
        split: [(row["text"], row["label"]) for row in map(json.loads, (folder / f"{split}.jsonl").open())]
        for split in ("train", "dev", "test")
    }
    labels = ["negative", "neutral", "positive"]
    return Examples(splits["train"], labels, False), Examples(splits["dev"] + splits["test"], labels, False)


def _conll(path: Path) -> list[tuple[list[str], list[str]]]:
    rows = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        pairs = [line.split("\t") for line in block.splitlines()]
        rows.append(([word for word, _ in pairs], [tag for _, tag in pairs]))
    return rows


HEADS = {
    ("memgpt", "ner"): MemGPTForTokenClassification,
    ("memgpt", "sentiment"): MemGPTForSequenceClassification,
    ("llama", "ner"): LlamaForTokenClassification,
    ("llama", "sentiment"): LlamaForSequenceClassification,
    ("bert", "ner"): BertForTokenClassification,
    ("bert", "sentiment"): BertForSequenceClassification,
}


def finetune(name: str, spec: dict[str, Any], source: Path) -> dict[str, Any]:
    """Fine-tune the pretrained cell `spec["start"]` on a task, without dropout for any kind; scores the last step."""
    task = spec["task"]
    train_set, test_set = examples(task, source)
    set_seed(spec["seed"])
    model = HEADS[spec["kind"], task].from_pretrained(
        WORK / "cells" / spec["start"] / "model", num_labels=len(train_set.labels)
    )
    params = Training(**{**TUNING, "seed": spec["seed"], **spec.get("recipe", {})})
    steps = spec["epochs"] * math.ceil(len(train_set) / params.batch_size)
    directory = WORK / "cells" / name
    train(model, train_set, train_set.collate, params, steps=steps, checkpoints=directory, title=name)
    golds, guesses = predictions(model, test_set)
    return {"steps": steps, **score(task, golds, guesses)}


@torch.no_grad()
def predictions(model: PreTrainedModel, data: Examples) -> tuple[list[Any], list[Any]]:
    golds: list[Any] = []
    guesses: list[Any] = []
    for first in range(0, len(data), 64):
        batch = data.collate([data[i] for i in range(first, min(first + 64, len(data)))])
        labels = batch.pop("labels")
        scores = model(**batch).logits.float().log_softmax(-1)
        for gold, of_row in zip(labels, scores, strict=True):
            if data.words:
                kept = gold != -100
                golds.append([data.labels[i] for i in gold[kept]])
                guesses.append([data.labels[i] for i in best_path(of_row[kept].numpy(), data.labels)])
            else:
                golds.append(data.labels[gold])
                guesses.append(data.labels[of_row.argmax()])
    return golds, guesses


def score(task: str, golds: list[Any], guesses: list[Any]) -> dict[str, Any]:
    """Entity F1 (NER) or macro F1 (sentiment) with a 95 % bootstrap interval over examples."""

    def of(rows: np.ndarray) -> float:
        gold, guess = [golds[i] for i in rows], [guesses[i] for i in rows]
        if task == "ner":
            return float(entity_f1(gold, guess))
        return float(f1_score(gold, guess, average="macro"))

    draw = np.random.default_rng(0)
    sample = sorted(of(draw.integers(len(golds), size=len(golds))) for _ in range(100 if task == "ner" else 400))
    low, high = np.quantile(sample, [0.025, 0.975])
    return {"f1": round(of(np.arange(len(golds))), 4), "ci_low": round(low, 4), "ci_high": round(high, 4)}


def run(name: str, spec: dict[str, Any], source: Path) -> None:
    """Run a cell in this process and write its JSON."""
    torch.set_num_threads(spec.get("threads", 1))
    prepare(source)
    if "task" in spec:
        result = finetune(name, spec, source)
    else:
        result = training_speed(spec) if spec["kind"] == "speed" else pretrain(name, spec)
    CELLS.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available() and spec["kind"] != "speed"  # speed is measured on the CPU
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    atomic.write_json(CELLS / f"{name}.json", {"spec": spec, "device": device, **result})


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), Path(os.environ["MEMGPT_REAL_DATA"]))
