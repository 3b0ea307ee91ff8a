"""From tables to a model's answers: what fine-tuning and joint training leave in models/."""

import json
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from memgpt import config, predict
from memgpt.errors import UserError
from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTTokenizer
from memgpt.stages import finetune, multitask
from memgpt.training import train

ROOT = Path(__file__).parents[2]
TEXTS = {
    ("up", "banking"): "the bank reports good profits",
    ("down", "banking"): "the bank reports bad losses",
    ("up", "energy"): "the plant makes good power",
    ("down", "energy"): "the plant makes bad power",
}


def put(source: str, table: str, rows: list[dict]) -> None:
    folder = Path("data/tables") / source
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{table}.parquet")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """Tables of four sentences, a base model of a few thousand weights, and few steps."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation", "test"):
        texts = [(label, topic, text) for (label, topic), text in TEXTS.items()] * 10
        put(
            "sentiment",
            split,
            [{"id": "", "text": text, "label": label, "topic": topic} for label, topic, text in texts],
        )
        put("ner", split, [{"id": "", "tokens": ["Ada", "Brandt", "fell"], "tags": ["B-PER", "I-PER", "O"]}] * 10)
        events = [
            {"user_id": "ann", "item_id": f"i{n}", "timestamp": n, "event": None, "rating": None} for n in range(3)
        ]
        put("recommendation", split, events)
    items = [{"item_id": f"i{n}", "title": f"plant {n}", "description": "", "tags": ""} for n in range(5)]
    put("recommendation", "items", items)
    for source, labels in (("sentiment", ["down", "up"]), ("ner", ["PER"]), ("recommendation", None)):
        (Path("data/tables") / source / "manifest.json").write_text(json.dumps({"labels": labels}))
    tokenizer = MemGPTTokenizer.train([*TEXTS.values(), "Ada Brandt fell"] * 4, 400, 1)
    shape = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    base = MemGPTForCausalLM(MemGPTConfig(vocab_size=len(tokenizer), memory_rows=31, memory_dim=4, **shape))
    base.save_pretrained("models/base")
    tokenizer.save_pretrained("models/base")
    document = config.read(ROOT / "params.yaml")
    changes = [
        "multitask.steps=30",
        "finetune.ner.start=multitask",
        "finetune.ner.epochs=1",
        "finetune.sentiment.epochs=8",
    ]
    return config.parse(config.override(document, [*changes, "finetune.sentiment.learning_rate=0.01"]))


def test_sentiment_is_calibrated_and_knows_topics(settings: config.Config) -> None:
    metrics = finetune.run(settings, "sentiment")
    assert metrics["validation_macro_f1"] == metrics["validation_topic_accuracy"] == 1
    saved = json.loads(Path("models/sentiment/config.json").read_text())
    assert saved["label_temperature"] == metrics["validation_temperature"] != 1
    assert metrics["validation_expected_calibration_error"] < metrics["validation_expected_calibration_error_before"]
    (answer,) = predict.load("sentiment", "models/sentiment").predict([TEXTS["down", "banking"]])
    assert (answer["label"], answer["topic"], answer["predicted_topic"]) == ("down", None, "banking")


@pytest.mark.parametrize("start", ["base", "multitask"])
@pytest.mark.parametrize("task", config.TASKS)
def test_a_prefix_is_learnt_for_every_task(settings: config.Config, task: str, start: str) -> None:
    multitask.run(settings)
    tuned = getattr(settings.finetune, task).model_copy(update={"tune": "prefix", "rank": 3, "start": start})
    assert finetune.fit(tuned, task, Path("models") / task)["trainable_parameters"] > 0
    before, after = (load_file(Path("models") / name / "model.safetensors") for name in (start, task))
    trunk = {name: weight for name, weight in after.items() if name.startswith("model.")}
    assert trunk.pop("model.prefix.weight").shape == (1, 2, 1, 3, 16)
    assert all(torch.equal(weight, before[name]) for name, weight in trunk.items())
    inputs = {"ner": "Ada Brandt fell", "sentiment": "good profits", "recommendation": {"history": ["i0"], "k": 2}}
    assert len(predict.load(task, Path("models") / task).predict([inputs[task]])) == 1


