"""How hard is the newsroom? Measures floors and ceiling of each task; exits with 1 if a bound on its difficulty is
violated.

    python benchmarks/newsroom.py [--scale 1] [--seed 7]

A floor is the score of a method without understanding: the most frequent answer, looking up answers, counting words.
The ceiling is an oracle that reads the generator's hidden state and fails only on noise. The data is synthetic, so
neither these numbers nor a model's scores on it are quality results. With scale 1 and seed 7 the table is written to
benchmarks/results/newsroom.json.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from seqeval.metrics import f1_score as entity_f1
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from memgpt.atomic import write_json
from memgpt.newsroom.tables import LABELS, Newsroom, Tables, assemble

RESULTS = Path(__file__).parent / "results" / "newsroom.json"
TASKS = (("ner", "entity F1"), ("sentiment", "macro F1"), ("recommendation", "NDCG@10"))
Tags = list[list[str]]


# --- entity recognition


def ner_floors(room: Newsroom) -> dict[str, float]:
    """Entity F1 on the test split."""
    train, validation, test = (room.tables["ner"][split] for split in ("train", "validation", "test"))
    gold = test["tags"].tolist()
    mentions = _mentions(train)
    commonest = Counter(kind for counts in mentions.values() for kind in sorted(counts.elements())).most_common(1)[0][0]
    return {
        "majority": float(entity_f1(gold, [_capitals(tokens, commonest) for tokens in test["tokens"]])),
        "lookup": float(entity_f1(gold, [_look_up(tokens, mentions) for tokens in test["tokens"]])),
        "bag_of_words": float(entity_f1(gold, _window_model(train, validation, test))),
        "oracle": float(entity_f1(gold, [list(sentence.tags) for sentence in room.ner["test"]])),
    }


def _mentions(train: pd.DataFrame) -> dict[tuple[str, ...], Counter[str]]:
    """Mention → how often it has which type."""
    found: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for tokens, tags in zip(train["tokens"], train["tags"], strict=True):
        start = 0
        while start < len(tags):
            end = start + 1
            if tags[start] != "O":
                while end < len(tags) and tags[end][0] == "I":
                    end += 1
                found[tuple(tokens[start:end])][tags[start][2:]] += 1
            start = end
    return found


def _look_up(tokens: list[str], mentions: dict[tuple[str, ...], Counter[str]]) -> list[str]:
    """Tags of the longest matching train mentions, with their most frequent types."""
    longest = max(map(len, mentions))
    tags = ["O"] * len(tokens)
    start = 0
    while start < len(tokens):
        for end in range(min(len(tokens), start + longest), start, -1):
            counts = mentions.get(tuple(tokens[start:end]))
            if counts:
                kind = max(sorted(counts), key=lambda kind: counts[kind])
                tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
                start = end - 1
                break
        start += 1
    return tags


def _capitals(tokens: list[str], kind: str) -> list[str]:
    """Tags in which every run of capitalised words is an entity of type `kind`."""
    tags: list[str] = []
    for token in tokens:
        inside = bool(tags) and tags[-1] != "O"
        tags.append(f"{'I' if inside else 'B'}-{kind}" if token[0].isupper() else "O")
    return tags


def _window_model(train: pd.DataFrame, validation: pd.DataFrame, test: pd.DataFrame) -> Tags:
    """Tags by logistic regression on each word and the unordered words up to two positions away."""

    def features(frame: pd.DataFrame) -> list[dict[str, bool]]:
        out = []
        for tokens in frame["tokens"]:
            padded = ["^", "^", *tokens, "$", "$"]
            for i, token in enumerate(tokens):
                near = {f"near {word}": True for word in (*padded[i : i + 2], *padded[i + 3 : i + 5])}
                out.append({f"is {token}": True, "capital": token[0].isupper(), "first": i == 0, **near})
        return out

    target = [tag for tags in train["tags"] for tag in tags]
    inputs, candidates = features(train), []
    for c in (1.0, 10.0):
        model = make_pipeline(DictVectorizer(), LogisticRegression(C=c, max_iter=200)).fit(inputs, target)
        score = entity_f1(validation["tags"].tolist(), _lines(model.predict(features(validation)), validation))
        candidates.append((score, c, model))
    best = max(candidates, key=lambda candidate: candidate[:2])[2]
    return _lines(best.predict(features(test)), test)


def _lines(flat: Iterable[str], frame: pd.DataFrame) -> Tags:
    rest = iter(flat)
    return [[str(next(rest)) for _ in tokens] for tokens in frame["tokens"]]


# --- sentiment


def sentiment_floors(room: Newsroom) -> dict[str, float]:
    """Macro F1 on the test split."""
    train, validation, test = (room.tables["sentiment"][split] for split in ("train", "validation", "test"))
    gold = test["label"]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train_x = vectorizer.fit_transform(train["text"])
    validation_x, test_x = vectorizer.transform(validation["text"]), vectorizer.transform(test["text"])
    candidates = []
    for c in (0.3, 1.0, 3.0, 10.0, 30.0):
        model = LogisticRegression(C=c, max_iter=1000).fit(train_x, train["label"])
        candidates.append((_macro(validation["label"], model.predict(validation_x)), -c, model))
    best = max(candidates, key=lambda candidate: candidate[:2])[2]
    nearest = np.asarray((test_x @ train_x.T).argmax(axis=1)).ravel()
    return {
        "majority": _macro(gold, [train["label"].mode()[0]] * len(test)),
        "lookup": _macro(gold, train["label"].to_numpy()[nearest]),  # the label of the most similar train text
        "bag_of_words": _macro(gold, best.predict(test_x)),
        "oracle": _macro(gold, [LABELS[event.mood] for event, _ in room.sentiment["test"]]),
    }


def _macro(gold: Any, predicted: Any) -> float:
    return float(f1_score(gold, predicted, average="macro", zero_division=0))


# --- recommendation


def recommendation_floors(room: Newsroom) -> dict[str, float]:
    """NDCG@10 of each reader's last click among all items that the reader has not read. The floors learn from all other
    clicks."""
    items = room.tables["recommendation"]["items"]
    place = {item: i for i, item in enumerate(items["item_id"])}
    ordered = room.tables["recommendation"]["interactions"].sort_values(
        ["user_id", "timestamp", "item_id"], kind="stable"
    )
    clicks = [[place[item] for item in group["item_id"]] for _, group in ordered.groupby("user_id", sort=True)]
    size = len(items)

    def knn(histories: list[list[int]], neighbours: int, recent: int) -> list[np.ndarray]:
        similar = _cosine(histories, size)
        for row in similar:
            row[np.argsort(-row, kind="stable")[neighbours:]] = 0
        return [similar[history[-recent:]].sum(axis=0) for history in histories]

    def judge(scores: list[np.ndarray], histories: list[list[int]], targets: list[int]) -> float:
        return float(
            np.mean(
                [
                    _gain(score, set(history), target)
                    for score, history, target in zip(scores, histories, targets, strict=True)
                ]
            )
        )

    earlier, validation = [history[:-2] for history in clicks], [history[-2] for history in clicks]
    before, test = [history[:-1] for history in clicks], [history[-1] for history in clicks]
    tried = [
        (judge(knn(earlier, neighbours, recent), earlier, validation), neighbours, recent)
        for neighbours in (5, 10, 20, 50, 100)
        for recent in (1, 3, 100)
    ]
    _, neighbours, recent = max(tried)
    counts = np.bincount([item for history in before for item in history], minlength=size).astype(float)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(
        items["title"] + " " + items["description"]
    )
    alike = (words @ words.T).toarray()
    oracle = [np.array(room.archive.probabilities(reader)) for reader in room.archive.readers]
    return {
        "majority": judge([counts] * len(clicks), before, test),  # the most popular items
        "lookup": judge(knn(before, neighbours, recent), before, test),  # item-kNN
        "bag_of_words": judge([alike[history[-1]] for history in before], before, test),  # texts like the last one's
        "oracle": judge(oracle, before, test),
        "cold_share": float(
            np.mean([target not in {item for history in earlier for item in history} for target in test])
        ),
    }


def _cosine(histories: list[list[int]], size: int) -> np.ndarray:
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    table = csr_matrix(
        (np.ones(len(rows)), (rows, [item for history in histories for item in history])), (len(histories), size)
    )
    together = (table.T @ table).toarray()
    norm = np.sqrt(np.maximum(together.diagonal(), 1))
    np.fill_diagonal(together, 0)
    return together / norm[:, None] / norm[None, :]


def _gain(score: np.ndarray, read: set[int], target: int) -> float:
    """NDCG@10 with one correct item; ties are broken by the items' order, which carries no information."""
    score = score.copy()
    score[list(read)] = -np.inf
    rank = int((score > score[target]).sum() + (score[:target] == score[target]).sum())
    return float(1 / np.log2(rank + 2)) if rank < 10 else 0.0


