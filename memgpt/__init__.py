"""MemGPT: a memory-augmented GPT for language tasks, and the pipeline that keeps it up to date.

The model classes, as in `from memgpt import MemGPTTokenizer, MemGPTForTokenClassification`, are imported on first use,
so that the command line starts without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memgpt.model import (
        MemGPTConfig,
        MemGPTForCausalLM,
        MemGPTForMultiTask,
        MemGPTForRecommendation,
        MemGPTForSequenceClassification,
        MemGPTForTokenClassification,
        MemGPTModel,
        MemGPTTokenizer,
    )

__all__ = [
    "MemGPTConfig",
    "MemGPTForCausalLM",
    "MemGPTForMultiTask",
    "MemGPTForRecommendation",
    "MemGPTForSequenceClassification",
    "MemGPTForTokenClassification",
    "MemGPTModel",
    "MemGPTTokenizer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import memgpt.model

        return getattr(memgpt.model, name)
    raise AttributeError(f"module 'memgpt' has no attribute {name!r}")
