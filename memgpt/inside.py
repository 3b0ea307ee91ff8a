"""A look inside a model's memory, for people: what `memgpt explain` and `memgpt usage` read and print."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from memgpt.errors import UserError
from memgpt.model import inspection

_CHUNK = 1 << 16  # tokens that are looked up at once
_BAR = 8  # characters of the loudest


def explain(directory: Path, text: str, as_json: bool) -> None:
    """Print the memory's part in each token of the text, read as the model in `directory` reads."""
    model = _load(directory)
    mode = "causal" if (model.config.architectures or [""])[0].endswith("CausalLM") else "bidirectional"
    try:
        records = inspection.explain(model, AutoTokenizer.from_pretrained(directory), text, mode)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None
    _print(records, _explanation(records), as_json)


def usage(directory: Path, tokens: Path, split: str, limit: int, as_json: bool) -> None:
    """Print how a split of data/tokens uses the rows of the model's memory."""
    model = _load(directory)
    try:
        records = inspection.usage(model, _batches(tokens, split, limit, model.config.vocab_size))
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None
    _print(records, _statistics(records), as_json)


def _load(directory: Path) -> PreTrainedModel:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no model there; `memgpt retrain` or `dvc repro` makes models/base")
    kind = AutoConfig.from_pretrained(directory).model_type
    if kind != "memgpt":
        raise UserError(f"{directory}: a {kind} model, which has no memory")
    return AutoModel.from_pretrained(directory).eval()


def _batches(directory: Path, split: str, limit: int, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first `limit` tokens of a split as one row after the other, [1, T], with each document's positions."""
    path = directory / f"{split}.npy"
    if not path.is_file():
        raise UserError(f"{path}: not found; `memgpt tokenize` makes it, `dvc checkout` restores it")
    ids, starts = np.load(path, mmap_mode="r")[:limit], np.load(directory / f"{split}_starts.npy")
    for first in range(0, len(ids), _CHUNK):
        piece = ids[first : first + _CHUNK].astype(np.int64)
        if piece.max() >= vocabulary:
            raise UserError(
                f"{path}: token {piece.max()}, the model's vocabulary has {vocabulary}; tokenize with its own"
            )
        where = np.arange(first, first + len(piece))
        document = starts[np.searchsorted(starts, where, side="right") - 1]
        yield {
            "input_ids": torch.from_numpy(piece)[None],
            "position_ids": torch.from_numpy(where - np.maximum(document, first))[None],
        }


def _print(records: list[dict[str, Any]], table: Table, as_json: bool) -> None:
    if as_json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or another program: no line is broken
        console = Console(highlight=False, width=400)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("token", "", "n-grams") else "right", no_wrap=True)
    return table


def _explanation(records: list[dict[str, Any]]) -> Table:
    table = _table("token", "layer", "gate", "strength", "", "n-grams")
    loudest = max(record["strength"] for record in records) or 1.0
    place = None
    for record in records:
        token = record["token"] if record["position"] != place else ""
        place = record["position"]
        grams = Text("  ").join(
            Text(
                f"{json.dumps(gram['text'], ensure_ascii=False)} {gram['strength']:.2f}",
                _style(gram["strength"] / loudest),
            )
            for gram in record["ngrams"]
        )
        share = record["strength"] / loudest
        table.add_row(
            Text(token, "bold"),
            str(record["layer"]),
            f"{record['gate']:.2f}",
            f"{record['strength']:.2f}",
            Text("█" * round(_BAR * share), _style(share)),
            grams,
        )
    return table


def _style(share: float) -> str:
    """Of something that is `share` of the loudest."""
    return "dim" if share < 0.25 else "default" if share < 0.5 else "yellow" if share < 0.75 else "bold red"


def _statistics(records: list[dict[str, Any]]) -> Table:
    names = ("layer", "n", "rows", "touched", "expected", "dead", "unlearned", "n-grams read", "load")
    table = _table(*names, "colliding", "expected", "in every head")
    for record in records:
        counts = ("rows", "touched", "expected_touched", "dead", "unlearned", "ngrams")
        shares = ("colliding", "expected_colliding", "inseparable")
        table.add_row(
            str(record["layer"]),
            str(record["n"]),
            *(f"{record[name]:,.0f}" for name in counts),
            f"{record['load']:.2f}",
            *(f"{record[name]:.1%}" for name in shares),
        )
    return table