# --- can the test split be told from train, and does the corpus contain it?


def split_auc(train: list[str], test: list[str]) -> float:
    """AUC of character n-grams in telling test from train texts (0.5: not at all). Names must already be masked."""
    texts, target = train + test, np.array([0] * len(train) + [1] * len(test))
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
        LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced", solver="liblinear"),
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(roc_auc_score(target, cross_val_predict(model, texts, target, cv=folds, method="decision_function")))


def masked(room: Newsroom, task: str, split: str) -> list[str]:
    if task == "ner":
        return [sentence.masked for sentence in room.ner[split]]
    return [sentence.masked for _, sentence in room.sentiment[split]]


def corpus_loss(room: Newsroom) -> float:
    """Share of the corpus's words in paragraphs that contain a held-out text of a task or have 13 consecutive words in
    common with one."""
    held: list[list[str]] = []
    for split in ("validation", "test"):
        held += [_words(" ".join(tokens)) for tokens in room.tables["ner"][split]["tokens"]]
        held += [_words(text) for text in room.tables["sentiment"][split]["text"]]
    items = room.tables["recommendation"]["items"]
    held += [_words(text) for text in items["title"] + ". " + items["description"]]
    grams = {tuple(words[i : i + 13]) for words in held for i in range(len(words) - 12)}
    whole = {tuple(words) for words in held if len(words) < 13}
    sizes = sorted({len(words) for words in whole})
    lost = total = 0
    for text in room.tables["corpus"]["train"]["text"]:
        for paragraph in text.split("\n"):
            words = _words(paragraph)
            total += len(words)
            pieces = ((size, grams if size == 13 else whole) for size in (*sizes, 13))
            if any(tuple(words[i : i + size]) in known for size, known in pieces for i in range(len(words) - size + 1)):
                lost += len(words)
    return lost / total


