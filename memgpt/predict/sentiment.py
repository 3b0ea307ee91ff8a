"""Text → sentiment with a probability for each label."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from memgpt.model import MemGPTForSequenceClassification
from memgpt.model.residency import Residency
from memgpt.predict.batching import batch_size, by_length, encode, pad
from memgpt.predict.ensemble import load


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForSequenceClassification, directory, memory, device)
        self.device = device

    @torch.no_grad()
    def predict(self, inputs: list[str | dict[str, Any]]) -> list[dict[str, Any]]:
        """Per text (or {text, topic}): {label, scores: {label: probability}, topic}. The topic is passed through; a
        model trained with topics adds predicted_topic."""
        rows = [{"text": row, "topic": None} if isinstance(row, str) else row for row in inputs]
        texts, window = [row["text"] for row in rows], self.model.config.window
        ids = encode(self.tokenizer, texts, window)
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for batch in by_length(ids, batch_size(self.model)):
            arguments = pad([ids[i] for i in batch], self.tokenizer.pad_token_id, self.device)
            outputs = self.model(**arguments)
            probabilities = (outputs.logits.float() / self.model.config.label_temperature).softmax(-1).tolist()
            for i, scores in zip(batch, probabilities, strict=True):
                best = max(range(len(names)), key=scores.__getitem__)
                answers[i] = {
                    "label": names[best],
                    "scores": {name: round(score, 6) for name, score in zip(names, scores, strict=True)},
                    "topic": rows[i].get("topic"),
                }
            if outputs.topic_logits is not None:
                for i, topic in zip(batch, outputs.topic_logits.argmax(-1).tolist(), strict=True):
                    answers[i]["predicted_topic"] = self.model.config.topics[topic]
        return answers
