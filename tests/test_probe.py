"""The core before fine-tuning answers in the predictors' format, learns from train alone, and beats chance by it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from memgpt import probe
from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTTokenizer
from memgpt.tasks import ner, recommendation, sentiment

GOOD, BAD = "orders rose and profits rose", "orders fell and profits fell"


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = MemGPTTokenizer.train([GOOD, BAD, "Ada lives in Kiel"] * 4, vocab_size=320)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MemGPTForCausalLM(MemGPTConfig(vocab_size=len(tokenizer), memory_rows=97, memory_dim=4, **shape))
    directory = tmp_path_factory.mktemp("core")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def put(root: Path, source: str, table: str, rows: list[dict]) -> None:
    (root / source).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / source / f"{table}.parquet")


def test_sentiment(core: Path, tmp_path: Path) -> None:
    put(tmp_path, "sentiment", "train", [{"text": GOOD, "label": "up"}, {"text": BAD, "label": "down"}] * 4)
    rows = [{"input": {"text": text, "topic": None}, "label": label} for text, label in ((BAD, "down"), (GOOD, "up"))]
    answers = probe.before("sentiment", core, tmp_path, rows)
    assert sentiment.score(sentiment.statistics(rows, answers).sum(0)) == 1


def test_a_set_sorted_by_label_is_sampled_and_one_label_is_an_answer(
    core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_EXAMPLES", 8)
    rows = [{"text": GOOD, "label": "up"}] * 40 + [{"text": BAD, "label": "down"}] * 40
    put(tmp_path, "sentiment", "train", rows)
    asked = [{"input": {"text": BAD, "topic": None}, "label": "down"}]
    assert probe.before("sentiment", core, tmp_path, asked) == [{"label": "down"}]
    put(tmp_path, "sentiment", "train", rows[:40])
    assert probe.before("sentiment", core, tmp_path, asked) == [{"label": "up"}]


def test_ner(core: Path, tmp_path: Path) -> None:
    sentence = {"tokens": ["Ada", "lives", "in", "Kiel"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    put(tmp_path, "ner", "train", [sentence] * 4)
    rows = [{"input": sentence["tokens"], "tags": sentence["tags"]}]
    answers = probe.before("ner", core, tmp_path, rows)
    assert ner.score(ner.statistics(rows, answers).sum(0)) == 1


def test_recommendation_offers_what_is_near_and_unread(core: Path, tmp_path: Path) -> None:
    texts = [GOOD, GOOD + " again", BAD, "Ada lives in Kiel"]
    items = [{"item_id": f"i{n}", "title": text, "description": "", "tags": ""} for n, text in enumerate(texts)]
    put(tmp_path, "recommendation", "items", items)
    rows = [{"input": {"history": history, "k": 2}, "item_id": "i1"} for history in (["i0"], [])]
    answers = probe.before("recommendation", core, tmp_path, rows)
    assert [len(answer) for answer in answers] == [2, 2]
    assert "i0" not in [item["item_id"] for item in answers[0]]
    assert recommendation.score(recommendation.statistics(rows, answers)[0]) > 0
