"""The report of an evaluation: every number of a kind has its interval, and what is switched off is not there."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

from memgpt import atomic, config
from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTForSequenceClassification, MemGPTTokenizer
from memgpt.stages import evaluate

LABELS = ["negative", "neutral", "positive"]
WORDS = {"negative": "fell", "neutral": "stayed", "positive": "rose"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables of sentiment, an untrained core and an untrained model of it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/tables/sentiment"
    folder.mkdir(parents=True)
    rows = [
        {"text": f"Orders {word} {n} times{' over a long year' * (n % 2)}", "label": label, "topic": "ab"[n % 2]}
        for n in range(8)
        for label, word in WORDS.items()
    ]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    atomic.write_json(folder / "manifest.json", {"labels": LABELS})
    tokenizer = MemGPTTokenizer.train([row["text"] for row in rows], vocab_size=300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    for name, kind in (("base", MemGPTForCausalLM), ("sentiment", MemGPTForSequenceClassification)):
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
        kind(MemGPTConfig(vocab_size=len(tokenizer), memory_rows=97, memory_dim=4, **shape, **names)).save_pretrained(
            tmp_path / "models" / name
        )
        tokenizer.save_pretrained(tmp_path / "models" / name)
    return tmp_path


def report(place: Path, **changes: Any) -> dict[str, Any]:
    settings = config.load(ROOT / "params.yaml")
    section = settings.evaluate.model_copy(update={"bootstrap": 30, "robustness": 9, **changes})
    evaluate.run(settings.model_copy(update={"evaluate": section}), "sentiment")
    return json.loads((place / "reports/metrics/sentiment.json").read_text())


def test_the_report_and_the_mistakes(place: Path) -> None:
    numbers = report(place, mistakes=5)
    slices = [f"macro_f1_{name}" for name in ("short", "long", "topic_a", "topic_b")]
    for name in (*slices, "drop_typos", "drop_upper", "gain", "tuning"):
        assert numbers[f"{name}_ci_low"] <= numbers[name] <= numbers[f"{name}_ci_high"]
    assert numbers["macro_f1_short_n"] + numbers["macro_f1_long_n"] == numbers["n"] == 24
    assert numbers["robustness_n"] == 9
    assert numbers["before"] > numbers["value"]  # a probe of an untrained core still learns; an untrained head does not
    assert numbers["tuning"] == pytest.approx(numbers["value"] - numbers["before"], abs=1e-5)
    wrong = [json.loads(line) for line in (place / "reports/mistakes/sentiment.jsonl").read_text().splitlines()]
    assert len(wrong) == 5
    assert all(record["gold"] != record["prediction"]["label"] for record in wrong)
    assert [r["badness"] for r in wrong] == sorted((r["badness"] for r in wrong), reverse=True)
    first = (place / "reports/metrics/sentiment.json").read_bytes()
    report(place, mistakes=5)
    assert (place / "reports/metrics/sentiment.json").read_bytes() == first


def test_what_is_switched_off_is_not_measured(place: Path) -> None:
    numbers = report(place, robustness=0, before=False, mistakes=0)
    assert not [name for name in numbers if name.startswith(("drop_", "flips_", "before", "tuning"))]
    assert (place / "reports/mistakes/sentiment.jsonl").read_text() == ""
