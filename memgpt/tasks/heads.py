"""Starting a task's model from a trunk."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from memgpt.errors import UserError
from memgpt.model import MemGPTForMultiTask
from memgpt.model.word_votes import spelling

Model = TypeVar("Model", bound=PreTrainedModel)


def start(kind: type[Model], task: str, parent: Path, **settings: Any) -> Model:
    """A model of class `kind` on the trunk in `parent`; a multi-task parent also provides the task's head.

    settings override the parent's configuration (labels, dropout, window, …). The weights become float32, even if a
    converted parent has fewer bits, in which small steps would be lost.

    Raises:
        UserError: if a multi-task parent's head was made for other labels or topics, or for another order of them.
    """
    made_for = AutoConfig.from_pretrained(parent)
    if made_for.task_labels:
        had = {"id2label": dict(enumerate(made_for.task_labels.get(task, ()))), "topics": made_for.topics}
        for setting, name in (("id2label", "labels"), ("topics", "topics")):
            if setting in settings and settings[setting] != had[setting]:
                raise UserError(
                    f"{parent}: its {task} head was made for other {name} than those of data/tables/{task}; "
                    f"run `memgpt multitask` first, or set finetune.{task}.start=base"
                )
        joint = MemGPTForMultiTask.from_pretrained(parent, dtype=torch.float32)
        model = kind(AutoConfig.from_pretrained(parent, **{"task_labels": None, "topics": None, **settings}))
        model.model.load_state_dict(joint.model.state_dict())
        model.head.load_state_dict(joint.heads[task].state_dict())
    else:
        model = kind.from_pretrained(parent, dtype=torch.float32, **settings)
    if (table := getattr(model, "word_votes", None)) is not None:
        table.spelling.copy_(spelling(AutoTokenizer.from_pretrained(parent), model.config.vocab_size))
    return model
