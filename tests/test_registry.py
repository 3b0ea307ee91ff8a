"""What is registered: loadable without this project, without a pickle, with signature, example and card."""

import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import slim_env
from judged_place import empty_registry

from memgpt import atomic, lineage, packaging, predict, registry, tracking
from memgpt.config import MODELS

TEXTS = ["Ada Brandt joined Norvale Systems in Westhaven.", "Norvale Systems did not reach its targets."]
ITEMS = [
    {"item_id": f"n{number}", "title": f"Story {number} about turbines", "description": "", "tags": "energy"}
    for number in range(4)
]


def build(model: str, directory: Path) -> None:
    """An untrained model of the real class."""
    from memgpt.model import (
        MemGPTConfig,
        MemGPTForCausalLM,
        MemGPTForRecommendation,
        MemGPTForSequenceClassification,
        MemGPTForTokenClassification,
        MemGPTTokenizer,
    )
    from memgpt.predict.recommendation import build_index

    tokenizer = MemGPTTokenizer.train(TEXTS, vocab_size=300, min_frequency=1)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "memory_rows": 32,
        "memory_dim": 8,
        "pooled_size": 8,
    }
    if model in ("ner", "sentiment"):
        names = ["O", "B-ORG", "I-ORG"] if model == "ner" else ["negative", "neutral", "positive"]
        shape |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    kind: Any = {
        "base": MemGPTForCausalLM,
        "ner": MemGPTForTokenClassification,
        "sentiment": MemGPTForSequenceClassification,
        "recommendation": MemGPTForRecommendation,
    }[model]
    made = kind(MemGPTConfig(**shape))
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if model == "recommendation":
        build_index(made, tokenizer, ITEMS, {"n1": 5}, directory)
    lineage.write(directory, f"finetune@{model}", [], {}, None, 1, {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with an untrained version of each model."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        empty_registry(root)
        patch.chdir(root)
        patch.setenv("MEMGPT_COMMIT", "0123abc")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        tracking.use()
        client = tracking.client()
        atomic.write_json(root / "data/sources.lock.json", {})
        for source in ("corpus", *MODELS[1:]):
            value = {"source": "file.jsonl", "family": "file", "licence": "CC-BY-NC-4.0", "non_commercial": True}
            atomic.write_json(root / f"data/tables/{source}/manifest.json", {**value, "labels": None})
        for model in MODELS:
            build(model, root / "models" / model)
            report = {"primary": "f1", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 9, "baseline": 0.1}
            more = {"recall": 0.25, "f1_rare": 0.31, "f1_rare_ci_low": 0.2, "f1_rare_ci_high": 0.4, "f1_rare_n": 7}
            robust = {
                "drop_typos": 0.33,
                "drop_typos_ci_low": 0.3,
                "drop_typos_ci_high": 0.36,
                "before": 0.15,
                "robustness_n": 5,
            }
            atomic.write_json(root / f"reports/metrics/{model}.json", {**report, **more, **robust})
            version = registry.register(client, registry.candidate(model))
            client.set_registered_model_alias(registry.name(model), registry.CHAMPION, version)
    return root


@pytest.fixture
def artifact(root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    return files(root, request.param, monkeypatch)


def files(root: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracking.use(root)
    target = str(root / "downloaded" / model)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{registry.name(model)}@champion", dst_path=target))


@pytest.mark.parametrize("artifact", MODELS, indirect=True)
def test_safe_formats_only(artifact: Path) -> None:
    found = [path for path in artifact.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} <= {".py", ".json", ".jinja", ".safetensors", ".md", ".txt", ".yaml", ""}
    assert {path.name for path in found if path.suffix == ""} <= {"MLmodel", "registered_model_meta"}  # both YAML
    assert all(path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK") for path in found)


@pytest.mark.parametrize("artifact", MODELS, indirect=True)
def test_only_what_prediction_needs_is_packed(artifact: Path) -> None:
    assert sorted(path.name for path in (artifact / "code").iterdir()) == ["memgpt"]
    assert sorted(path.name for path in (artifact / "code/memgpt").iterdir()) == ["__init__.py", "model", "predict"]
    requirements = (artifact / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == list(packaging.REQUIREMENTS)
    assert not any("+" in line for line in requirements)


def test_signature_and_example(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.models import Model

    for model in MODELS:
        path = str(files(root, model, monkeypatch))
        saved = Model.load(path)
        assert saved.signature is not None
        assert saved.load_input_example(path) == packaging.EXAMPLES[model]
        settings = saved.flavors["python_function"]["config"]
        assert settings.keys() == inspect.signature(predict.load).parameters.keys() - {"directory"}
    ner = Model.load(str(files(root, "ner", monkeypatch))).signature
    assert ner is not None
    assert str(ner.inputs) == "[string (required)]"
    assert "separator" in str(ner.params)


def test_the_card_says_what_matters(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (files(root, "ner", monkeypatch) / "artifacts/model/README.md").read_text()
    for part in (
        "Not for commercial use",
        "CC-BY-NC-4.0",
        "| recall | 0.2500 |",
        "0.4000 to 0.6000",
        "0123abc",
        "@champion",
        "| f1_rare | 0.3100 | 0.2000 to 0.4000 | 7 |",
        "| drop_typos | 0.3300 | 0.3000 to 0.3600 | 5 |",
        "| before | 0.1500 |",
        "Loses 0.33 of its score by this change of the input: typos",
        "Stage `finetune@ner`, seed 1",
        lineage.digest(root / "data/tables/ner")[:16],
    ):
        assert part in card
    assert registry.version_tags(tracking.client(), "ner", "1")["non_commercial"] == "true"


def test_the_hub_can_read_the_card_and_the_registry_shows_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    for model in MODELS:
        path = files(root, model, monkeypatch) / "artifacts/model/README.md"
        [result] = ModelCard.load(path).data.eval_results
        assert (result.metric_type, result.metric_value) == ("f1", 0.5)
        version = tracking.client().get_model_version(registry.name(model), "1")
        assert version.description.startswith(f"# memgpt-{model}")
        assert len(version.description) <= 5000
        assert "model_card.md" in [file.path for file in tracking.client().list_artifacts(version.run_id)]


CONSUMER = """
import json, sys
from pathlib import Path
import mlflow
answers = {}
for model, inputs in json.loads(sys.argv[1]).items():
    loaded = mlflow.pyfunc.load_model(f"models:/memgpt-{model}@champion")
    answers[model] = [loaded.predict(inputs), loaded.predict(loaded.input_example)]
    if model == "ner":
        answers["words"] = loaded.predict(["Ada Brandt"], params={"separator": " "})
    if model == "sentiment":
        for wrong in ([{"text": "a", "topik": "b"}], [3]):
            try:
                loaded.predict(wrong)
            except Exception as error:
                answers.setdefault("refused", []).append(str(error).splitlines()[0])
import memgpt
packaged = (Path(memgpt.__file__).parents[2] / "MLmodel").is_file()
print(json.dumps({**answers, "packaged": packaged}))
"""


def test_each_model_loads_in_an_environment_without_the_project(root: Path, tmp_path: Path) -> None:
    requirements = (root / "mlartifacts/memgpt").glob("*/artifacts/model/requirements.txt")
    python = slim_env.make(tmp_path / "venv", next(requirements).read_text().split())
    inputs = {
        "base": ["One text."],
        "ner": TEXTS,
        "sentiment": ["Bare text.", {"text": "With topic.", "topic": "orders"}],
        "recommendation": [
            {"history": ["n1"], "k": 2},
            {"history": ["n1", "A story nobody indexed"], "k": 3, "candidates": ["n2", "Another unseen story"]},
        ],
    }
    variables = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [str(python), "-c", CONSUMER, json.dumps(inputs)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["packaged"]

    [likelihood] = answers["base"][0]
    assert likelihood.keys() == {"nats", "tokens", "bytes", "bits_per_byte"}
    assert all(
        entity.keys() == {"text", "type", "score", "start", "end"} for row in answers["ner"][0] for entity in row
    )
    assert all(0 <= entity["start"] < entity["end"] <= len("Ada Brandt") for entity in answers["words"][0])
    bare, topical = answers["sentiment"][0]
    assert bare.keys() == topical.keys() == {"label", "scores", "topic"}
    assert (bare["topic"], topical["topic"]) == (None, "orders")
    known, unseen = answers["recommendation"][0]
    assert len(known) == 2
    assert {item["item_id"] for item in known} <= {"n0", "n2", "n3"}
    assert {(item["item_id"], item["title"]) for item in unseen} == {
        ("n2", "Story 2 about turbines"),
        (None, "Another unseen story"),
    }
    assert [len(answers[model][1]) for model in MODELS] == [len(packaging.EXAMPLES[model]) for model in MODELS]
    assert len(answers["refused"]) == 2
    assert "inputs[0]" in answers["refused"][0]


def test_the_served_model_answers_as_the_predictor_on_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words through the signature's list of texts, as the gate sends them, against words given to the predictor."""
    from memgpt import gate, predict

    words = [["Ada", "Brandt", "joined", "Norvale Systems", "."], ["U.S.", "-", "based"], ["Targets"]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    with gate.Version(registry.uri("ner", "1"), root / ".memgpt" / "gate", threads=1) as version:
        version.ask(*gate.as_served(words))
        served = version.answer()
    assert served == json.loads(json.dumps(predict.load("ner", root / "models/ner").predict(words)))


def test_equal_content_is_one_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(root, "ner", monkeypatch)
    monkeypatch.chdir(root)
    monkeypatch.setenv("MEMGPT_COMMIT", "another")
    client = tracking.client()
    assert registry.register(client, registry.candidate("ner")) == "1"
    report = json.loads((root / "reports/metrics/ner.json").read_text())
    atomic.write_json(root / "reports/metrics/ner.json", {**report, "recall": 0.3})
    assert registry.register(client, registry.candidate("ner")) == "2"
