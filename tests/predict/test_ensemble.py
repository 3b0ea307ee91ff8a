"""An ensemble answers with the mean of its members' probabilities, however it is loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from memgpt import attribution, lineage, predict
from memgpt.model import (
    MemGPTConfig,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
)
from memgpt.predict import ensemble
from memgpt.suggest import suggest

TEXTS = ["Ada Brandt of Norvale Systems fell in Port Dunham, said the bank.", "Ada fell", "the bank rose", ""]
KINDS = {"ner": MemGPTForTokenClassification, "sentiment": MemGPTForSequenceClassification}
LABELS = {"ner": ["O", "B-PER", "I-PER"], "sentiment": ["down", "even", "up"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """ner/ and sentiment/, each with the models of two members, a/ and b/, and both/, their ensemble."""
    place = tmp_path_factory.mktemp("members")
    tokenizer = MemGPTTokenizer.train(TEXTS * 4, 320, 1)
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, memory_rows=31, memory_dim=4, initializer_range=0.5)
    for task, kind in KINDS.items():
        labels = dict(enumerate(LABELS[task]))
        names = dict(id2label=labels, label2id={name: index for index, name in labels.items()})
        for seed, temperature in enumerate((0.5, 3.0)):
            torch.manual_seed(seed)
            topics = ["banks", "plants"] if task == "sentiment" else None
            model = kind(MemGPTConfig(**shape, **names, label_temperature=temperature, topics=topics))
            model.save_pretrained(place / task / "ab"[seed])
            tokenizer.save_pretrained(place / task / "ab"[seed])
        shutil.copytree(place / task / "a", place / task / "both")
        shutil.copytree(place / task / "b", place / task / "both/member-2")
    return place


def probabilities(answers: list[dict]) -> np.ndarray:
    return np.array([list(answer["scores"].values()) for answer in answers])


@pytest.mark.parametrize("memory", ["resident", "mapped"])
def test_the_scores_are_the_mean_of_the_members(made: Path, memory: str) -> None:
    a, b, both = (predict.load("sentiment", made / "sentiment" / name, memory=memory) for name in ("a", "b", "both"))
    first, second, answers = (each.predict(TEXTS) for each in (a, b, both))
    mean = (probabilities(first) + probabilities(second)) / 2
    np.testing.assert_allclose(probabilities(answers), mean, atol=2e-6)
    assert (probabilities(first).argmax(1) != probabilities(second).argmax(1)).any(), "they are not one model"
    assert all(
        answer["label"] == LABELS["sentiment"][best] for answer, best in zip(answers, mean.argmax(1), strict=True)
    )
    ids = torch.tensor([[5, 6, 7]])
    topics = torch.stack([each.model(ids).topic_logits.softmax(-1) for each in (a, b)]).mean(0)
    torch.testing.assert_close(both.model(ids).topic_logits.exp(), topics)


def test_tags_are_chosen_by_the_mean_of_each_word(made: Path) -> None:
    a, b, both = (predict.load("ner", made / "ner" / name).model for name in ("a", "b", "both"))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids > 0).long()
    mean = sum((each(ids, attention_mask=mask).logits / each.config.label_temperature).softmax(-1) for each in (a, b))
    logits = both(ids, attention_mask=mask).logits / both.config.label_temperature
    torch.testing.assert_close(logits.softmax(-1), mean / 2)
    assert any(predict.load("ner", made / "ner/both").predict(TEXTS))


def test_every_member_is_accelerated(made: Path) -> None:
    exact = predict.load("sentiment", made / "sentiment/both")
    fast = predict.load("sentiment", made / "sentiment/both", weights="bfloat16")
    assert {member.dtype for member in fast.model.members} == {torch.bfloat16} == {fast.model.dtype}
    np.testing.assert_allclose(probabilities(fast.predict(TEXTS)), probabilities(exact.predict(TEXTS)), atol=0.05)


def test_a_member_is_a_part_of_what_the_weights_are(made: Path, tmp_path: Path) -> None:
    before = lineage.weights_digest(made / "ner/both")
    assert before != lineage.weights_digest(made / "ner/a")
    shutil.copytree(made / "ner/both", tmp_path / "same")
    assert lineage.weights_digest(tmp_path / "same") == before
    shutil.copy(made / "ner/a/model.safetensors", tmp_path / "same/member-2")
    assert lineage.weights_digest(tmp_path / "same") != before


def test_it_is_explained_by_its_first_and_can_suggest(made: Path, tmp_path: Path) -> None:
    both, first = (attribution.explain("sentiment", made / "sentiment" / name, TEXTS[:1], 8) for name in ("both", "a"))
    assert both == first
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:3]))
    assert len(suggest("sentiment", made / "sentiment/both", tmp_path / "new.jsonl", 2)) == 2
    assert len(ensemble.directories(made / "sentiment/both")) == 2
