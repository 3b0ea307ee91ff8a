"""Text → named entities with their offsets."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgpt.model import MemGPTForTokenClassification
from memgpt.model.residency import Residency
from memgpt.predict.batching import batch_size, by_length, pad
from memgpt.predict.ensemble import load
from memgpt.predict.words import best_path, encode_rows, joined_words, spans_from_tags, split_words, windows


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForTokenClassification, directory, memory, device)

    def predict(self, inputs: list[str | list[str]]) -> list[list[dict[str, Any]]]:
        """Per text, its entities as {text, type, score, start, end} in text order.

        A list of words counts as their text joined by single spaces. A text longer than the model's window is read in
        overlapping windows. Each word is scored in the one with the most context around it, and the tags of all words
        are chosen jointly, so that no entity is cut where two windows meet. score: geometric mean of the probabilities
        of its words' tags; it may be below one half (`outside_bias` of the model's configuration).
        """
        texts = [text if isinstance(text, str) else " ".join(text) for text in inputs]
        places = [split_words(t) if isinstance(t, str) else joined_words(t) for t in inputs]
        words = [[text[a:b] for a, b in spans] for text, spans in zip(texts, places, strict=True)]
        tags = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]
        answers = []
        for text, spans, scores in zip(texts, places, word_scores(self.model, self.tokenizer, words), strict=True):
            path = best_path(scores, tags, self.model.config.outside_bias)
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
def word_scores(
    model: MemGPTForTokenClassification, tokenizer: PreTrainedTokenizerFast, words: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """The words of each text → log-probabilities [words, L] per text."""
    size, count = model.config.window, model.config.num_labels
    encoded = encode_rows(tokenizer, words)
    lengths = [np.array([len(piece) for piece in pieces], dtype=int) for pieces in encoded]
    jobs = [
        (text, first, last)
        for text, sizes in enumerate(lengths)
        for first, last in (windows(sizes.tolist(), size) if len(sizes) else [])
    ]
    rows = [[*chain.from_iterable(encoded[text][first:last])][:size] for text, first, last in jobs]
    scores = [np.zeros((len(pieces), count)) for pieces in encoded]
    context = [np.full(len(pieces), -1) for pieces in encoded]
    for batch in by_length(rows, batch_size(model)):
        arguments = pad([rows[i] for i in batch], tokenizer.pad_token_id, model.device)
        logits = model(**arguments).logits.float() / model.config.label_temperature
        read = logits.log_softmax(-1).cpu().numpy()
        for row, i in enumerate(batch):
            text, first, last = jobs[i]
            starts = lengths[text][first:last].cumsum() - lengths[text][first:last]
            shown = np.minimum(np.arange(last - first), np.arange(last - first)[::-1])  # words on its shorter side
            better = shown > context[text][first:last]
            context[text][first:last][better] = shown[better]
            scores[text][first:last][better] = read[row, starts[better]]
    return scores
