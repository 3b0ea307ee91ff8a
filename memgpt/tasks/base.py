"""Evaluating the base model: bits per byte of held-out text."""

from pathlib import Path
from typing import Any

import numpy as np

from memgpt.tasks import rows_of

PRIMARY = "neg_bits_per_byte"
PICTURE = ("bits_per_byte", "share")  # columns of `picture`
_DOCUMENTS, _CHARACTERS = 300, 2000  # enough for an interval of about one percent
_TRIGRAM_BYTES = 4_000_000


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    """The first documents of the split, truncated; a corpus without a test split is evaluated on validation."""
    if not (tables / "corpus" / f"{split}.parquet").exists():
        split = "validation"
    return [{"input": row["text"][:_CHARACTERS]} for row in rows_of(tables, "corpus", split)[:_DOCUMENTS]]


def statistics(rows: list[dict[str, Any]], predictions: list[dict[str, float]]) -> np.ndarray:
    """Per document: bits, bytes."""
    return np.array([[p["bits_per_byte"] * p["bytes"], p["bytes"]] for p in predictions], dtype=np.float64)


def score(sums: np.ndarray) -> np.ndarray:
    return -sums[..., 0] / np.maximum(sums[..., 1], 1)


def metrics(rows: list[dict[str, Any]], predictions: list[dict[str, float]]) -> dict[str, float]:
    nats, tokens = sum(p["nats"] for p in predictions), sum(p["tokens"] for p in predictions)
    value = float(score(statistics(rows, predictions).sum(0)))
    result = {PRIMARY: value, "bits_per_byte": -value}
    if tokens:
        result |= {"loss": nats / tokens, "perplexity": float(np.exp(nats / tokens))}
    return result


def baseline(tables: Path, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A trigram model over bytes, interpolated with its bigram and unigram."""
    text = bytearray()
    for row in rows_of(tables, "corpus", "train"):
        text += row["text"].encode() + b"\n"
        if len(text) > _TRIGRAM_BYTES:
            break
    train = np.frombuffer(bytes(text), dtype=np.uint8).astype(np.int64)
    counts = [np.bincount(_codes(train, n), minlength=256**n).astype(np.float32) for n in (1, 2, 3)]
    contexts = [np.array([counts[0].sum()]), counts[0], counts[1]]
    predictions = []
    for row in rows:
        data = row["input"].encode()
        ids = np.frombuffer(b"\n\n" + data, dtype=np.uint8).astype(np.int64)
        probability = np.full(len(data), 1 / 256)
        for n, (count, context) in enumerate(zip(counts, contexts, strict=True), start=1):
            codes = _codes(ids, n)[3 - n :]
            seen = context[codes // 256]
            # As in Witten-Bell smoothing, a longer context counts more, the more often it was seen.
            trust = seen / (seen + 5)
            probability = trust * count[codes] / np.maximum(seen, 1) + (1 - trust) * probability
        bits = float(-np.log2(probability).sum())
        predictions.append({"nats": 0.0, "tokens": 0, "bytes": len(data), "bits_per_byte": bits / max(1, len(data))})
    return predictions


def slices(rows: list[dict[str, Any]], tables: Path) -> dict[str, np.ndarray]:
    return {}


def picture(rows: list[dict[str, Any]], predictions: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Cumulative share of documents by bits per byte."""
    values = sorted(p["bits_per_byte"] for p in predictions)
    return [
        {"bits_per_byte": round(value, 4), "share": round((i + 1) / len(values), 4)} for i, value in enumerate(values)
    ]


def _codes(ids: np.ndarray, n: int) -> np.ndarray:
    """Each run of n bytes as one number."""
    codes = ids[: len(ids) - n + 1].copy()
    for step in range(1, n):
        codes = codes * 256 + ids[step : len(ids) - n + 1 + step]
    return codes
