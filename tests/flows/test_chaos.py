"""Stages killed at work: the retrain that follows ends with the metrics of the undisturbed one, bit for bit."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT, Pipeline

sys.path.insert(0, str(ROOT / "benchmarks"))
import chaos


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_killed_stages_leave_no_trace(pipeline: Pipeline, tmp_path: Path) -> None:
    place = pipeline.copy(tmp_path / "checkout")
    checkout = chaos.Checkout(place.root, {**place.env, "PYTHONPATH": str(place.root)})
    reference = chaos.Checkout(pipeline.root, pipeline.env).metrics()
    plan = [("pretrain", 2.0), ("finetune sentiment", 1.0), ("evaluate ner", 0.5)]
    kills = list(chaos.kill_stages(checkout, plan, reference))
    assert {kill["what"] for kill in kills} == {name for name, _ in plan}
    assert all(kill["same_metrics"] for kill in kills)
