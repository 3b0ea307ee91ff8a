"""Text → how well the base model predicts it."""

import math
from pathlib import Path

import torch
from transformers import AutoTokenizer

from memgpt.model import MemGPTForCausalLM
from memgpt.model.residency import Residency, load
from memgpt.predict.batching import batch_size, by_length, encode, pad

LOGITS = 1 << 26  # at most in a batch: 256 MB
WINDOW = 512  # tokens predicted at once; a window's first token is predicted from the token before it only


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForCausalLM, directory, memory).to(device).eval()
        self.device = device

    @torch.no_grad()
    def predict(self, inputs: list[str]) -> list[dict[str, float]]:
        """Per text: nats (total negative log-likelihood), tokens, bytes (UTF-8) and bits_per_byte."""
        end = self.tokenizer.eos_token_id
        rows, owners = [], []
        for index, read in enumerate(encode(self.tokenizer, inputs)):
            ids = [end, *read]
            for first in range(0, max(1, len(ids) - 1), WINDOW):
                rows.append(ids[first : first + WINDOW + 1])
                owners.append(index)
        nats, tokens = [0.0] * len(inputs), [0] * len(inputs)
        most = min(batch_size(self.model), max(WINDOW + 1, LOGITS // self.model.config.vocab_size))
        for batch in by_length(rows, most):
            arguments = pad([rows[i] for i in batch], self.model.config.pad_token_id or 0, self.device)
            logits = self.model(**arguments, use_cache=False).logits[:, :-1].float()
            target, kept = arguments["input_ids"][:, 1:], arguments["attention_mask"][:, 1:]
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            loss = flat.view_as(target) * kept
            for i, total, count in zip(batch, loss.sum(1).tolist(), kept.sum(1).tolist(), strict=True):
                nats[owners[i]] += total
                tokens[owners[i]] += count
        answers = []
        for text, total, count in zip(inputs, nats, tokens, strict=True):
            size = len(text.encode())
            answers.append(
                {"nats": total, "tokens": count, "bytes": size, "bits_per_byte": total / math.log(2) / max(1, size)}
            )
        return answers
