"""Text → named entities with their place in it."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from memgpt.model import MemGPTForTokenClassification
from memgpt.model.residency import Residency
from memgpt.predict.batching import batch_size, by_length, pad
from memgpt.predict.ensemble import load
from memgpt.predict.words import best_path, encode_rows, joined_words, spans_from_tags, split_words, windows


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForTokenClassification, directory, memory, device)
        self.device = device

    def predict(self, inputs: list[str | list[str]]) -> list[list[dict[str, Any]]]:
        """Per text, its entities as {text, type, score, start, end} in order of place.

        A list of words counts as their text with single spaces between. A text longer than the model's window is read
        in overlapping windows; each word is judged in the one that shows most of its surroundings, and the tags of all
        words are chosen together, so that no entity is cut where two windows meet. score: geometric mean of the
        probabilities of its words' tags.
        """
        texts = [text if isinstance(text, str) else " ".join(text) for text in inputs]
        places = [split_words(t) if isinstance(t, str) else joined_words(t) for t in inputs]
        encoded = encode_rows(
            self.tokenizer, [[text[a:b] for a, b in spans] for text, spans in zip(texts, places, strict=True)]
        )
        tags = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]
        answers = []
        for text, spans, scores in zip(texts, places, self._score(encoded), strict=True):
            path = best_path(scores, tags)
            chosen = scores[range(len(path)), path]
            entities = []
            for kind, first, last in spans_from_tags([tags[label] for label in path]):
                start, end = spans[first][0], spans[last - 1][1]
                score = float(np.exp(chosen[first:last].mean()))
                entities.append(
                    {"text": text[start:end], "type": kind, "score": round(score, 6), "start": start, "end": end}
                )
            answers.append(entities)
        return answers

    @torch.no_grad()
    def _score(self, encoded: list[list[list[int]]]) -> list[np.ndarray]:
        """Subwords of the words of each text → log-probabilities [words, L] of each text."""
        size, count = self.model.config.window, self.model.config.num_labels
        lengths = [np.array([len(word) for word in words], dtype=int) for words in encoded]
        jobs = [
            (text, first, last)
            for text, words in enumerate(lengths)
            for first, last in (windows(words.tolist(), size) if len(words) else [])
        ]
        rows = [[*chain.from_iterable(encoded[text][first:last])][:size] for text, first, last in jobs]
        scores = [np.zeros((len(words), count)) for words in encoded]
        context = [np.full(len(words), -1) for words in encoded]
        for batch in by_length(rows, batch_size(self.model)):
            arguments = pad([rows[i] for i in batch], self.tokenizer.pad_token_id, self.device)
            logits = self.model(**arguments).logits.float() / self.model.config.label_temperature
            read = logits.log_softmax(-1).cpu().numpy()
            for row, i in enumerate(batch):
                text, first, last = jobs[i]
                starts = lengths[text][first:last].cumsum() - lengths[text][first:last]
                shown = np.minimum(np.arange(last - first), np.arange(last - first)[::-1])  # words on its poorer side
                better = shown > context[text][first:last]
                context[text][first:last][better] = shown[better]
                scores[text][first:last][better] = read[row, starts[better]]
        return scores
