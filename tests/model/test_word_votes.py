"""Votes of words: silent at first, blind to padding, left alone by training."""

import math
from itertools import chain
from pathlib import Path

import pytest
import torch

from memgpt import config, tuning
from memgpt.model import (
    MemGPTConfig,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
    canonical_ids,
)
from memgpt.model.word_votes import TOKEN_FEATURES, spelling
from memgpt.predict.words import encode_words

NAMES = ["Ada", "Brandt", "Zork", "Yulia", "Quill", "Omar"]
WORDS = ["so", "So", "said", "Mr", "and", "left", *NAMES]


@pytest.fixture(scope="module")
def tokenizer() -> MemGPTTokenizer:
    return MemGPTTokenizer.train([" ".join(WORDS)] * 4, vocab_size=400)


SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, memory_layers=[], num_labels=2)


@pytest.fixture
def model(tokenizer: MemGPTTokenizer) -> MemGPTForTokenClassification:
    torch.manual_seed(0)
    shape = MemGPTConfig(vocab_size=len(tokenizer), **SHAPE, word_vote_rows=9973, word_vote_weight=0.5)
    made = MemGPTForTokenClassification(shape).eval()
    made.word_votes.spelling.copy_(spelling(tokenizer, shape.vocab_size))
    made.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer))
    return made


def ids(tokenizer: MemGPTTokenizer, text: str) -> torch.Tensor:
    return torch.tensor([[*chain.from_iterable(encode_words(tokenizer, text.split()))]])


def test_it_starts_silent(model: MemGPTForTokenClassification, tokenizer: MemGPTTokenizer) -> None:
    text = ids(tokenizer, "Mr Ada left")
    before = model(text).logits
    model.word_votes = None
    assert torch.equal(model(text).logits, before)


def test_padding_and_neighbours_in_the_batch_change_nothing(
    model: MemGPTForTokenClassification, tokenizer: MemGPTTokenizer
) -> None:
    torch.nn.init.normal_(model.word_votes.table.weight[1:])
    canonical = model.model.ngram_hash.canonical_ids
    short, long = ids(tokenizer, "Mr Ada left"), ids(tokenizer, "so said Mr Yulia Quill and left")
    room = long.shape[1] - short.shape[1]
    batch = torch.cat((torch.nn.functional.pad(short, (0, room), value=tokenizer.pad_token_id), long))
    votes = model.word_votes(batch, canonical)
    torch.testing.assert_close(votes[:1, : short.shape[1]], model.word_votes(short, canonical))
    assert not votes[0, short.shape[1] :].any()


def test_words_of_another_packed_document_do_not_vote(
    model: MemGPTForTokenClassification, tokenizer: MemGPTTokenizer
) -> None:
    torch.nn.init.normal_(model.word_votes.table.weight[1:])
    texts = [ids(tokenizer, text) for text in ("Mr Ada left", "so", "said Mr Yulia Quill")]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    alone = torch.cat([model(text).logits for text in texts], dim=1)
    row = torch.cat(texts, dim=1)
    torch.testing.assert_close(model(row, position_ids=positions).logits, alone)
    torch.testing.assert_close(model(row.repeat(2, 1), position_ids=positions).logits, alone.repeat(2, 1, 1))
    assert not torch.allclose(model(row).logits, alone)


def test_votes_of_a_packed_row_are_one_graph(model: MemGPTForTokenClassification, tokenizer: MemGPTTokenizer) -> None:
    """Their cost is that of the row, whatever its documents are."""
    torch.nn.init.normal_(model.word_votes.table.weight[1:])
    canonical, documents = model.model.ngram_hash.canonical_ids, [80, *[8] * 50]
    row, positions = ids(tokenizer, " ".join(WORDS * 40)), torch.cat([torch.arange(length) for length in documents])
    votes = torch.compile(model.word_votes, fullgraph=True, backend="eager")(row, canonical, positions[None])
    alone = [model.word_votes(text, canonical) for text in row.split(documents, dim=1)]
    torch.testing.assert_close(votes, torch.cat(alone, dim=1))


def test_a_words_tokens_vote_alike_and_its_case_and_context_count(
    model: MemGPTForTokenClassification, tokenizer: MemGPTTokenizer
) -> None:
    votes, canonical = model.word_votes, model.model.ngram_hash.canonical_ids
    text = ids(tokenizer, "so Xqyvia left")
    words = votes.words(text)[0]
    assert words.max() == 2
    assert (words == 1).sum() > 1  # a word of several tokens
    addresses = votes.addresses(text, canonical)[0]
    assert (addresses[words == 1] == addresses[words == 1][0]).all()
    upper, lower = (votes.addresses(ids(tokenizer, f"so {word} left"), canonical)[0, 1] for word in ("So", "so"))
    differ = {TOKEN_FEATURES[place] for place in (upper != lower).nonzero()[:, 0].tolist()}
    assert (("exact", 0),) in differ
    assert (("shape", 0),) in differ
    assert (("word", 0),) not in differ  # folded
    assert (("word", -1),) not in differ


