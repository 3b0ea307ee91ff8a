"""Several fine-tunings of one task whose probabilities are averaged: a deep ensemble (arXiv 1612.01474).

Its model directory is the first member's, and contains those of the others.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from memgpt.model import residency


def directories(directory: Path | str) -> list[Path]:
    """The members' directories; the first is `directory` itself."""
    return [Path(directory), *sorted(Path(directory).glob("member-*"))]


def load(kind: type[PreTrainedModel], directory: Path | str, memory: residency.Residency, device: str) -> Any:
    """The model in `directory`, or an `Ensemble` if it has several members."""
    members = [residency.load(kind, place, memory).to(device).eval() for place in directories(directory)]
    return members[0] if len(members) == 1 else Ensemble(members)


class Ensemble(nn.Module):
    """Several classifiers as one model; `config` is the first's."""

    def __init__(self, members: list[PreTrainedModel]):
        super().__init__()
        self.members: Any = nn.ModuleList(members)
        self.config = members[0].config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> Any:
        """The first's output, with combined logits: at `config.label_temperature` they give the mean of the members'
        probabilities, each at its own temperature."""
        outputs = [member(input_ids, **arguments) for member in self.members]
        answer = outputs[0]
        tempered = [o.logits / m.config.label_temperature for o, m in zip(outputs, self.members, strict=True)]
        answer.logits = self.config.label_temperature * _mean(tempered)
        if getattr(answer, "topic_logits", None) is not None:
            answer.topic_logits = _mean([output.topic_logits for output in outputs])
        return answer


def _mean(logits: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean probabilities."""
    return torch.stack([each.float().log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))
