"""Words of a text, their offsets, and tags over them. Without torch, so that evaluation does not need it."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A word: letters and digits with combining marks (accents, vowel signs, joiners) and with inner punctuation (U.S,
# don't, 3.5, co-op); else one visible symbol. In scripts written without spaces each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_MARKS = "\u200c\u200d" + "".join(
    chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me")
)
_UNSEEN = "".join(chr(code) for code in range(0xAD, 0x10000) if unicodedata.category(chr(code)) == "Cf")
_LETTER = rf"(?:(?![{_UNSPACED}])\w[{_MARKS}]*)"
_WORD = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|{_LETTER}+(?:[.,'’&/-]{_LETTER}+)*|[^\w\s{_UNSEEN}]")


def split_words(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of a running text."""
    return [match.span() for match in _WORD.finditer(text)]


def joined_words(words: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each word in the words joined by single spaces."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def encode_words(tokenizer: "PreTrainedTokenizerFast", words: Sequence[str]) -> list[list[int]]:
    """Subword ids of each word; a word without any (white space only) gets one padding id."""
    return encode_rows(tokenizer, [words])[0]


def encode_rows(tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """`encode_words` for the words of many texts in one call."""
    if not rows:
        return []
    encoding = tokenizer(
        [list(words) for words in rows],
        is_split_into_words=True,
        add_special_tokens=False,
        split_special_tokens=True,
        verbose=False,
    )
    encoded = []
    for row, words in enumerate(rows):
        pieces: list[list[int]] = [[] for _ in words]
        for word, token in zip(encoding.word_ids(row), encoding["input_ids"][row], strict=True):
            pieces[word].append(token)
        encoded.append([piece or [tokenizer.pad_token_id] for piece in pieces])
    return encoded


def windows(lengths: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Ranges of words whose subwords fit into `size`; each range starts half-way through the one before."""
    ranges, first = [], 0
    while True:
        last, total = first, 0
        while last < len(lengths) and (last == first or total + lengths[last] <= size):
            total += lengths[last]
            last += 1
        ranges.append((first, last))
        if last >= len(lengths):
            return ranges
        first = max(first + 1, (first + last) // 2)


def best_path(scores: np.ndarray, tags: Sequence[str], outside_bias: float = 0.0) -> list[int]:
    """Log-probabilities [words, L] of the L tags → the most likely well-formed BIO sequence, as indices of tags, after
    subtracting `outside_bias` from those of O.

    Viterbi: an I- may only follow a B- or I- of its type. If the best tags of the single words already form such a
    sequence, they are the answer; that spares most texts the loop.
    """
    if not len(scores):
        return []
    outside, free, allowed, barrier = _grammar(tuple(tags))
    scores = scores - outside_bias * outside
    single = scores.argmax(1)
    if free[single[0]] and allowed[single[:-1], single[1:]].all():
        return single.tolist()
    total, before = np.where(free, scores[0], -np.inf), []
    for row in scores[1:]:
        reach = total[:, None] + barrier
        before.append(reach.argmax(0))
        total = reach.max(0) + row
    path = [int(total.argmax())]
    for choice in reversed(before):
        path.append(int(choice[path[-1]]))
    return path[::-1]


@cache
def _grammar(tags: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Which tags are O and which may follow anything, both [L]; whether a tag (column) may follow another (row), and
    0 there, −inf elsewhere, both [L, L]."""
    kinds = np.array([tag[2:] for tag in tags])
    free = np.array([not tag.startswith("I-") for tag in tags])
    allowed = free | (kinds[:, None] == kinds)
    return np.array(tags) == "O", free, allowed, np.where(allowed, 0.0, -np.inf)


def spans_from_tags(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """BIO tags → (type, first word, word after the last). An I- that continues no entity begins one."""
    spans: list[tuple[str, int, int]] = []
    for index, tag in enumerate(tags):
        if tag == "O":
            continue
        mark, kind = tag[0], tag[2:]
        if mark == "I" and spans and spans[-1][0] == kind and spans[-1][2] == index:
            spans[-1] = (kind, spans[-1][1], index + 1)
        else:
            spans.append((kind, index, index + 1))
    return spans
