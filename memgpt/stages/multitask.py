"""multitask: train the three tasks jointly on one trunk; each batch is of one task. Writes models/multitask."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, set_seed

from memgpt import atomic, checkpoint, distributed, lineage
from memgpt.config import TABLES, TASKS, Config, Multitask
from memgpt.errors import existing
from memgpt.model import MemGPTForMultiTask
from memgpt.tasks import judge
from memgpt.training import Log, train

BASE, JOINT = Path("models/base"), Path("models/multitask")


class Mixture(Dataset):
    """Whole batches, each of one task, drawn with probability ∝ size^(1 / mixing_temperature).

    Task and examples depend on the index alone, so a resumed run sees the same batches. Under torchrun each process
    returns its share of a batch. Recommendation is the exception: it compares all items of a batch with each other, so
    every process computes the whole batch.
    """

    def __init__(self, data: dict[str, Any], params: Multitask):
        self.data, self.params = data, params
        sizes = np.array([len(dataset) for dataset in data.values()], dtype=float)
        weights = sizes ** (1 / params.mixing_temperature)
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return self.params.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        random = np.random.default_rng([self.params.seed, step])
        task = list(self.data)[random.choice(len(self.data), p=self.shares)]
        dataset = self.data[task]
        chosen = random.choice(len(dataset), size=min(self.params.batch_size, len(dataset)), replace=False)
        if task != "recommendation":
            chosen = distributed.share(chosen)
        return {"task": task, **dataset.collate([dataset[int(index)] for index in chosen])}


def run(config: Config, log: Log | None = None) -> dict[str, float]:
    params = config.multitask
    tokenizer = AutoTokenizer.from_pretrained(existing(BASE))
    set_seed(params.seed)
    model = MemGPTForMultiTask.from_pretrained(
        BASE,
        dtype=torch.float32,
        task_labels={task: judge(task).labels(TABLES) for task in ("ner", "sentiment")},
        task_balancing=params.balancing == "uncertainty",
        topics=judge("sentiment").topics(TABLES),
        dropout=params.dropout,
        window=params.max_length,
        max_history=params.max_history,
        similarity_temperature=params.similarity_temperature,
    )
    lengths = {"ner": params.max_length, "sentiment": params.max_length, "recommendation": params.item_length}
    data = {
        task: judge(task).Training(TABLES, tokenizer, max_length=lengths[task], max_history=params.max_history)
        for task in TASKS
    }
    inputs = [BASE, *(TABLES / task for task in TASKS)]
    checkpoints = checkpoint.directory("multitask", params.model_dump(), inputs)
    model = train(
        model,
        Mixture(data, params),
        _the_batch,
        params,
        steps=params.steps,
        checkpoints=checkpoints,
        title="multitask",
        log=log,
        whole_batches=True,
    )
    if not distributed.first():
        return {}
    metrics = {f"validation_loss_{task}": _loss(model, task, tokenizer, params, lengths[task]) for task in TASKS}
    with atomic.replacing(JOINT) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        lineage.write(directory, "multitask", inputs, params.model_dump(), BASE, params.seed, metrics)
    checkpoint.discard(checkpoints)
    return metrics


@torch.no_grad()
def _loss(model: MemGPTForMultiTask, task: str, tokenizer: Any, params: Multitask, max_length: int) -> float:
    """Mean loss over the batches of a task's validation examples."""
    data = judge(task).Training(
        TABLES, tokenizer, max_length=max_length, max_history=params.max_history, split="validation"
    )
    size = params.batch_size
    losses = [
        model(task=task, **data.collate([data[i] for i in range(first, min(first + size, len(data)))])).loss.item()
        for first in range(0, len(data), size)
    ]
    return round(sum(losses) / max(1, len(losses)), 6)


def _the_batch(elements: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = elements
    return batch
