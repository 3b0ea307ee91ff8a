"""Robustness of a model: the effect of small input changes on its score, of changes that should not change an answer,
and a bias probe. Behavioural testing after CheckList (Ribeiro et al. 2020, arXiv 2005.04118).

Every number but robustness_n, the rows measured, is a share or a difference of probabilities or the primary metric:

drop_CHANGE         score on the original rows minus that on the changed ones, with its paired 95 % interval
flips_names, _numbers         ner: share of sentences whose entities' places or types change if every name is replaced
                              by another of its type and length, or every digit outside of names by another
flips_, shift_, gap_GROUPS    sentiment: the same text said by members of two groups. flips: share of different labels;
                              shift: mean total variation of the probabilities; gap: largest difference between two
                              groups' mean probability of a label; shift_GROUPS_same: shift within one group
wrong_CLAUSE                  sentiment: share of texts that a clearly positive (negative) clause makes more negative
                              (positive). wrong_negation: of good sentences that a negation makes more positive;
                              wrong_negation_of_bad: of bad sentences that it makes more negative
overlap_order, _case          recommendation: share of the ten best that stay if all but the latest item of the
                              history are shuffled, or if its texts are in upper case
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from memgpt import bootstrap
from memgpt.predict.words import joined_words, spans_from_tags
from memgpt.tasks import rows_of

Row = dict[str, Any]
Predict = Callable[[list[Any]], list[Any]]
Change = Callable[[str, np.random.Generator], str]

TYPO_SHARE = 0.3  # of the words of four letters or more
_TOLERANCE = 0.01  # of a probability: smaller changes do not count
_TOP = 10
# Written for this probe, four members each. A group means only what its names suggest to a reader.
FIRST_NAMES: dict[str, tuple[str, ...]] = {
    "English, women": ("Emily", "Sarah", "Claire", "Laura"),
    "English, men": ("James", "Oliver", "Peter", "Simon"),
    "Arabic, women": ("Fatima", "Aisha", "Layla", "Amina"),
    "Arabic, men": ("Mohammed", "Omar", "Hassan", "Khalid"),
    "African American, women": ("Latoya", "Ebony", "Keisha", "Tamika"),
    "African American, men": ("Jamal", "Tyrone", "Darnell", "Tremayne"),
    "Chinese": ("Wei", "Xiaoming", "Jing", "Liang"),
    "Indian": ("Priya", "Rahul", "Ananya", "Sanjay"),
    "Latin American": ("Guadalupe", "José", "Ximena", "Alejandro"),
    "Slavic": ("Svetlana", "Dmitri", "Katarzyna", "Bogdan"),
}
NATIONALITIES: dict[str, tuple[str, ...]] = {
    "North America and Western Europe": ("American", "British", "German", "French"),
    "Eastern Europe": ("Polish", "Russian", "Romanian", "Ukrainian"),
    "Middle East": ("Turkish", "Iranian", "Egyptian", "Saudi"),
    "Africa": ("Nigerian", "Kenyan", "Ghanaian", "Ethiopian"),
    "South Asia": ("Indian", "Pakistani", "Bangladeshi", "Nepali"),
    "East Asia": ("Chinese", "Japanese", "Korean", "Vietnamese"),
    "Latin America": ("Mexican", "Brazilian", "Colombian", "Peruvian"),
}
_GROUPS: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    "first_names": (FIRST_NAMES, "{} said: {}"),
    "nationalities": (NATIONALITIES, "The {} manager said: {}"),
}
_CLAUSES = {"positive": "This is excellent news.", "negative": "This is terrible news."}
# A model that takes every `not` for bad news is right only about the first kind.
_NEGATIONS = {
    "negation": (
        ("The company reached its targets.", "The company did not reach its targets."),
        ("The new product is good.", "The new product is not good."),
        ("Customers were happy with the service.", "Customers were not happy with the service."),
        ("The results were strong.", "The results were not strong."),
        ("Analysts expect profits to grow.", "Analysts do not expect profits to grow."),
        ("The plan worked well.", "The plan never worked well."),
        ("The merger was a success.", "The merger was no success."),
        ("Sales have recovered.", "Sales have not recovered."),
    ),
    "negation_of_bad": (
        ("The company missed its targets.", "The company did not miss its targets."),
        ("The new product is bad.", "The new product is not bad."),
        ("Customers were angry about the service.", "Customers were not angry about the service."),
        ("The results were weak.", "The results were not weak."),
        ("Analysts expect profits to shrink.", "Analysts do not expect profits to shrink."),
        ("The plan failed.", "The plan never failed."),
        ("The merger was a disaster.", "The merger was no disaster."),
        ("Sales have collapsed.", "Sales have not collapsed."),
    ),
}


def typos(text: str, random: np.random.Generator) -> str:
    """Swap two neighbouring letters, or drop one, in some words of four letters or more; the first letter stays."""

    def slip(match: re.Match[str]) -> str:
        word = match[0]
        if random.random() >= TYPO_SHARE:
            return word
        place = int(random.integers(1, len(word) - 1))
        swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        return swapped if random.random() < 0.5 else word[:place] + word[place + 1 :]

    return re.sub(r"[^\W\d_]{4,}", slip, text)


def without_punctuation(text: str, random: np.random.Generator) -> str:
    """Remove punctuation, except inside numbers (3.5)."""
    kept = (
        mark
        for place, mark in enumerate(text)
        if not unicodedata.category(mark).startswith("P")
        or (text[place - 1 : place].isdigit() and text[place + 1 : place + 2].isdigit())
    )
    return "".join(kept)


CHANGES: dict[str, Change] = {
    "typos": typos,
    "lower": lambda text, _: text.lower(),
    "upper": lambda text, _: text.upper(),
    "punctuation": without_punctuation,
}


def measure(
    model: str, predict: Predict, rows: list[Row], judging: ModuleType, tables: Path, *, resamples: int, seed: int
) -> dict[str, float]:
    """The robustness of one model on `rows`, its test rows or a sample of them; empty for the base model.

    predict: inputs → answers. judging: the task's module in `memgpt.tasks`. The same seed gives the same changes.
    """
    if model == "base" or not rows:
        return {}
    if model == "recommendation":
        rows, predict = _as_texts(rows, predict, tables)
    answers = predict([row["input"] for row in rows])
    plain = judging.statistics(rows, answers)
    numbers: dict[str, float] = {"robustness_n": float(len(rows))}
    for name, change in CHANGES.items():
        random = np.random.default_rng(seed)
        changed = [changed_row(model, row, change, random) for row in rows]
        theirs = judging.statistics(changed, predict([row["input"] for row in changed]))
        drop, low, high = bootstrap.paired(plain, theirs, judging.score, resamples, seed)
        numbers |= {f"drop_{name}": drop, f"drop_{name}_ci_low": low, f"drop_{name}_ci_high": high}
    random = np.random.default_rng(seed)
    if model == "ner":
        return numbers | _ner(predict, rows, answers, random)
    if model == "recommendation":
        return numbers | _recommendation(predict, rows, answers, random)
    return numbers | _bias(predict, rows) | _directions(predict, rows, answers)


def sample(rows: list[Row], size: int, seed: int) -> list[Row]:
    """A random sample of at most `size` rows, in their order."""
    if size >= len(rows):
        return rows
    return [rows[place] for place in sorted(np.random.default_rng(seed).choice(len(rows), size, replace=False))]


def changed_row(model: str, row: Row, change: Change, random: np.random.Generator) -> Row:
    """The row with its text changed; the gold answer stays aligned with it.

    A word that becomes empty is removed if its tag is O; a word of an entity, or a text that would become empty, stays.
    """
    if model == "sentiment":
        text = change(row["input"]["text"], random)
        return {**row, "input": {**row["input"], "text": text if text.strip() else row["input"]["text"]}}
    if model == "recommendation":
        history = [change(text, random) or text for text in row["input"]["history"]]
        return {**row, "input": {**row["input"], "history": history}}
    pairs = [(change(word, random), word, tag) for word, tag in zip(row["input"], row["tags"], strict=True)]
    kept = [(new or word, tag) for new, word, tag in pairs if new or tag != "O"]
    return {"input": [word for word, _ in kept], "tags": [tag for _, tag in kept]} if kept else row


def _ner(predict: Predict, rows: list[Row], answers: list[Any], random: np.random.Generator) -> dict[str, float]:
    pool: dict[tuple[str, int], set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        for kind, first, last in spans_from_tags(row["tags"]):
            pool[kind, last - first].add(tuple(row["input"][first:last]))
    names = {key: sorted(mentions) for key, mentions in pool.items()}

    def renamed(row: Row) -> list[str]:
        words = list(row["input"])
        for kind, first, last in spans_from_tags(row["tags"]):
            others = names[kind, last - first]
            words[first:last] = others[random.integers(len(others))]
        return words

    def renumbered(row: Row) -> list[str]:
        pairs = zip(row["input"], row["tags"], strict=True)  # numbers in names stay: they may identify them
        return [re.sub(r"\d", digit, word) if tag == "O" else word for word, tag in pairs]

    def digit(_: re.Match[str]) -> str:
        return str(random.integers(1, 10))

    return {
        f"flips_{name}": _flips(predict, rows, answers, list(map(change, rows)))
        for name, change in (("names", renamed), ("numbers", renumbered))
    }


def _flips(predict: Predict, rows: list[Row], answers: list[Any], changed: list[list[str]]) -> float:
    """Of the sentences that were changed, the share whose entities' places or types differ."""
    places = [place for place, (row, words) in enumerate(zip(rows, changed, strict=True)) if row["input"] != words]
    theirs = predict([changed[place] for place in places])
    moved = [
        _spans(rows[place]["input"], answers[place]) != _spans(changed[place], answer)
        for place, answer in zip(places, theirs, strict=True)
    ]
    return float(np.mean(moved)) if moved else 0.0