@pytest.fixture
def classifier(tokenizer: MemGPTTokenizer) -> MemGPTForSequenceClassification:
    torch.manual_seed(0)
    shape = MemGPTConfig(vocab_size=len(tokenizer), **SHAPE, word_vote_rows=99991, word_vote_weight=0.5)
    made = MemGPTForSequenceClassification(shape).eval()
    made.word_votes.spelling.copy_(spelling(tokenizer, shape.vocab_size))
    made.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer))
    torch.nn.init.normal_(made.word_votes.table.weight[1:])
    torch.nn.init.uniform_(made.word_votes.idf[1:], 1, 3)
    torch.nn.init.normal_(made.word_votes.bias)
    return made


def encoded(tokenizer: MemGPTTokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_a_text_votes_with_each_of_its_words_and_word_pairs_once(
    classifier: MemGPTForSequenceClassification, tokenizer: MemGPTTokenizer
) -> None:
    votes, canonical = classifier.word_votes, classifier.model.ngram_hash.canonical_ids
    words = [["So", "Mr", "Ada", ",", "left", "so", "Mr", "Quill"], ["left", "."]]
    texts = ["So Mr Ada, left so Mr Quill", "left."]
    pad = tokenizer.pad_token_id
    rows = [encoded(tokenizer, text)[0] for text in texts]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    address = {}  # of a word and its pair with the next, from texts of two or three words
    for line in words:
        for first, second in zip(line, [*line[1:], None], strict=True):
            text = " ".join(filter(None, ("Ada" if first in ",." else "", first, second)))
            text = text.replace(" ,", ",").replace(" .", ".")
            found = votes.addresses(encoded(tokenizer, text), canonical)[0]
            address[first, second] = found[found.any(-1)][int(first in ",.")].tolist()
    for line, found in zip(words, votes(batch, canonical), strict=True):
        pairs = zip(line, [*line[1:], None], strict=True)
        features = {row for pair in pairs for row in address[pair]}
        idf = {row: votes.idf[row].item() for row in features}
        length = math.sqrt(sum(value**2 for value in idf.values()))
        expected = votes.bias + sum(votes.table.weight[row] * value / length for row, value in idf.items())
        torch.testing.assert_close(found, expected)


@pytest.fixture(params=["token", "text"])
def voting(request: pytest.FixtureRequest, model, classifier):
    """A model of each kind whose words say something."""
    torch.nn.init.normal_(model.word_votes.table.weight[1:])
    return {"token": model, "text": classifier}[request.param]


def test_votes_count_in_answers_and_not_in_training(voting, tokenizer: MemGPTTokenizer, tmp_path: Path) -> None:
    text = encoded(tokenizer, "so Mr Ada left")
    answer = voting(text).logits
    training = voting.train()(text, labels=torch.ones(answer.shape[:-1], dtype=torch.long))
    voting.save_pretrained(tmp_path)
    again = type(voting).from_pretrained(tmp_path).eval()
    assert torch.equal(again(text).logits, answer)
    votes = again.word_votes(text, again.model.ngram_hash.canonical_ids)
    torch.testing.assert_close(answer, training.logits + 0.5 * votes)
    training.loss.backward()
    assert voting.word_votes.table.weight.grad is None
    untouched = [name for name, weight in again.named_parameters() if weight.requires_grad and "votes" in name]
    assert not untouched  # DistributedDataParallel would wait for their gradients


def test_ids_of_fewer_bits_have_the_same_votes(voting, tokenizer: MemGPTTokenizer) -> None:
    text = encoded(tokenizer, "so Mr Ada left")
    assert torch.equal(voting(text.int()).logits, voting(text).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_attention_mask_hides_does_not_vote(voting, side: str, tokenizer: MemGPTTokenizer) -> None:
    """Padding with another token than the model's own."""
    text = encoded(tokenizer, "so Mr Ada left")
    blank, rows = torch.full((1, 2), int(text[0, 1])), (text, torch.ones_like(text))
    padded, mask = (
        torch.cat((added, row) if side == "left" else (row, added), dim=1)
        for row, added in zip(rows, (blank, torch.zeros_like(blank)), strict=True)
    )
    answer = voting(padded, attention_mask=mask).logits
    if answer.dim() == 3:
        answer = answer[:, mask[0].bool()]
    torch.testing.assert_close(answer, voting(text).logits)


@pytest.mark.parametrize("more", [3, -1])
def test_the_vocabulary_may_change(voting, more: int, tokenizer: MemGPTTokenizer, tmp_path: Path) -> None:
    text = encoded(tokenizer, "Mr Ada left")
    before = voting(text).logits
    voting.resize_token_embeddings(len(tokenizer) + more)
    assert torch.equal(voting(text).logits, before)
    last = torch.full_like(text, len(tokenizer) + more - 1)
    voting.save_pretrained(tmp_path)
    assert torch.equal(type(voting).from_pretrained(tmp_path)(last).logits, voting(last).logits)


def test_low_rank_tuning_leaves_votes_alone(voting) -> None:
    document = config.read("params.yaml")
    config.override(document, ["finetune.ner.tune=lora"])
    wrapped = tuning.prepare(voting, config.parse(document).finetune.ner, 10)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert any("head" in name for name in trained)
    assert not any("word_votes" in name for name in trained)
