"""tokenize: train the tokenizer (or take the one of `pretrain.init`) and write the corpus as token ids.

Reads data/tables/*; writes models/tokenizer and data/tokens. Per split these are `<split>.npy`, the ids of all
documents in one row, each starting with the end token, and `<split>_starts.npy`, the index where each document begins.
"""

import hashlib
import heapq
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgpt import atomic
from memgpt.config import TABLES, Config
from memgpt.errors import UserError, existing
from memgpt.model import MemGPTTokenizer
from memgpt.overlap import HeldOut, clean

TOKENIZER, TOKENS = Path("models/tokenizer"), Path("data/tokens")
_BATCH = 256  # documents


def run(config: Config) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # uses all cores; the ids are the same
    held_out = HeldOut(_held_out_texts())
    splits = {}
    removed = 0
    for split in ("train", "validation"):
        cleaned, count = clean(_column("corpus", split, "text"), held_out)
        splits[split] = [text for text in cleaned if text]
        removed += count
    tokenizer = _tokenizer(config, splits["train"])
    with atomic.replacing(TOKENIZER) as directory:
        tokenizer.save_pretrained(directory)
    counts = {}
    with atomic.replacing(TOKENS) as directory:
        directory.mkdir()
        for split, texts in splits.items():
            ids, starts = _encode(tokenizer, texts, split)
            counts[split] = len(ids)
            np.save(directory / f"{split}.npy", ids)
            np.save(directory / f"{split}_starts.npy", starts)
        atomic.write_json(
            directory / "manifest.json",
            {
                "tokens": counts,
                "documents": {split: len(texts) for split, texts in splits.items()},
                "bytes": {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()},
                "removed_paragraphs": removed,
            },
        )
    return {"train_tokens": counts["train"], "validation_tokens": counts["validation"], "removed_paragraphs": removed}


def _column(source: str, split: str, name: str) -> list[Any]:
    return pq.read_table(existing(TABLES / source / f"{split}.parquet"), columns=[name])[name].to_pylist()


def _held_out_texts() -> list[str]:
    """Validation and test texts of NER and sentiment; recommendation's items are known to the model by design."""
    texts = []
    for split in ("validation", "test"):
        texts += [" ".join(words) for words in _column("ner", split, "tokens")]
        texts += _column("sentiment", split, "text")
    return texts


def _tokenizer(config: Config, texts: list[str]) -> PreTrainedTokenizerFast:
    if config.pretrain.init is None:
        limit = config.tokenize.max_documents
        if len(texts) > limit:  # a sample, because a corpus may be sorted by source or time
            texts = heapq.nsmallest(limit, texts, key=lambda text: hashlib.sha256(text.encode()).digest())
        return MemGPTTokenizer.train(texts, config.tokenize.vocab_size, config.tokenize.min_frequency)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.pretrain.init)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"pretrain.init={config.pretrain.init}: no tokenizer to be had there ({reason}); "
            "name a model directory, or a hub id on a machine with network"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"pretrain.init={config.pretrain.init}: its tokenizer has no end token, which stands between documents; "
            "name a model that generates text"
        )
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all documents [N] in the smallest integer type that fits, start index of each document [documents])."""
    end = tokenizer.eos_token_id
    rows: list[np.ndarray] = []
    starts, total = [], 0
    for batch in tqdm(list(_batches(texts)), desc=f"tokenize {split}", unit="batch", leave=False, disable=None):
        for ids in tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]:
            starts.append(total)
            rows.append(np.asarray([end, *ids]))
            total += len(ids) + 1
    kind = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max else np.uint32
    return np.concatenate(rows).astype(kind) if rows else np.zeros(0, kind), np.asarray(starts, dtype=np.int64)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(texts), _BATCH):
        yield texts[first : first + _BATCH]
