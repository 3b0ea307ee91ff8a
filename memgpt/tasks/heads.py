"""Starting a task's model from a trunk."""

from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedModel

from memgpt.model import MemGPTForMultiTask

Model = TypeVar("Model", bound=PreTrainedModel)


def start(kind: type[Model], task: str, parent: Path, **settings: Any) -> Model:
    """A model of class `kind` on the trunk in `parent`; a multi-task parent also gives the task's head.

    settings override the parent's configuration (labels, dropout, window, …).
    """
    if not AutoConfig.from_pretrained(parent).task_labels:
        return kind.from_pretrained(parent, **settings)
    joint = MemGPTForMultiTask.from_pretrained(parent)
    config = AutoConfig.from_pretrained(parent, **{"task_labels": None, "topics": None, **settings})
    model = kind(config)
    model.model.load_state_dict(joint.model.state_dict())
    model.head.load_state_dict(joint.heads[task].state_dict())
    return model
