"""Text → named entities with their place in it."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from memgpt.model import MemGPTForTokenClassification
from memgpt.model.residency import Residency, load
from memgpt.predict.batching import batch_size, by_length, pad
from memgpt.predict.words import encode_rows, joined_words, spans_from_tags, split_words, windows


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForTokenClassification, directory, memory).to(device).eval()
        self.device = device

    def predict(self, inputs: list[str | list[str]]) -> list[list[dict[str, Any]]]:
        """Per text, its entities as {text, type, score, start, end} in order of place.

        A list of words counts as their text with single spaces between. A text longer than the model's window is read
        in overlapping windows; each word is judged in the one that shows most of its surroundings.
        """
        texts = [text if isinstance(text, str) else " ".join(text) for text in inputs]
        places = [split_words(t) if isinstance(t, str) else joined_words(t) for t in inputs]
        encoded = encode_rows(
            self.tokenizer, [[text[a:b] for a, b in spans] for text, spans in zip(texts, places, strict=True)]
        )
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
        for batch in by_length(rows, batch_size(self.model)):
            arguments = pad([rows[i] for i in batch], self.tokenizer.pad_token_id, self.device)
            best_of = self.model(**arguments).logits.float().softmax(-1).max(-1)
            values, labels = best_of.values.tolist(), best_of.indices.tolist()
            for row, i in enumerate(batch):
                text, first, last = jobs[i]
                position = 0
                for word in range(first, last):
                    shown = min(word - first, last - 1 - word)  # words around it on its poorer side
                    if position < len(rows[i]) and shown > best[text][word][0]:
                        best[text][word] = (shown, names[labels[row][position]], values[row][position])
                    position += len(encoded[text][word])
        return [[(tag, probability) for _, tag, probability in words] for words in best]
