"""Named-entity recognition: tagged sentences → features, span F1, and a gazetteer as baseline."""

from collections import Counter, defaultdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt import bootstrap
from memgpt.predict.words import best_path, encode_words, joined_words, spans_from_tags, windows
from memgpt.tasks import by_length, manifest, metric_names, rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForTokenClassification

PRIMARY = "f1"
PICTURE = ("actual", "predicted")  # columns of `picture`
_STRENGTH = 10.0  # inverse regularisation of the linear model behind word votes
_RESAMPLES = 1000  # for the interval of the gain by `outside_bias`
_RARE = 2  # occurrences in train of a rare entity, at most


def labels(tables: Path) -> list[str]:
    """The BIO tags: O, then B- and I- of each type."""
    return ["O", *(f"{mark}-{kind}" for kind in manifest(tables, "ner")["labels"] for mark in "BI")]


def model(
    parent: Path,
    tables: Path,
    *,
    dropout: float,
    max_length: int,
    word_votes: int = 0,
    augment: dict[str, float] | None = None,
    seed: int = 0,
    **_: Any,
) -> "MemGPTForTokenClassification":
    from transformers import AutoTokenizer

    from memgpt.model import MemGPTForTokenClassification
    from memgpt.tasks import heads, votes

    tags = labels(tables)
    started = heads.start(
        MemGPTForTokenClassification,
        "ner",
        parent,
        id2label=dict(enumerate(tags)),
        label2id={tag: index for index, tag in enumerate(tags)},
        dropout=dropout,
        window=max_length,
        word_vote_rows=word_votes,
        word_vote_weight=0.0,
    )
    if started.word_votes is not None:
        tokenizer = AutoTokenizer.from_pretrained(parent)
        votes.fit(started, Training(tables, tokenizer, max_length=max_length, augment=augment, seed=seed), _STRENGTH)
    return started


class Training:
    """Sentences as subword ids; the first subword of a word carries its tag, the others −100. A sentence longer than
    `max_length` is split into windows."""

    def __init__(
        self,
        tables: Path,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        split: str = "train",
        augment: dict[str, float] | None = None,
        seed: int = 0,
        **_: Any,
    ):
        from memgpt import augmentation

        index = {tag: place for place, tag in enumerate(labels(tables))}
        self.pad = tokenizer.pad_token_id
        self.ids: list[list[int]] = []
        self.tags: list[list[int]] = []
        rows = [row for row in rows_of(tables, "ner", split) if row["tokens"]]
        thesaurus = partial(augmentation.neighbours, Path(tokenizer.name_or_path), tokenizer)
        for row in augmentation.ner(rows, seed, thesaurus, **augment or {}):
            pieces = encode_words(tokenizer, row["tokens"])
            for first, last in windows([len(piece) for piece in pieces], max_length):
                ids = [*chain.from_iterable(pieces[first:last])][:max_length]
                tags: list[int] = []
                for piece, tag in zip(pieces[first:last], row["tags"][first:last], strict=True):
                    tags += [index[tag]] + [-100] * (len(piece) - 1)
                self.ids.append(ids)
                self.tags.append(tags[:max_length])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def __getitem__(self, place: int) -> int:
        return place

    def collate(self, rows: list[int]) -> "dict[str, torch.Tensor]":
        import torch

        from memgpt.predict.batching import pad

        batch = pad([self.ids[i] for i in rows], self.pad)
        target = torch.full_like(batch["input_ids"], -100)
        for place, i in enumerate(rows):
            target[place, : len(self.tags[i])] = torch.tensor(self.tags[i])
        return {**batch, "labels": target}


def calibrate(
    model: "MemGPTForTokenClassification", tokenizer: "PreTrainedTokenizerFast", tables: Path, max_length: int
) -> dict[str, float]:
    """Fit the votes' weight, the temperature and the bias against "outside" on validation, set and return them."""
    from memgpt.predict.ner import word_scores
    from memgpt.tasks import votes

    found = votes.weigh(model, Training(tables, tokenizer, max_length=max_length, split="validation"))[0]
    rows, tags = rows_of(tables, "ner", "validation"), labels(tables)
    rows = [row for row in rows if row["tokens"]]
    scores = word_scores(model, tokenizer, [row["tokens"] for row in rows])
    bias = fit_outside_bias(scores, [row["tags"] for row in rows], tags)
    found["outside_bias"] = model.config.outside_bias = bias
    return found


def fit_outside_bias(scores: list[np.ndarray], gold: list[list[str]], tags: list[str]) -> float:
    """Log-probabilities [words, L] of texts and their gold tags → the bias for `best_path` that about maximises F1; 0
    if its gain is not significant (paired bootstrap, 95 %), since a bias affects every text that is ever read.

    The most likely tags do not give the best F1. If the best F1 is F, predicting an entity pays from a probability of
    F / 2 on (Lipton et al. 2014, arXiv 1402.1892), hence with a bias of log((2 - F) / F). The F reached with this bias
    must be F again, so it is found by fixed-point iteration. The bias is at most 3, for an F1 near zero.
    """
    there = [set(spans_from_tags(row)) for row in gold]

    def counts(bias: float) -> np.ndarray:
        told = [{*spans_from_tags([tags[i] for i in best_path(row, tags, bias)])} for row in scores]
        rows = [[len(a & b), len(b), len(a)] for a, b in zip(there, told, strict=True)]
        return np.array(rows, dtype=np.float64)

    bias, reached = 0.0, (unbiased := counts(0.0))
    for _ in range(20):
        f1 = float(score(reached.sum(0)))
        before, bias = bias, min(3.0, round(float(np.log((2 - f1) / max(f1, 1e-9))), 4))
        if abs(bias - before) < 0.01:
            break
        reached = counts(bias)
    return bias if bootstrap.paired(reached, unbiased, score, _RESAMPLES, 1)[1] > 0 else 0.0


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    return [{"input": row["tokens"], "tags": row["tags"]} for row in rows_of(tables, "ner", split) if row["tokens"]]


