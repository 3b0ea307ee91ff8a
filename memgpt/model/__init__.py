"""The core. Imports torch and transformers (with numpy and tokenizers) and nothing else of the project."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from memgpt.model.config import PRESETS, MemGPTConfig
from memgpt.model.heads import (
    MemGPTForMultiTask,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
)
from memgpt.model.model import MemGPTForCausalLM, MemGPTForMaskedLM, MemGPTModel, MemGPTPreTrainedModel
from memgpt.model.tokenizer import MemGPTTokenizer, canonical_ids

AutoConfig.register("memgpt", MemGPTConfig, exist_ok=True)
AutoTokenizer.register(MemGPTConfig, fast_tokenizer_class=MemGPTTokenizer, exist_ok=True)
AutoModel.register(MemGPTConfig, MemGPTModel, exist_ok=True)
AutoModelForCausalLM.register(MemGPTConfig, MemGPTForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(MemGPTConfig, MemGPTForMaskedLM, exist_ok=True)
AutoModelForTokenClassification.register(MemGPTConfig, MemGPTForTokenClassification, exist_ok=True)
AutoModelForSequenceClassification.register(MemGPTConfig, MemGPTForSequenceClassification, exist_ok=True)

__all__ = [
    "PRESETS",
    "MemGPTConfig",
    "MemGPTForCausalLM",
    "MemGPTForMaskedLM",
    "MemGPTForMultiTask",
    "MemGPTForRecommendation",
    "MemGPTForSequenceClassification",
    "MemGPTForTokenClassification",
    "MemGPTModel",
    "MemGPTPreTrainedModel",
    "MemGPTTokenizer",
    "canonical_ids",
]
