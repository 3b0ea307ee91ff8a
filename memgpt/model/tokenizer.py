"""MemGPT's tokenizer: cased byte-level BPE. A word gets the same ids whether it is given alone or within a text."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, MASK = "<pad>", "<end>", "<mask>"
SPECIAL_TOKENS = (PAD, END, MASK)  # ids 0, 1, 2


def _backend() -> Tokenizer:
    """An untrained tokenizer.

    A space is prepended to every text, so that its first word is tokenized like all others and like a word given alone.
    Decoding removes exactly one space, so the round trip is exact for every string, including leading spaces.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Here `add_prefix_space` affects only offsets: the prepended space does not exist in the caller's text.
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


class MemGPTTokenizer(PreTrainedTokenizerFast):
    """A standard Hugging Face fast tokenizer (offsets, `word_ids`, padding) over `_backend`.

    It has no `__init__`, because transformers rebuilds tokenizers whose class defines one from the vocabulary alone.
    Otherwise it loads the whole tokenizer.json.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> "MemGPTTokenizer":
        """Learn the merges from texts; deterministic for the same texts in the same order."""
        tokenizer = _backend()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK)


def canonical_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None) -> torch.Tensor:
    """For each token id, the lowest id whose text is the same up to case and surrounding spaces: int64 [V].

    Special tokens, and tokens that are not text on their own (parts of a character), map to themselves.
    """
    size = vocab_size or len(tokenizer)
    canonical = torch.arange(size)
    first: dict[str, int] = {}
    special = set(tokenizer.all_special_ids)
    for token in range(min(size, len(tokenizer))):
        text = tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        folded = text.strip().casefold()
        if token in special or not folded or "\N{REPLACEMENT CHARACTER}" in text:
            continue
        canonical[token] = first.setdefault(folded, token)
    return canonical
