"""Finds the tasks' held-out texts in the corpus: a long text by a shared 13-gram of words, a short one as a whole
paragraph or sentence, both after normalisation (GPT-3's contamination rule, Brown et al. 2020, appendix C)."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

GRAM = 13

_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers are invertible modulo 2⁶⁴
_POWERS = np.array([pow(int(_BASE), GRAM - 1 - i, 2**64) for i in range(GRAM)], dtype=np.uint64)


def words(text: str) -> list[str]:
    """The case-folded runs of letters and digits."""
    return _WORD.findall(text.casefold())


def normalise(text: str) -> str:
    """Case folded, punctuation stripped, white space collapsed: equal for texts that read the same."""
    return " ".join(words(text))


class Hits(NamedTuple):
    """Where a document contains held-out texts: the numbers of its lines, and the indices of the texts."""

    lines: set[int]
    texts: set[int]


class HeldOut:
    """An index of the held-out texts; a look-up takes about 1 µs per word of the corpus.

    A rolling hash over word numbers finds candidates with array operations; each is then compared word by word.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}  # word → number from 1; 0: any word that is in no long held-out text
        self._short: dict[str, list[int]] = {}
        grams: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for index, text in enumerate(texts):
            found = words(text)
            if not found:
                continue
            if len(found) < GRAM:
                self._short.setdefault(" ".join(found), []).append(index)
                continue
            numbers = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in found]
            for start, code in enumerate(_rolling(np.array(numbers, dtype=np.uint64)).tolist()):
                grams.setdefault(code, []).append((tuple(numbers[start : start + GRAM]), index))
        self._grams = grams
        self._codes = np.array(sorted(grams), dtype=np.uint64)

    def hits(self, document: str) -> Hits:
        """Where the document (lines split at \\n) has a held-out text or a part of one; a 13-gram may span lines."""
        by_line = [words(line) for line in document.split("\n")]
        lines: set[int] = set()
        texts: set[int] = set()
        if self._short:
            for number, (line, found) in enumerate(zip(document.split("\n"), by_line, strict=True)):
                for index in self._whole(line, found):
                    lines.add(number)
                    texts.add(index)
        count = sum(map(len, by_line))
        if len(self._codes) and count >= GRAM:
            number_of = self._numbers.get
            numbers = np.fromiter(
                (number_of(word, 0) for line in by_line for word in line), dtype=np.uint64, count=count
            )
            codes = _rolling(numbers)
            places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
            line_of: np.ndarray | None = None
            for start in np.flatnonzero(self._codes[places] == codes).tolist():
                gram = tuple(numbers[start : start + GRAM].tolist())
                matched = {index for candidate, index in self._grams[int(codes[start])] if candidate == gram}
                if matched:
                    if line_of is None:
                        line_of = np.repeat(np.arange(len(by_line)), [len(line) for line in by_line])
                    texts |= matched
                    lines.update(line_of[start : start + GRAM].tolist())
        return Hits(lines, texts)

    def _whole(self, line: str, found: list[str]) -> list[int]:
        if len(found) < GRAM:
            indices = self._short.get(" ".join(found))
            if indices:
                return indices
        hit: list[int] = []
        sentences = _SENTENCE_END.split(line)
        if len(sentences) > 1:
            for sentence in sentences:
                hit += self._short.get(normalise(sentence), []) if len(sentence) < 400 else []
        return hit


def clean(documents: Sequence[str], held_out: HeldOut) -> tuple[list[str], int]:
    """The documents without the paragraphs (lines) that contain a held-out text, and how many were removed.

    The documents stay aligned: one that is removed whole becomes "".
    """
    cleaned = []
    removed = 0
    for document in documents:
        lines, _ = held_out.hits(document)
        if lines:
            removed += len(lines)
            document = "\n".join(line for number, line in enumerate(document.split("\n")) if number not in lines)
        cleaned.append(document)
    return cleaned, removed


def _rolling(numbers: np.ndarray) -> np.ndarray:
    """[n] word numbers → [n − 12] hashes of the 13-grams, modulo 2⁶⁴."""
    length = len(numbers) - GRAM + 1
    mixed = numbers * _BASE  # spreads small numbers over all bits
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(max(length, 0), dtype=np.uint64)
    for offset, power in enumerate(_POWERS):
        total += mixed[offset : offset + length] * power
    return total
