"""MemGPT's tokenizer: cased byte-level BPE in which words given one by one and words in a text get the same ids."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, MASK = "<pad>", "<end>", "<mask>"
SPECIAL_TOKENS = (PAD, END, MASK)  # ids 0, 1, 2


def _backend() -> Tokenizer:
    """An untrained tokenizer.

    One space is put before every text, so that its first word looks like all others and like a word given alone;
    decoding takes exactly one away, which makes the round trip exact for every string, leading spaces included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # `add_prefix_space` here concerns offsets alone: the space that we prepend has no place in the caller's text.
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


class MemGPTTokenizer(PreTrainedTokenizerFast):
    """The usual Hugging Face fast tokenizer (offsets, `word_ids`, padding) over `_backend`.

    It has no `__init__`: transformers rebuilds the tokenizer of a class that has one from its vocabulary alone, and
    takes the whole tokenizer.json otherwise.
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
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that nothing is unknown
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK)


def canonical_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None) -> torch.Tensor:
    """For each token id, the lowest id whose text is the same up to case and surrounding spaces: int64 [V].

    Tokens that are not text on their own (parts of a character) and special tokens stand for themselves.
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