def _words(text: str) -> list[str]:
    return re.findall(r"[\w&-]+", text.lower())


def digest(tables: Tables) -> str:
    """sha256 of all values; it changes if the generator's output changes."""
    values = {
        source: {split: frame.to_dict("list") for split, frame in splits.items()} for source, splits in tables.items()
    }
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


# --- the bounds


def measure(room: Newsroom) -> dict[str, Any]:
    ner, sentiment, recommendation = ner_floors(room), sentiment_floors(room), recommendation_floors(room)
    floors = {"ner": ner, "sentiment": sentiment, "recommendation": recommendation}
    seen = set(_mentions(room.tables["ner"]["train"]))
    test_mentions = _mentions(room.tables["ner"]["test"])
    types = _mentions(room.tables["ner"]["train"])
    facts = {
        "ner_auc": split_auc(masked(room, "ner", "train"), masked(room, "ner", "test")),
        "sentiment_auc": split_auc(masked(room, "sentiment", "train"), masked(room, "sentiment", "test")),
        "corpus_loss": corpus_loss(room),
        "corpus_words": sum(len(text.split()) for frame in room.tables["corpus"].values() for text in frame["text"]),
        "unseen_mentions": sum(n.total() for mention, n in test_mentions.items() if mention not in seen)
        / sum(n.total() for n in test_mentions.values()),
        "ambiguous_mentions": sum(n.total() for n in types.values() if n.most_common(1)[0][1] < 0.9 * n.total())
        / sum(n.total() for n in types.values()),
        "rarest_label": float(room.tables["sentiment"]["train"]["label"].value_counts(normalize=True).min()),
    }
    return {"floors": floors, "facts": facts, "bounds": bounds(floors, facts)}


