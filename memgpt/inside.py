"""The output of `memgpt explain` and `memgpt usage`: what happens inside a model, as text, JSON and HTML."""

import dataclasses
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from memgpt import atomic
from memgpt.errors import UserError
from memgpt.model import inspection

if TYPE_CHECKING:
    from memgpt.attribution import Attribution

_TOP = 8  # memory entries listed
_CHUNK = 1 << 16  # tokens looked up at once
_BAR = 8  # characters of the longest bar


def explain(directory: Path, text: str, as_json: bool) -> None:
    """Print the memory's contribution to each token of the text, in the attention mode of the model in `directory`."""
    model = _load(directory)
    mode = "causal" if (model.config.architectures or [""])[0].endswith("CausalLM") else "bidirectional"
    try:
        records = inspection.explain(model, AutoTokenizer.from_pretrained(directory), text, mode)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None
    _print(records, _explanation(records), as_json)


def attribute(task: str, directory: Path, texts: list[str], as_json: bool, html: Path | None) -> None:
    """Print what contributed to the answer of a task's model, and write it to `html`, a self-contained page."""
    from memgpt import attribution

    try:
        found = attribution.explain(task, directory, texts)
    except ValueError as error:
        raise UserError(str(error)) from None
    if html:
        atomic.write_text(html, _page(found))
    if as_json:
        for each in found:
            print(json.dumps(dataclasses.asdict(each), ensure_ascii=False))
        return
    console = _console()
    if not found:
        console.print("nothing found: no answer to explain")
    for each in found:
        console.print(Text(each.answer, "bold"), Text(_sum(each)), sep="  ")
        largest = _largest(each)
        line = Text()
        for token, share in zip(each.tokens, each.shares, strict=True):
            line.append(token, _sign(share / largest)).append(f"{share:+.{_digits(each)}f} ", "dim")
        console.print(line)
        table = _table("memory", "share", "")
        for entry in _loudest(each):
            style = _sign(entry.share / largest)
            bar = Text("█" * round(_BAR * abs(entry.share) / largest), style)
            table.add_row(Text(json.dumps(entry.text, ensure_ascii=False), style), f"{entry.share:+.4f}", bar)
        console.print(table)


def _sum(each: "Attribution") -> str:
    memory = sum(entry.share for entry in each.memory)
    tokens, show = sum(each.shares), f"+.{_digits(each)}f"
    return (
        f"{each.unit} {each.score:{show[1:]}} = {each.start:{show}} without words {tokens:{show}} tokens "
        f"{memory:{show}} memory"
    )


def _digits(each: "Attribution") -> int:
    return 2 if each.unit == "log-odds" else 4


def _largest(each: "Attribution") -> float:
    return max(map(abs, [*each.shares, *(entry.share for entry in each.memory)]), default=0.0) or 1.0


def _loudest(each: "Attribution") -> list[Any]:
    return sorted(each.memory, key=lambda entry: -abs(entry.share))[:_TOP]


def _sign(share: float) -> str:
    """Blue supports the answer, red opposes it; the colour-blind can tell these two apart."""
    strength = "bold " if abs(share) > 0.5 else "" if abs(share) > 0.15 else "dim "
    return f"{strength}{'blue' if share > 0 else 'red'}"


def _page(found: list["Attribution"]) -> str:
    def mark(text: str, share: float, largest: float) -> str:
        hue = "37, 99, 235" if share > 0 else "220, 38, 38"
        colour = f"rgba({hue}, {min(1.0, abs(share) / largest) * 0.75:.2f})"
        return f'<span style="background: {colour}" title="{share:+.4f}">{escape(text)}</span>'

    parts = []
    for each in found:
        largest = _largest(each)
        tokens = " ".join(mark(*pair, largest) for pair in zip(each.tokens, each.shares, strict=True))
        rows = "".join(
            f"<tr><td>{mark(entry.text, entry.share, largest)}</td><td>{entry.share:+.4f}</td></tr>"
            for entry in _loudest(each)
        )
        table = f"<table><tr><th>memory</th><th>share</th></tr>{rows}</table>" if rows else ""
        parts.append(f"<h2>{escape(each.answer)}</h2><p>{escape(_sum(each))}</p><p class=text>{tokens}</p>{table}")
    body = "\n".join(parts) or "<p>Nothing found: no answer to explain.</p>"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Why</title>
<style>body {{ font: 16px/1.7 sans-serif; max-width: 48rem; margin: 2rem auto }} span {{ padding: .15em .2em }}
.text {{ font-size: 1.2em }} td, th {{ text-align: left; padding-right: 2rem }}</style>
<h1>What moved the answer</h1>
<p>Integrated gradients: <span style="background: rgba(37, 99, 235, .5)">for</span> the answer,
<span style="background: rgba(220, 38, 38, .5)">against</span> it; memory: n-grams that were looked up.</p>
{body}
</html>
"""


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
    """The first `limit` tokens of a split, in successive rows [1, T], with the positions within each document."""
    from memgpt.stages.pretrain import positions  # slow to import (one second), with the whole training code

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
        yield {
            "input_ids": torch.from_numpy(piece)[None],
            "position_ids": torch.from_numpy(positions(starts, first, len(piece)))[None],
        }


def _print(records: list[dict[str, Any]], table: Table, as_json: bool) -> None:
    if as_json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=400)  # elsewhere lines are not wrapped


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("token", "", "n-grams", "memory") else "right", no_wrap=True
        )
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
    """The style of a strength that is `share` of the largest."""
    return "dim" if share < 0.25 else "default" if share < 0.5 else "yellow" if share < 0.75 else "bold red"


def _statistics(records: list[dict[str, Any]]) -> Table:
    names = ("n", "rows", "touched", "expected", "dead", "unlearned", "n-grams read", "load")
    table = _table(*names, "colliding", "expected", "in every head")
    for record in records:
        counts = ("rows", "touched", "expected_touched", "dead", "unlearned", "ngrams")
        shares = ("colliding", "expected_colliding", "inseparable")
        table.add_row(
            str(record["n"]),
            *(f"{record[name]:,.0f}" for name in counts),
            f"{record['load']:.2f}",
            *(f"{record[name]:.1%}" for name in shares),
        )
    return table
