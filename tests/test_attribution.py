"""What moved a prediction: shares add up, the memory's part is exact, and a planted cause is found."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from memories import give_memory
from typer.testing import CliRunner

from memgpt import attribution, cli
from memgpt.model import (
    MemGPTConfig,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
)
from memgpt.model.word_votes import spelling
from memgpt.predict.recommendation import build_index

TEXT = "The bank raised its rates. Ada Brandt kept hers."
ITEMS = [{"item_id": f"i{n}", "title": f"Rates story {n}", "description": "", "tags": ""} for n in range(4)]
KINDS = {
    "sentiment": (MemGPTForSequenceClassification, ["negative", "neutral", "positive"]),
    "ner": (MemGPTForTokenClassification, ["O", "B-PER", "I-PER"]),
    "recommendation": (MemGPTForRecommendation, ["a", "b"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model per task, with random weights in the memory too, so that it has something to say."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = MemGPTTokenizer.train([TEXT] * 4, vocab_size=300)
    for task, (kind, labels) in KINDS.items():
        torch.manual_seed(0)
        config = MemGPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            memory_rows=997,
            memory_dim=4,
            memory_ngrams=[1, 2],
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            word_vote_rows=499,
            word_vote_weight=2.0,
        )
        model = kind(config).eval()
        give_memory(model)
        if task == "sentiment":
            model.word_votes.spelling.copy_(spelling(tokenizer, len(tokenizer)))
            ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
            read = model.word_votes.addresses(ids, model.model.ngram_hash.canonical_ids).unique()
            model.word_votes.idf[read[read > 0]] = 2.0
            model.word_votes.table.weight.data[read[read > 0]] = torch.randn(int((read > 0).sum()), 3)
        if task == "ner":
            torch.nn.init.normal_(model.word_votes.table.weight[1:], std=0.05)
            model.word_votes.spelling.copy_(spelling(tokenizer, len(tokenizer)))
            torch.nn.init.constant_(model.head.score.bias[1:2], 3.0)  # finds something everywhere
        model.save_pretrained(root / task)
        tokenizer.save_pretrained(root / task)
        if task == "recommendation":
            build_index(model, tokenizer, ITEMS, {}, root / task)
    return root


@pytest.mark.parametrize("task", KINDS)
def test_shares_add_up_to_the_score(models: Path, task: str) -> None:
    texts = ["i1", TEXT] if task == "recommendation" else [TEXT]
    found = attribution.explain(task, models / task, texts, steps=100)
    assert found
    for each in found:
        assert len(each.tokens) == len(each.shares)
        moved = sum(map(abs, each.shares)) + sum(abs(entry.share) for entry in each.memory)
        assert abs(each.error) < 0.01 * moved
        assert sum(abs(entry.share) for entry in each.memory) > 0.05 * moved
        assert {entry.n for entry in each.memory} == {1, 2}


@pytest.mark.parametrize("text", ["The", "The bank"])
@pytest.mark.parametrize("task", KINDS)
def test_a_text_of_a_token_or_two_is_explained(models: Path, task: str, text: str) -> None:
    for each in attribution.explain(task, models / task, [text], steps=100):
        assert len(each.tokens) <= 3
        moved = sum(map(abs, each.shares)) + sum(abs(entry.share) for entry in each.memory)
        assert abs(each.error) < 0.02 * moved


def test_a_character_of_several_tokens_is_shown_once() -> None:
    tokenizer = MemGPTTokenizer.train([TEXT] * 4, vocab_size=300)
    ids = tokenizer("Ada 😀é fell", add_special_tokens=False)["input_ids"]
    shown = attribution._shown(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == "Ada😀éfell"
    assert shown[shown.index("😀") + 1] == ""


def test_every_name_of_a_long_text_is_explained(models: Path, tmp_path: Path) -> None:
    from memgpt import predict

    shutil.copytree(models / "ner", tmp_path / "ner")
    settings = json.loads((tmp_path / "ner/config.json").read_text())
    (tmp_path / "ner/config.json").write_text(json.dumps({**settings, "window": 8}))
    text = "The bank raised its rates. " * 3 + TEXT
    entities = predict.load("ner", tmp_path / "ner").predict([text])[0]
    found = attribution.explain("ner", tmp_path / "ner", [text], steps=4)
    assert len(entities) > 1
    assert [each.answer for each in found] == [f"{entity['text']}: {entity['type']}" for entity in entities]
    assert all(len(each.tokens) <= 8 for each in found)


def test_the_memorys_share_is_of_the_entries_that_were_read(models: Path) -> None:
    """A table emptied of all but one n-gram's rows leaves all of the memory's share to that n-gram."""
    from memgpt import predict

    predictor = predict.load("sentiment", models / "sentiment")
    ids = predictor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    rows = predictor.model.model.ngram_hash(torch.tensor([ids]), torch.arange(len(ids))[None])[0, :, :]
    heads, place = predictor.model.config.memory_heads, 3
    kept = rows[predictor.model.model.ngram_hash.lead + place, heads:]  # of the 2-gram ending there
    table = predictor.model.model.memory_table.weight
    empty = torch.zeros_like(table)
    empty[kept] = table.data[kept]
    table.data = empty
    found = attribution._sentiment(predictor, TEXT, steps=100)
    recalled = [entry for entry in found.memory if entry.recalled]
    shares = {(entry.n, entry.position): entry.share for entry in found.memory if not entry.recalled}
    assert abs(shares[2, place]) > 0
    assert sum(map(abs, shares.values())) == pytest.approx(abs(shares[2, place]))
    moved = [*found.shares, *shares.values(), *(entry.share for entry in recalled)]
    assert abs(found.error) < 0.01 * sum(map(abs, moved))


def test_what_is_recalled_is_told_with_what_it_followed(models: Path) -> None:
    found = attribution.explain("sentiment", models / "sentiment", ["rates rose. rates"], steps=100)[0]
    [last] = [entry for entry in found.memory if entry.recalled and entry.position == len(found.tokens) - 1]
    assert last.text.startswith("rates → ") or last.text.endswith("→ rose"), last
    assert last.share != 0


def test_a_planted_cause_has_the_largest_share(models: Path) -> None:
    """The score made to follow one token's embedding alone."""
    from memgpt import predict

    predictor = predict.load("sentiment", models / "sentiment")
    ids = predictor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    direction = predictor.model.model.embed_tokens.weight[ids[4]].detach()
    found = attribution._attribute(
        predictor,
        ids,
        lambda input_ids: (
            predictor.model.model.embed_tokens(input_ids)[:, 4] @ direction
            + 0.0 * predictor.model(input_ids=input_ids).logits.sum(-1)  # runs all layers
        ),
        16,
        "",
        "",
    )
    assert found.shares[4] > 0.9 * sum(map(abs, found.shares)) > 0
    assert abs(found.error) < 1e-4 * found.shares[4]


def test_an_answer_is_printed_and_drawn(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.look, "load_config", lambda: None)
    monkeypatch.setattr(cli.look, "compute_with", lambda _: None)
    page = tmp_path / "why.html"
    command = ["explain", "sentiment", "<b>Rates</b> rose", "--dir", str(models / "sentiment"), "--html", str(page)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "log-odds" in done.output
    drawn = page.read_text()
    assert "<b>" not in drawn  # what a text says is never markup
    assert "&lt;" in drawn
    assert not re.search(r"(src|href)=", drawn)  # self-contained
    wrong = CliRunner().invoke(cli.app, ["explain", "ner", "Ada", "--dir", str(models / "sentiment")])
    assert "holds a MemGPTForSequenceClassification, no model for ner, which is a MemGPTForTokenCl" in str(
        wrong.exception
    )
    printed = CliRunner().invoke(cli.app, [*command[:5], "--json"]).stdout
    assert json.loads(printed)["answer"] in KINDS["sentiment"][1]


def test_an_empty_text_is_refused(models: Path) -> None:
    with pytest.raises(ValueError, match="text: is empty"):
        attribution.explain("ner", models / "ner", [" "])