def bounds(floors: dict[str, dict[str, float]], facts: dict[str, float]) -> dict[str, bool]:
    ner, sentiment, recommendation = floors["ner"], floors["sentiment"], floors["recommendation"]
    return {
        "ner: lookup at most 0.6 of the oracle": ner["lookup"] <= 0.6 * ner["oracle"],
        "ner: oracle between 0.85 and 0.99": 0.85 <= ner["oracle"] <= 0.99,
        "sentiment: bag of words at least 10 points under the oracle": sentiment["bag_of_words"]
        <= sentiment["oracle"] - 0.1,
        "sentiment: lookup at least 10 points under the oracle": sentiment["lookup"] <= sentiment["oracle"] - 0.1,
        "sentiment: oracle between 0.85 and 0.99": 0.85 <= sentiment["oracle"] <= 0.99,
        "sentiment: every label at least 20 %": facts["rarest_label"] >= 0.2,
        "recommendation: popularity at most 0.7 of the oracle": recommendation["majority"]
        <= 0.7 * recommendation["oracle"],
        "recommendation: item-kNN at most 0.7 of the oracle": recommendation["lookup"]
        <= 0.7 * recommendation["oracle"],
        "recommendation: oracle between 0.3 and 0.7": 0.3 <= recommendation["oracle"] <= 0.7,
        "ner: character n-grams do not tell test from train": facts["ner_auc"] < 0.6,
        "sentiment: character n-grams do not tell test from train": facts["sentiment_auc"] < 0.6,
        "corpus: less than 5 % overlaps with held-out texts": facts["corpus_loss"] < 0.05,
        "majority at most half of the oracle": all(
            floor["majority"] <= 0.5 * floor["oracle"] for floor in floors.values()
        ),
        "there is something to look up and to count": (
            ner["lookup"] > 0.05
            and sentiment["bag_of_words"] > sentiment["majority"] + 0.1
            and recommendation["lookup"] > recommendation["majority"] + 0.02
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    room = assemble(arguments.scale, arguments.seed)
    result = measure(room)
    columns = ("majority", "lookup", "bag_of_words", "oracle")
    print("The newsroom is synthetic: none of these numbers is a quality result.\n")
    print(f"{'':26}" + "".join(f"{column:>14}" for column in columns))
    for task, metric in TASKS:
        print(f"{task + ', ' + metric:26}" + "".join(f"{result['floors'][task][column]:14.3f}" for column in columns))
    print()
    for name, value in result["facts"].items():
        print(f"{name:26}{value:14.3f}")
    print()
    for bound, holds in result["bounds"].items():
        print(f"{'holds' if holds else 'BROKEN':8}{bound}")
    if (arguments.scale, arguments.seed) == (1.0, 7):
        write_json(
            RESULTS, {"synthetic": True, "scale": 1.0, "seed": 7, "sha256": digest(room.tables), **_rounded(result)}
        )
    return 0 if all(result["bounds"].values()) else 1


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