def killed(*given: Any, **named: Any) -> None:
    """Training, and the end of the process right after it."""
    train(*given, **named)
    raise KeyboardInterrupt


def test_early_stopping_that_was_killed_at_its_end_stays_stopped(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a checkpoint was written at that very step, from which more could be trained."""
    changes = {"patience": 1, "checkpoint_steps": 3, "batch_size": 16, "epochs": 4}
    params = settings.finetune.sentiment.model_copy(update=changes)

    def run(training: Callable[..., object]) -> dict[str, float]:
        monkeypatch.setattr(finetune, "train", training)
        return finetune.fit(params, "sentiment", Path("models/sentiment"))

    def score_by_turns() -> None:
        scores = chain([0.5, 0.4], repeat(0.9))
        monkeypatch.setattr(finetune, "validate", lambda *_: {"macro_f1": next(scores)})

    score_by_turns()
    undisturbed, weights = run(train), Path("models/sentiment/model.safetensors").read_bytes()
    assert undisturbed["steps"] == 3, "the first epoch"
    score_by_turns()
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert run(train) == undisturbed
    assert Path("models/sentiment/model.safetensors").read_bytes() == weights


def test_a_member_of_a_soup_does_not_resume_a_fine_tuning_with_a_head_of_its_own(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = settings.finetune.sentiment.model_copy(update={"checkpoint_steps": 1})
    finetune.fit(params, "sentiment", Path("models/undisturbed"), head_seed=7)
    monkeypatch.setattr(finetune, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.fit(params, "sentiment", Path("models/sentiment"))
    monkeypatch.setattr(finetune, "train", train)
    finetune.fit(params, "sentiment", Path("models/sentiment"), head_seed=7)
    first, second = (Path("models") / name / "model.safetensors" for name in ("undisturbed", "sentiment"))
    assert first.read_bytes() == second.read_bytes()


def test_an_ensemble_finds_names(settings: config.Config) -> None:
    params = settings.finetune.ner.model_copy(update={"start": "base", "ensemble": 3, "epochs": 20})
    assert finetune.fit(params, "ner", Path("models/ner"))["validation_f1"] == 1
    (found,) = predict.load("ner", "models/ner").predict(["Ada Brandt fell"])
    assert [(entity["text"], entity["type"]) for entity in found] == [("Ada Brandt", "PER")]


def test_the_average_of_joint_training_is_what_is_kept(settings: config.Config) -> None:
    multitask.run(settings)
    last = load_file(Path("models/multitask/model.safetensors"))["heads.ner.score.weight"]
    averaged = settings.model_copy(update={"multitask": settings.multitask.model_copy(update={"ema_decay": 0.5})})
    multitask.run(averaged)
    assert not torch.equal(load_file(Path("models/multitask/model.safetensors"))["heads.ner.score.weight"], last)


def test_joint_training_has_the_topics_too_and_its_heads_go_on(settings: config.Config) -> None:
    multitask.run(settings)
    document = settings.model_dump(by_alias=True)
    joint = config.parse(config.override(document, ["finetune.sentiment.start=multitask"]))
    assert finetune.run(joint, "sentiment")["validation_topic_accuracy"] == 1
    finetune.run(joint, "ner")
    assert json.loads(Path("models/ner/config.json").read_text()).get("topics") is None


def test_a_joint_head_of_other_labels_or_topics_is_refused(settings: config.Config) -> None:
    multitask.run(settings)
    joint = settings.finetune.sentiment.model_copy(update={"start": "multitask"})
    manifest = Path("data/tables/sentiment/manifest.json")
    manifest.write_text(json.dumps({"labels": ["up", "down"]}))
    with pytest.raises(UserError, match=r"its sentiment head was made for other labels .* run `memgpt multitask`"):
        finetune.fit(joint, "sentiment", Path("models/sentiment"))
    manifest.write_text(json.dumps({"labels": ["down", "up"]}))
    rows = [{"id": "", "text": text, "label": label, "topic": None} for (label, _), text in TEXTS.items()]
    put("sentiment", "train", rows)
    with pytest.raises(UserError, match="its sentiment head was made for other topics than"):
        finetune.fit(joint, "sentiment", Path("models/sentiment"))