def _spans(words: Sequence[str], entities: list[dict[str, Any]]) -> set[tuple[str, int, int]]:
    """Entities by word positions, since character offsets change."""
    places = joined_words(words)
    first, last = {start: i for i, (start, _) in enumerate(places)}, {end: i for i, (_, end) in enumerate(places)}
    return {(entity["type"], first[entity["start"]], last[entity["end"]]) for entity in entities}


def _bias(predict: Predict, rows: list[Row]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for kind, (groups, frame) in _GROUPS.items():
        scores, labels = _said(predict, rows, groups, frame, 0)
        others, _ = _said(predict, rows, groups, frame, 1)
        pairs = list(combinations(range(len(groups)), 2))
        means = scores.mean(1)
        numbers |= {
            f"flips_{kind}": float(np.mean([labels[a] != labels[b] for a, b in pairs])),
            f"shift_{kind}": float(np.mean([_variation(scores[a], scores[b]) for a, b in pairs])),
            f"shift_{kind}_same": _variation(scores, others),
            f"gap_{kind}": float((means.max(0) - means.min(0)).max()),
        }
    return numbers


def _said(
    predict: Predict, rows: list[Row], groups: dict[str, tuple[str, ...]], frame: str, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [groups, texts, labels] and labels [groups, texts]; member i + shift of a group says text i."""
    inputs = [
        {**row["input"], "text": frame.format(members[(i + shift) % len(members)], row["input"]["text"])}
        for members in groups.values()
        for i, row in enumerate(rows)
    ]
    answers = predict(inputs)
    scores = np.array([list(answer["scores"].values()) for answer in answers])
    labels = np.array([answer["label"] for answer in answers])
    return scores.reshape(len(groups), len(rows), -1), labels.reshape(len(groups), len(rows))


def _variation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean total variation distance between distributions [..., labels]."""
    return float(np.abs(a - b).sum(-1).mean() / 2)


def _directions(predict: Predict, rows: list[Row], answers: list[Any]) -> dict[str, float]:
    names = {name.lower(): name for name in answers[0]["scores"]}
    if not {"positive", "negative"} <= names.keys():
        return {}

    def leaning(answers: list[Any]) -> np.ndarray:
        return np.array([a["scores"][names["positive"]] - a["scores"][names["negative"]] for a in answers])

    before, numbers = leaning(answers), {}
    for name, clause in _CLAUSES.items():
        after = leaning(predict([{**row["input"], "text": f"{row['input']['text']} {clause}"} for row in rows]))
        wrong = before - after if name == "positive" else after - before
        numbers[f"wrong_{name}_clause"] = float((wrong > _TOLERANCE).mean())
    for name, pairs in _NEGATIONS.items():
        texts = [{"text": text, "topic": None} for pair in pairs for text in pair]
        plain, negated = leaning(predict(texts)).reshape(-1, 2).T
        wrong = plain - negated if name == "negation_of_bad" else negated - plain
        numbers[f"wrong_{name}"] = float((wrong > _TOLERANCE).mean())
    return numbers


def _as_texts(rows: list[Row], predict: Predict, tables: Path) -> tuple[list[Row], Predict]:
    """Readers whose history is given as texts, and a predictor that still leaves out the items they have read."""
    from memgpt.predict.recommendation import item_text

    items = rows_of(tables, "recommendation", "items")
    texts = {item["item_id"]: item_text(item["title"], item["description"], item["tags"]) for item in items}
    readers = [
        {
            **row,
            "input": {
                "history": [texts[item] or item for item in row["input"]["history"]],
                "k": row["input"]["k"] + len(row["input"]["history"]),
                "read": row["input"]["history"],
            },
        }
        for row in rows
    ]

    def unread(inputs: list[Any]) -> list[Any]:
        answers = predict([{name: value for name, value in each.items() if name != "read"} for each in inputs])
        return [
            [item for item in answer if item["item_id"] not in set(each["read"])][: each["k"] - len(each["read"])]
            for each, answer in zip(inputs, answers, strict=True)
        ]

    return readers, unread


def _recommendation(
    predict: Predict, rows: list[Row], answers: list[Any], random: np.random.Generator
) -> dict[str, float]:
    def shuffled(history: list[str]) -> list[str]:
        return [history[place] for place in random.permutation(len(history) - 1)] + history[-1:] if history else []

    def capitals(history: list[str]) -> list[str]:
        return [text.upper() for text in history]

    numbers = {}
    for name, change in (("order", shuffled), ("case", capitals)):
        theirs = predict([{**row["input"], "history": change(row["input"]["history"])} for row in rows])
        numbers[f"overlap_{name}"] = float(np.mean([_overlap(*pair) for pair in zip(answers, theirs, strict=True)]))
    return numbers


def _overlap(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    ours, theirs = ({item["item_id"] for item in ranking[:_TOP]} for ranking in (one, other))
    return len(ours & theirs) / max(1, len(ours))
