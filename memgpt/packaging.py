"""Packages a model directory as an MLflow model that loads without this project: weights, the code that reads them,
pinned requirements, signature, example, model card. It contains no pickle."""

import inspect
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import memgpt
from memgpt import lineage, predict

CODE = Path(memgpt.__file__).parent  # the package to pack
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas")
_PARTS = ("__init__.py", "model", "predict")  # of the package, imported by prediction
# Options that a consumer may set, with their defaults: MLflow passes on only keys that already have a value.
_SERVING = {
    key: given.default
    for key, given in inspect.signature(predict.load).parameters.items()
    if given.default is not inspect.Parameter.empty
}
# Invented, like the newsroom, never a user's data. The items are in no catalogue, so they are given by their texts.
EXAMPLES: dict[str, list[Any]] = {
    "base": ["Shares of Norvale Systems rose after the quarterly report."],
    "ner": ["Ada Brandt of Norvale Systems opened the new plant in Westhaven on Monday."],
    "sentiment": [
        "Norvale Systems did not reach its targets.",
        {"text": "Orders for the new turbine grew again.", "topic": "orders"},
    ],
    "recommendation": [
        {
            "history": ["Turbine orders grow again", "Norvale Systems opens a plant in Westhaven"],
            "k": 2,
            "candidates": ["Westhaven plans a second harbour", "How to bake rye bread"],
        }
    ],
}


def requirements() -> list[str]:
    """Exact versions of the installed packages. No local suffix: `torch==2.13.0+cpu` is on no ordinary index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def stage_code(target: Path) -> Path:
    """Copy the parts of the package that prediction needs to `target`/memgpt."""
    for part in _PARTS:
        if (CODE / part).is_dir():
            shutil.copytree(CODE / part, target / "memgpt" / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (target / "memgpt").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CODE / part, target / "memgpt" / part)
    return target / "memgpt"


def code_digest() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return lineage.digest(stage_code(Path(folder)))


def save(model: str, directory: Path, card: str, target: Path, run_id: str) -> None:
    """Write the MLflow model for run `run_id` to `target`, which must not exist.

    Given an example, MLflow would load the model in this process to record the answer. So the example and the params
    are added afterwards, and the model is first loaded by a separate process with the packaged code.
    """
    import mlflow.pyfunc
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.types.schema import ParamSchema, ParamSpec

    with tempfile.TemporaryDirectory() as folder:
        packed = stage_code(Path(folder) / "code")
        weights = Path(folder) / "model"
        shutil.copytree(directory, weights)
        (weights / "README.md").write_text(card, encoding="utf-8")
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(packed / "predict" / "pyfunc.py"),
            artifacts={"model": str(weights)},
            code_paths=[str(packed)],
            pip_requirements=requirements(),
            model_config={"task": model, **_SERVING},
        )
    saved = Model.load(str(target))
    if model == "ner":
        assert saved.signature is not None
        saved.signature.params = ParamSchema([ParamSpec("separator", "string", "")])
    saved.run_id, saved.artifact_path = run_id, "model"
    _save_example(saved, EXAMPLES[model], str(target))
    saved.save(str(target / "MLmodel"))
