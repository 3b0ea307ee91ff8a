"""A consumer: a fresh process outside the repository, in an environment with a champion's own requirements only."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import slim_env
from conftest import Pipeline

from memgpt.config import MODELS

LOAD = """
import importlib.util, json, sys
assert importlib.util.find_spec("memgpt") is None, "the project is installed here"
import mlflow
model, inputs = sys.argv[1], json.loads(sys.argv[2])
loaded = mlflow.pyfunc.load_model(f"models:/memgpt-{model}@champion")
print(json.dumps({"answers": loaded.predict(inputs), "signature": str(loaded.metadata.signature),
                  "example": len(loaded.predict(loaded.input_example)), "loaded": sorted(m for m in sys.modules)}))
"""
INPUTS = {
    "base": ["Norvale Systems opened a plant.", "中文 and 🙂"],
    "ner": ["Ada Brandt of Norvale Systems flew to Westhaven.", ""],
    "sentiment": ["Profits fell.", {"text": "Profits did not fall.", "topic": "results"}],
    "recommendation": [
        {"history": ["An article that the model has never seen, about turbines"], "k": 3},
        {"history": [], "k": 2, "candidates": ["Another article nobody has seen", "And one about bread"]},
    ],
}
KEYS = {
    "base": {"nats", "tokens", "bytes", "bits_per_byte"},
    "ner": {"text", "type", "score", "start", "end"},
    "sentiment": {"label", "scores", "topic", "predicted_topic"},
    "recommendation": {"item_id", "title", "score"},
}


@pytest.fixture(scope="module")
def python(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the requirements that the champions name, which are the same for all of them."""
    named = {path.read_text() for path in pipeline.root.glob("mlartifacts/memgpt/*/artifacts/model/requirements.txt")}
    assert len(named) == 1
    return slim_env.make(tmp_path_factory.mktemp("consumer") / "venv", named.pop().split())


@pytest.mark.parametrize("model", MODELS)
def test_the_champion_loads_and_predicts(model: str, pipeline: Pipeline, python: Path, tmp_path: Path) -> None:
    variables = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{pipeline.root / 'mlflow.db'}",
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [str(python), "-c", LOAD, model, json.dumps(INPUTS[model])]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    answers = said["answers"]
    assert len(answers) == len(INPUTS[model])
    assert said["example"] > 0
    assert "inputs" in said["signature"]
    assert not {"prefect", "dvc", "great_expectations", "memgpt.stages"} & set(said["loaded"])
    rows = [row for answer in answers for row in (answer if isinstance(answer, list) else [answer])]
    assert all(row.keys() == KEYS[model] for row in rows)
    if model == "recommendation":
        assert len(answers[0]) == 3
        assert all(item["item_id"] for item in answers[0])
        assert sorted(item["title"] for item in answers[1]) == sorted(INPUTS[model][1]["candidates"])
