"""Text → named entities with their place in it."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgpt.model import MemGPTForTokenClassification
from memgpt.predict.batching import by_length, pad

# A word: letters and digits with inner marks (U.S, don't, 3.5, co-op), else one mark. Ideographs and syllables that are
# written without spaces stand alone.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+(?:[.,'’&/-](?:(?![{_UNSPACED}])\w)+)*|[^\w\s]")


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


def encode_words(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[list[int]]:
    """Subword ids of each word; a word that vanishes (white space only) still gets one padding id."""
    encoding = tokenizer(list(words), is_split_into_words=True, add_special_tokens=False, verbose=False)
    pieces: list[list[int]] = [[] for _ in words]
    for word, token in zip(encoding.word_ids(), encoding["input_ids"], strict=True):
        pieces[word].append(token)
    return [piece or [tokenizer.pad_token_id] for piece in pieces]


def windows(lengths: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Ranges of words whose subwords fit into `size`, each next one starting half-way through the one before."""
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


def spans_from_tags(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """BIO tags → (type, first word, word after the last). An I- that continues nothing begins an entity."""
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


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = MemGPTForTokenClassification.from_pretrained(directory).to(device).eval()
        self.device = device

    def predict(self, inputs: list[str | list[str]]) -> list[list[dict[str, Any]]]:
        """Per text, its entities as {text, type, score, start, end} in order of place.

        A list of words counts as their text with single spaces between. A text longer than the model's window is read
        in overlapping windows; each word is judged in the one that shows most of its surroundings.
        """
        texts = [text if isinstance(text, str) else " ".join(text) for text in inputs]
        places = [split_words(t) if isinstance(t, str) else joined_words(t) for t in inputs]
        encoded = [
            encode_words(self.tokenizer, [text[a:b] for a, b in spans]) if spans else []
            for text, spans in zip(texts, places, strict=True)
        ]
        answers = []
        for text, spans, tags in zip(texts, places, self._tag(encoded), strict=True):
            entities = []
            for kind, first, last in spans_from_tags([tag for tag, _ in tags]):
                start, end = spans[first][0], spans[last - 1][1]
                score = sum(probability for _, probability in tags[first:last]) / (last - first)
                entities.append(
                    {"text": text[start:end], "type": kind, "score": round(score, 6), "start": start, "end": end}
                )
            answers.append(entities)
        return answers

    @torch.no_grad()
    def _tag(self, encoded: list[list[list[int]]]) -> list[list[tuple[str, float]]]:
        """Subwords of the words of each text → (tag, its probability) of each word."""
        size = self.model.config.window
        jobs = [
            (text, first, last)
            for text, words in enumerate(encoded)
            for first, last in (windows([len(word) for word in words], size) if words else [])
        ]
        rows = [[*chain.from_iterable(encoded[text][first:last])][:size] for text, first, last in jobs]
        names = self.model.config.id2label
        best: list[list[tuple[int, str, float]]] = [[(-1, "O", 0.0)] * len(words) for words in encoded]
        for batch in by_length(rows):
            arguments = pad([rows[i] for i in batch], self.tokenizer.pad_token_id, self.device)
            probabilities = self.model(**arguments).logits.float().softmax(-1)
            values, labels = probabilities.max(-1)
            for row, i in enumerate(batch):
                text, first, last = jobs[i]
                position = 0
                for word in range(first, last):
                    shown = min(word - first, last - 1 - word)  # words around it on its poorer side
                    if position < len(rows[i]) and shown > best[text][word][0]:
                        best[text][word] = (
                            shown,
                            names[labels[row, position].item()],
                            values[row, position].item(),
                        )
                    position += len(encoded[text][word])
        return [[(tag, probability) for _, tag, probability in words] for words in best]
