"""The tokenizer's promises: exact round trips, same ids pre-split or running, offsets that exclude the space."""

import pytest
import torch

from memgpt.model import MemGPTTokenizer, canonical_ids

TEXTS = ["Apple rose 3 % . The apple fell , said Mr Reed of the bank; don't stop"] * 10 + ["你好世界，銀行 😀"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> MemGPTTokenizer:
    return MemGPTTokenizer.train(TEXTS, vocab_size=400, min_frequency=1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "bank",
        "  two spaces",
        "a  b ",
        "你好世界",
        "😀👩‍👩‍👧 x\n\ty",
        bytes(range(256)).decode("latin-1"),
        "\ufffd\u200b",
    ],
)
def test_round_trip_is_exact(tokenizer: MemGPTTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_alone_and_in_a_text_get_the_same_ids(tokenizer: MemGPTTokenizer) -> None:
    words = ["the", "Bank", "of", "Reed", "don't", "3", "%", "你好世界"]
    assert tokenizer(words, is_split_into_words=True)["input_ids"] == tokenizer(" ".join(words))["input_ids"]


def test_offsets_exclude_the_leading_space(tokenizer: MemGPTTokenizer) -> None:
    text = "the bank fell"
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[a:b] for a, b in spans) == "thebankfell"


def test_saved_and_loaded_is_the_same(tokenizer: MemGPTTokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = MemGPTTokenizer.from_pretrained(tmp_path)
    assert again("the bank 你好")["input_ids"] == tokenizer("the bank 你好")["input_ids"]
    assert (again.pad_token_id, again.eos_token_id, again.mask_token_id) == (0, 1, 2)


def test_canonical_ids_fold_case_and_space(tokenizer: MemGPTTokenizer) -> None:
    canonical = canonical_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert canonical[vocabulary["A"]] == canonical[vocabulary["a"]]
    assert canonical[vocabulary["3"]] == canonical[vocabulary["Ġ3"]]
    assert canonical[vocabulary["a"]] != canonical[vocabulary["b"]]
    assert torch.equal(canonical[:3], torch.arange(3))
