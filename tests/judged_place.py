"""A checkout in miniature for tests of registry and gate: tables, a finished sentiment model, its report, a commit.

The model is a rule with a planted error rate, packaged as a version's code would be, so that a version loads without
torch; registry, artifacts, versions' processes and judge are the real ones.
"""

import hashlib
import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import memgpt
from memgpt import atomic, config, environment, lineage, packaging, tracking

LABELS = ("negative", "neutral", "positive")
REPOSITORY = Path(memgpt.__file__).parents[1]
_RULE = """
import hashlib, json, os
from pathlib import Path

def draw(text, salt):
    return int(hashlib.sha256((salt + text).encode()).hexdigest()[:8], 16) / 2**32

class Predictor:
    def __init__(self, directory, device="cpu"):
        self.skill = json.loads((Path(directory) / "config.json").read_text())
        if self.skill.get("breaks") == "load":
            raise OSError("weights are truncated")

    def predict(self, inputs):
        if self.skill.get("breaks") == "predict":
            raise RuntimeError("no such layer")
        if self.skill.get("breaks") == "die":
            os._exit(7)
        if self.skill.get("breaks") == "format":
            return ["positive" for _ in inputs]
        if self.skill.get("breaks") == "short":
            return [self.one(row) for row in inputs[:-1]]
        return [self.one(row) for row in inputs]

    def one(self, row):
        text = row if isinstance(row, str) else row["text"]
        names = ["negative", "neutral", "positive"]
        place = int(draw(text, "gold") * 3)
        errors = self.skill["errors"].get(names[place], 0.0)
        if draw(text, str(self.skill.get("salt", ""))) < errors:
            place = (place + 1) % 3
        topic = None if isinstance(row, str) else row.get("topic")
        return {"label": names[place], "scores": {names[place]: 1.0}, "topic": topic, **EXTRA}

def load(task, directory, device="cpu", **settings):
    return Predictor(directory, device)
"""


def gold(text: str) -> str:
    return LABELS[int(int(hashlib.sha256(f"gold{text}".encode()).hexdigest()[:8], 16) / 2**32 * 3)]


class Place:
    """The miniature checkout at `root`, which is the working directory."""

    def __init__(self, root: Path, rows: int = 300) -> None:
        self.root = root
        self.config = config.load(REPOSITORY / "params.yaml")
        self._tables(rows)
        self.lock = root / "data" / "sources.lock.json"
        atomic.write_json(
            self.lock, {"corpus": {"uri": "sample://newsroom"}, "sentiment": {"uri": "sample://newsroom"}}
        )
        (root / ".gitignore").write_text(".memgpt/\nmlflow.db\nmlartifacts/\ncode/\n", encoding="utf-8")
        (root / "code.py").write_text("one = 1\n", encoding="utf-8")
        for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "start")):
            self.git(*command)

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def manifest(self, source: str, **changes: Any) -> None:
        path = self.root / "data" / "tables" / source / "manifest.json"
        value = {
            "source": "sample://newsroom",
            "family": "sample",
            "licence": "Apache-2.0",
            "non_commercial": False,
            "labels": list(LABELS) if source == "sentiment" else None,
            "rows": {},
            "columns": {},
        }
        atomic.write_json(path, {**value, **changes})

    def model(self, errors: float | dict[str, float] = 0.1, **skill: Any) -> None:
        """A finished models/sentiment: `errors`, the share of wrong answers, of all labels or of each."""
        directory = self.root / "models" / "sentiment"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        by_label = errors if isinstance(errors, dict) else dict.fromkeys(LABELS, errors)
        (directory / "config.json").write_text(json.dumps({"errors": by_label, **skill}), encoding="utf-8")
        seed = int.from_bytes(hashlib.sha256(json.dumps([by_label, skill]).encode()).digest()[:4], "big")
        save_file({"w": np.random.default_rng(seed).random(8, dtype=np.float32)}, directory / "model.safetensors")
        lineage.write(directory, "finetune@sentiment", [Path("data/tables/sentiment")], {"epochs": 1}, None, 1, {})
        right = round(1 - sum(by_label.values()) / len(by_label), 3)
        self.report(value=right, ci_low=right - 0.1, ci_high=right + 0.1)

    def report(self, **changes: Any) -> None:
        value = {"primary": "macro_f1", "value": 0.9, "ci_low": 0.85, "ci_high": 0.95, "n": 300, "baseline": 0.3}
        atomic.write_json(self.root / "reports" / "metrics" / "sentiment.json", {**value, **changes})

    def _tables(self, rows: int) -> None:
        schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("label", pa.string()), ("topic", pa.string())])
        folder = self.root / "data" / "tables" / "sentiment"
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            texts = [f"{split} number {number}" for number in range(rows)]
            table = [{"id": text, "text": text, "label": gold(text), "topic": None} for text in texts]
            pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / f"{split}.parquet")
        (self.root / "data" / "tables" / "corpus").mkdir()
        for source in ("corpus", "sentiment"):
            self.manifest(source)


def pack(target: Path, extra: str = "{}") -> Path:
    """The rule as a package to be packed with a version; `extra` is added to each answer."""
    for part in ("model", "predict"):
        (target / part).mkdir(parents=True)
        (target / part / "__init__.py").write_text("", encoding="utf-8")
    (target / "__init__.py").write_text("", encoding="utf-8")
    shutil.copy(REPOSITORY / "memgpt" / "predict" / "pyfunc.py", target / "predict")
    (target / "predict" / "__init__.py").write_text(f"EXTRA = {extra}\n{_RULE}", encoding="utf-8")
    return target


def empty_registry(folder: Path) -> Path:
    """A tracking database to copy: creating one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tracking.use(folder)
    return folder / "mlflow.db"


def copy_registry(database: Path, root: Path) -> None:
    """To root/mlflow.db. New artifacts go to root/mlartifacts; those that there are stay where they are."""
    shutil.copyfile(database, root / "mlflow.db")
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:
        location = (root / "mlartifacts").as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ? || '/' || name", (location,))
        connection.commit()


def settle(root: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A Place in `root` with its own copy of the database, as the working directory."""
    environment.prepare()
    root.mkdir(exist_ok=True)
    copy_registry(database, root)
    monkeypatch.chdir(root)
    for name in ("MEMGPT_COMMIT", "MEMGPT_PARENT_RUN", "PREFECT__FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    monkeypatch.setattr(packaging, "CODE", pack(root / "code" / "memgpt"))
    tracking.use()
    return Place(root)
