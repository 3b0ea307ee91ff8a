"""What is suggested for labelling: the uncertain, one of each kind, with its place in the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from memgpt import cli, predict, suggest
from memgpt.errors import UserError
from memgpt.model import (
    MemGPTConfig,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
)

TEXTS = [
    f"{who} {what} {when}" for who in ("Ada", "The bank") for what in ("rose", "fell") for when in ("now", "again")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tokenizer = MemGPTTokenizer.train(TEXTS, vocab_size=300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    for task, kind in (("sentiment", MemGPTForSequenceClassification), ("ner", MemGPTForTokenClassification)):
        labels = ["negative", "positive"] if task == "sentiment" else ["O", "B-PER", "I-PER"]
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model = kind(MemGPTConfig(vocab_size=len(tokenizer), memory_rows=97, memory_dim=4, **shape, **names))
        torch.nn.init.normal_(model.head.score.weight, std=0.5)  # sure of some, not of others
        model.save_pretrained(root / task)
        tokenizer.save_pretrained(root / task)
    return root


def test_uncertainty_and_diversity_both_count() -> None:
    features = np.repeat(np.eye(3), [5, 4, 1], axis=0)
    uncertainty = np.array([0.50, 0.49, 0.48, 0.47, 0.46, 0.1, 0.4, 0.2, 0.3, 0.05])
    chosen, sizes = suggest._diverse(uncertainty, features, 3, seed=0)
    assert chosen.tolist() == [0, 6, 9]  # of each kind the most uncertain, not the three most uncertain
    assert sizes.tolist() == [5, 4, 1]
    assert len(suggest._diverse(uncertainty, features, 8, seed=0)[0]) == 3  # there are no more kinds


def test_sentiment_rows_are_named_by_their_place(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.jsonl"
    lines = [{"review": text} for text in (*TEXTS, TEXTS[0], "")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = suggest.suggest("sentiment", models / "sentiment", file, 3)
    assert len({row["text"] for row in found}) == len(found) == 3
    assert [row["uncertainty"] for row in found] == sorted((row["uncertainty"] for row in found), reverse=True)
    assert sum(row["stands_for"] for row in found) == len(TEXTS)
    for row in found:
        assert row["uncertainty"] == pytest.approx(1 - max(row["prediction"]["scores"].values()), abs=1e-4)
        assert row["from"].endswith(f"new.jsonl line {TEXTS.index(row['text']) + 1}")
        assert f"{1 - row['uncertainty']:.2f}" in row["reason"]
    assert found == suggest.suggest("sentiment", models / "sentiment", file, 3)


def test_probabilities_are_those_that_are_served(models: Path, tmp_path: Path) -> None:
    """At the model's temperature: what `pseudo-label` keeps is as sure as it says."""
    shutil.copytree(models / "sentiment", tmp_path / "tempered")
    settings = json.loads((tmp_path / "tempered/config.json").read_text())
    (tmp_path / "tempered/config.json").write_text(json.dumps({**settings, "label_temperature": 4.0}))
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for row in suggest.suggest("sentiment", tmp_path / "tempered", file, len(TEXTS)):
        assert row["uncertainty"] == pytest.approx(1 - max(row["prediction"]["scores"].values()), abs=1e-4)


@pytest.mark.parametrize(("name", "column"), [("new.txt", "text"), ("new.jsonl", "tokens")])
def test_ner_takes_texts_and_words(models: Path, tmp_path: Path, name: str, column: str) -> None:
    file = tmp_path / name
    rows = "\n".join(json.dumps({"tokens": text.split()}) for text in TEXTS)
    file.write_text(rows if column == "tokens" else "\n\n".join(TEXTS))
    found = suggest.suggest("ner", models / "ner", file, 2)
    assert len(found) == 2
    for row in found:
        assert (row[column] if column == "text" else " ".join(row[column])) in TEXTS
        assert 0 < row["uncertainty"] < 2 / 3
        assert all(entity["type"] == "PER" for entity in row["prediction"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("new.jsonl", '{"headline": "a"}\n', "no column of texts; call one text or"),
        ("new.jsonl", '{"text": "a"}\n{"text": 3}\n', "new.jsonl line 2: text is not a text"),
        ("new.jsonl", '{"text": " "}\n', "text holds no text"),
        ("new.doc", "a", "not a format that is read"),
        (None, "", "not found"),
    ],
)
def test_a_file_that_does_not_do_is_one_line(
    models: Path, tmp_path: Path, name: str | None, content: str, told: str
) -> None:
    file = tmp_path / (name or "gone.txt")
    if name:
        file.write_text(content)
    with pytest.raises(UserError, match=told) as error:
        suggest.suggest("sentiment", models / "sentiment", file, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["sentiment", "ner"])
def test_what_the_model_is_sure_of_becomes_training_rows(models: Path, tmp_path: Path, task: str) -> None:
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    every, read = suggest.pseudo_label(task, models / task, file, 0.0)
    assert len(every) == read == len(TEXTS)
    predictor = predict.load(task, models / task)
    for row, text in zip(every, TEXTS, strict=True):
        if task == "sentiment":
            assert row == {"text": text, "label": predictor.predict([text])[0]["label"]}
        else:
            assert row["tokens"] == text.split()
            spans = {(entity["start"], entity["type"]) for entity in predictor.predict([text])[0]}
            starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"])])
            assert {(starts[i], tag[2:]) for i, tag in enumerate(row["tags"]) if tag[0] == "B"} == spans
    assert "topic" not in every[0]
    least = float(np.median([1 - row["uncertainty"] for row in suggest.suggest(task, models / task, file, 8)]))
    some, _ = suggest.pseudo_label(task, models / task, file, least)
    assert 0 < len(some) < len(every)
    assert all(row in every for row in some)


def test_no_file_is_written_over_and_none_without_rows(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.look, "load_config", lambda: None)
    monkeypatch.setattr(cli.look, "compute_with", lambda _: None)
    file, out = tmp_path / "new.jsonl", tmp_path / "train-pseudo.jsonl"
    lines = [*({"text": text, "topic": "banks"} for text in TEXTS), {"text": TEXTS[0], "topic": "again"}, {"text": " "}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ask(target: Path, least: str) -> Result:
        arguments = [str(file), str(target), "--least", least, "--dir", str(models / "sentiment")]
        return CliRunner().invoke(cli.app, ["pseudo-label", "sentiment", *arguments])

    before = file.read_text()
    assert "is there already; name a new file" in str(ask(file, "0").exception)
    assert file.read_text() == before
    assert f"the model is sure of none of its {len(lines)} rows" in str(ask(out, "1").exception)
    assert not out.exists()
    assert f"{len(TEXTS)} of {len(lines)} rows" in " ".join(ask(out, "0").output.split())
    assert {json.loads(line)["topic"] for line in out.read_text().splitlines()} == {"banks"}
    numbers = tmp_path / "numbers.parquet"
    pd.DataFrame({"text": TEXTS[:2], "topic": [1.5, None]}).to_parquet(numbers)
    rows, _ = suggest.pseudo_label("sentiment", models / "sentiment", numbers, 0.0)
    assert [row["topic"] for row in rows] == ["1.5", None]
