"""Stages killed at work: the retrain that follows ends with what the undisturbed one made, bit for bit."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Pipeline
from ruamel.yaml import YAML

sys.path.insert(0, str(ROOT / "benchmarks"))
import chaos

PLAN = {"pretrain": 2.0, "finetune sentiment": 1.0, "evaluate ner": 0.5}  # seconds into it
MADE = ("models/base", "models/sentiment", "reports/metrics/ner.json", ".dvc/cache/runs", ".memgpt/checkpoints")


class Settled(chaos.Checkout):
    """Everything has run, and only what will be killed is forgotten; the benchmark starts from nothing."""

    def forget(self) -> None:
        lock = locked(self.root)
        for name in PLAN:
            del lock["stages"][name.replace(" ", "@")]
        YAML().dump(lock, self.root / "dvc.lock")
        for name in MADE:
            path = self.root / name
            shutil.rmtree(path, ignore_errors=True) if not path.is_file() else path.unlink()


def locked(root: Path) -> dict:
    return YAML(typ="safe").load(root / "dvc.lock")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_killed_stages_leave_no_trace(pipeline: Pipeline, tmp_path: Path) -> None:
    place = pipeline.copy(tmp_path / "checkout", registry=True)
    checkout = Settled(place.root, {**place.env, "PYTHONPATH": str(place.root)})
    reference = chaos.Checkout(pipeline.root, pipeline.env).metrics()
    kills = list(chaos.kill_stages(checkout, list(PLAN.items()), reference))
    assert {kill["what"] for kill in kills} == set(PLAN)
    assert all(kill["same_metrics"] for kill in kills)
    assert locked(place.root) == locked(pipeline.root)
