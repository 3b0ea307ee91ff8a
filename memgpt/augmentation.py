"""Augmentation: new training rows from existing ones. Each kind adds `share` × rows; existing rows stay unchanged.

After *An Analysis of Simple Data Augmentation for Named Entity Recognition* (arXiv 2010.11683) and *EDA* (arXiv
1901.11196). Rows are those of the tables: {tokens, tags} for NER, {text, label, …} for sentiment.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from memgpt.errors import UserError
from memgpt.predict.words import spans_from_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
Synonyms = dict[str, list[str]]
EDITED = 0.1  # share of a row's words that an edit or a synonym replaces


def ner(
    rows: list[Row],
    seed: int,
    thesaurus: Callable[[], Synonyms],
    *,
    mention_replacement: float = 0.0,
    synonyms: float = 0.0,
    word_edits: float = 0.0,
    letter_case: float = 0.0,
    recombination: float = 0.0,
) -> list[Row]:
    """Adds sentences with other names of the same type, with edited words outside names, in lower or upper case, or two
    joined.

    Each number is a share of `rows` to add. thesaurus: called if synonyms is not 0.
    """
    mentions: dict[str, list[list[str]]] = defaultdict(list)
    for row in rows:
        for kind, first, last in spans_from_tags(row["tags"]):
            mentions[kind].append(row["tokens"][first:last])
    with_mentions = [row for row in rows if any(tag != "O" for tag in row["tags"])]

    def replace_mentions(random: Random) -> Row:
        row = random.choice(with_mentions)
        tokens, tags, end = [], [], 0
        for kind, first, last in spans_from_tags(row["tags"]):
            mention = random.choice(mentions[kind])
            tokens += [*row["tokens"][end:first], *mention]
            tags += [*row["tags"][end:first], f"B-{kind}", *[f"I-{kind}"] * (len(mention) - 1)]
            end = last
        return {**row, "tokens": tokens + row["tokens"][end:], "tags": tags + row["tags"][end:]}

    def edit(random: Random, words: Synonyms | None) -> Row:
        row = random.choice(rows)
        free = [index for index, tag in enumerate(row["tags"]) if tag == "O"]
        edited = _edit([row["tokens"][index] for index in free], random, words)
        tokens = list(row["tokens"])
        for index, token in zip(free, edited, strict=True):
            tokens[index] = token
        kept = [index for index, token in enumerate(tokens) if token]
        return {**row, "tokens": [tokens[i] for i in kept], "tags": [row["tags"][i] for i in kept]}

    def join(random: Random) -> Row:
        one, other = random.choice(rows), random.choice(rows)
        return {**one, "tokens": one["tokens"] + other["tokens"], "tags": one["tags"] + other["tags"]}

    def recase(random: Random) -> Row:
        row, change = random.choice(rows), random.choice((str.lower, str.upper))
        return {**row, "tokens": [change(token) for token in row["tokens"]]}

    known = thesaurus() if synonyms else None
    added = _Rows(rows, seed)
    added.make("mention_replacement", mention_replacement if with_mentions else 0.0, replace_mentions)
    added.make("synonyms", synonyms, lambda random: edit(random, known))
    added.make("word_edits", word_edits, lambda random: edit(random, None))
    added.make("letter_case", letter_case, recase)
    added.make("recombination", recombination, join)
    return added.rows


def sentiment(
    rows: list[Row],
    seed: int,
    thesaurus: Callable[[], Synonyms],
    *,
    synonyms: float = 0.0,
    word_edits: float = 0.0,
    letter_case: float = 0.0,
    recombination: float = 0.0,
) -> list[Row]:
    """Adds texts with edited words, in lower or upper case, or made of the first half of one text and the second half
    of another with the same label. Arguments as in `ner`."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)

    def edit(random: Random, words: Synonyms | None) -> Row:
        row = random.choice(rows)
        return {**row, "text": " ".join(filter(None, _edit(row["text"].split(), random, words)))}

    def join(random: Random) -> Row:
        one = random.choice(rows)
        other = random.choice(by_label[one["label"]])
        head, tail = one["text"].split(), other["text"].split()
        return {**one, "text": " ".join(head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :])}

    def recase(random: Random) -> Row:
        row, change = random.choice(rows), random.choice((str.lower, str.upper))
        return {**row, "text": change(row["text"])}

    known = thesaurus() if synonyms else None
    added = _Rows(rows, seed)
    added.make("synonyms", synonyms, lambda random: edit(random, known))
    added.make("word_edits", word_edits, lambda random: edit(random, None))
    added.make("letter_case", letter_case, recase)
    added.make("recombination", recombination, join)
    return added.rows


def neighbours(parent: Path, tokenizer: "PreTrainedTokenizerFast", count: int = 3) -> Synonyms:
    """Word → the `count` words whose embeddings in the core in `parent` have the highest cosine similarity, that is
    words used in similar contexts. Only words that are one token."""
    import torch
    from safetensors import safe_open

    words = {
        token[1:]: place
        for token, place in tokenizer.get_vocab().items()
        if token[0] in "Ġ▁" and token[1:].isalpha()  # a leading space in byte-level BPE or SentencePiece
    }
    if not words:
        raise UserError(f"augment.synonyms: the tokenizer of {parent} has no whole words; set it to 0")
    with safe_open(parent / "model.safetensors", "pt") as weights:
        rows = weights.get_tensor("model.embed_tokens.weight")[list(words.values())].float()
    rows = torch.nn.functional.normalize(rows, dim=1)
    names = list(words)
    found: Synonyms = {}
    for first in range(0, len(names), 1024):
        nearest = (rows[first : first + 1024] @ rows.T).topk(count + 1).indices.tolist()
        for name, places in zip(names[first:], nearest, strict=False):
            found[name] = [names[place] for place in places if names[place] != name][:count]
    return found


class _Rows:
    """The rows and those added. Each kind has its own random generator, so that one does not change another."""

    def __init__(self, rows: list[Row], seed: int):
        self.rows, self.count, self.seed = list(rows), len(rows), seed

    def make(self, kind: str, share: float, maker: Callable[[Random], Row]) -> None:
        random = Random(f"{self.seed} {kind}")
        self.rows += [maker(random) for _ in range(round(share * self.count))]


def _edit(words: list[str], random: Random, synonyms: Synonyms | None) -> list[str]:
    """Replaces a tenth of the words, at least one, by synonyms; without synonyms, drops them (leaves them empty) or
    swaps them with the next. A single word is never dropped."""
    words = list(words)
    for _ in range(max(1, round(EDITED * len(words)))) if words else ():
        place = random.randrange(len(words))
        if synonyms is not None:
            words[place] = random.choice(synonyms.get(words[place]) or [words[place]])
        elif len(words) > 1 and random.random() < 0.5:
            words[place] = ""
        elif place + 1 < len(words):
            words[place : place + 2] = words[place + 1], words[place]
    return words
