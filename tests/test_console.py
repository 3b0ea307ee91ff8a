"""The console of a flow: a line when a stage ends, now and then one of what it says, a whole table at the end."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from memgpt import console

VERDICT = {
    "model": "recommendation",
    "metric": "ndcg_at_10",
    "value": 0.41234,
    "ci_low": 0.4,
    "ci_high": 0.42,
    "baseline": 0.2,
    "champion": None,
    "verdict": "promote",
    "version": "3",
    "reasons": ["first champion"],
}


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def board(written: io.StringIO) -> console.Board:
    return console.Board(Console(file=written, width=60, soft_wrap=True))


def test_a_stage_that_ends_is_a_line(board: console.Board, written: io.StringIO) -> None:
    with board:
        board.begin("finetune@ner")
        board.note("finetune@ner", "finetune: step 1/2")
        board.end("finetune@ner", "skipped (unchanged)")
    (line,) = written.getvalue().splitlines()
    assert line.split()[:3] == ["finetune@ner", "skipped", "(unchanged)"]


def test_what_a_long_stage_says_is_shown_now_and_then(
    board: console.Board, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    board.begin("pretrain")
    for second in range(25):
        now = float(second)
        board.note("pretrain", f"pretrain: step {second}/25")
    assert [line.split() for line in written.getvalue().splitlines()] == [
        ["pretrain", "step", "11/25"],
        ["pretrain", "step", "22/25"],
    ]


def test_the_table_is_never_cut(board: console.Board, written: io.StringIO) -> None:
    board.table(console.rows([VERDICT]))
    heading, row = written.getvalue().splitlines()
    assert heading.split() == [
        "task",
        "metric",
        "value",
        "95",
        "%",
        "interval",
        "baseline",
        "champion",
        "verdict",
        "version",
    ]
    assert row.split() == "recommendation ndcg_at_10 0.412 0.400 to 0.420 0.200 promote 3".split()


def test_verdicts_come_in_the_order_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert console.verdicts() == []
    console.VERDICTS.mkdir(parents=True)
    for model in ("sentiment", "base"):
        (console.VERDICTS / f"{model}.json").write_text(json.dumps({"model": model}))
    assert [verdict["model"] for verdict in console.verdicts()] == ["base", "sentiment"]


def test_a_password_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://ada:secret@db.example:5432/mlflow")
    told = "\n".join(console.ui_hints())
    assert "postgresql+psycopg2://ada:***@db.example:5432/mlflow" in told
    assert "secret" not in told