def statistics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> np.ndarray:
    """Per sentence: number of correct spans, of predicted spans, and of gold spans."""
    counts = []
    for row, prediction in zip(rows, predictions, strict=True):
        gold, found = _gold(row), {(p["type"], p["start"], p["end"]) for p in prediction}
        counts.append([len(gold & found), len(found), len(gold)])
    return np.array(counts, dtype=np.float64)


def score(sums: np.ndarray) -> np.ndarray:
    """Micro F1 of whole spans."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def metrics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> dict[str, float]:
    """seqeval's strict report: micro precision, recall and F1, macro F1, F1 per type."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    gold = [row["tags"] for row in rows]
    report = classification_report(
        gold,
        predicted_tags([row["input"] for row in rows], predictions),
        mode="strict",
        scheme=IOB2,
        output_dict=True,
        zero_division=0,
    )
    result = {
        PRIMARY: float(score(statistics(rows, predictions).sum(0))),
        "precision": float(report["micro avg"]["precision"]),
        "recall": float(report["micro avg"]["recall"]),
        "macro_f1": float(np.nan_to_num(report["macro avg"]["f1-score"])),  # NaN where there is no entity at all
    }
    kinds = [kind for kind in report if not kind.endswith(" avg")]
    for kind, name in zip(kinds, metric_names(kinds), strict=True):
        result[f"f1_{name}"] = float(report[kind]["f1-score"])
    return result


def baseline(tables: Path, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A gazetteer: the longest word sequence that was an entity in train, with its most frequent type there."""
    types: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows_of(tables, "ner", "train"):
        for kind, first, last in spans_from_tags(row["tags"]):
            types[tuple(row["tokens"][first:last])][kind] += 1
    longest = max(map(len, types), default=0)
    predictions = []
    for row in rows:
        words, spans, found, place = row["input"], joined_words(row["input"]), [], 0
        while place < len(words):
            for size in range(min(longest, len(words) - place), 0, -1):
                if (mention := tuple(words[place : place + size])) in types:
                    kind = min(types[mention], key=lambda k: (-types[mention][k], k))
                    start, end = spans[place][0], spans[place + size - 1][1]
                    found.append({"text": " ".join(mention), "type": kind, "score": 1.0, "start": start, "end": end})
                    place += size
                    break
            else:
                place += 1
        predictions.append(found)
    return predictions


def slices(rows: list[dict[str, Any]], tables: Path) -> dict[str, np.ndarray]:
    """unseen, rare: sentences with an entity whose words were never, or once or twice, an entity in train. short,
    long: by number of words."""
    known: Counter[tuple[str, ...]] = Counter()
    for row in rows_of(tables, "ner", "train"):
        known.update(tuple(row["tokens"][first:last]) for _, first, last in spans_from_tags(row["tags"]))
    seen = [[known[tuple(row["input"][a:b])] for _, a, b in spans_from_tags(row["tags"])] for row in rows]
    return {
        "unseen": np.array([0 in counts for counts in seen], dtype=bool),
        "rare": np.array([any(0 < count <= _RARE for count in counts) for counts in seen], dtype=bool),
        **by_length([len(row["input"]) for row in rows]),
    }


def picture(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Actual against predicted tag type, word by word, where either is an entity."""
    table = []
    for row, tags in zip(rows, predicted_tags([row["input"] for row in rows], predictions), strict=True):
        for actual, predicted in zip(row["tags"], tags, strict=True):
            if actual != "O" or predicted != "O":
                table.append({"actual": actual[2:] or "O", "predicted": predicted[2:] or "O"})
    return table


def _gold(row: dict[str, Any]) -> set[tuple[str, int, int]]:
    places = joined_words(row["input"])
    return {(kind, places[first][0], places[last - 1][1]) for kind, first, last in spans_from_tags(row["tags"])}


def predicted_tags(texts: list[list[str]], predictions: list[list[dict[str, Any]]]) -> list[list[str]]:
    """Predicted spans as BIO tags over the words of each text."""
    result = []
    for words, prediction in zip(texts, predictions, strict=True):
        places = joined_words(words)
        first = {start: index for index, (start, _) in enumerate(places)}
        last = {end: index for index, (_, end) in enumerate(places)}
        tags = ["O"] * len(places)
        for entity in prediction:
            begin, finish = first[entity["start"]], last[entity["end"]]
            tags[begin] = f"B-{entity['type']}"
            tags[begin + 1 : finish + 1] = [f"I-{entity['type']}"] * (finish - begin)
        result.append(tags)
    return result
