"""A model directory as an MLflow model that loads without this project: weights, the code that reads them, pinned
requirements, signature, example, model card. Nothing in it is a pickle."""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import memgpt
from memgpt import lineage

CODE = Path(memgpt.__file__).parent  # the package to pack
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas")
_PARTS = ("__init__.py", "model", "predict")  # of the package: what prediction imports
# Made up, like the newsroom; never a user's data. An item that nobody has seen is given by its text.
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
_WHAT = {
    "base": "Language model: text → `{nats, tokens, bytes, bits_per_byte}`.",
    "ner": (
        "Named entities: text → `[{text, type, score, start, end}]`. For text that is already split into words pass "
        '`params={"separator": " "}`.'
    ),
    "sentiment": "Sentiment: text, or `{text, topic}` → `{label, scores, topic, predicted_topic?}`.",
    "recommendation": "Recommendation: `{history: [id | text], k, candidates?}` → `[{item_id, title, score}]`.",
}


def requirements() -> list[str]:
    """Exact versions of what is installed. No local suffix: `torch==2.13.0+cpu` exists on no ordinary index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def stage_code(target: Path) -> Path:
    """Copy what prediction needs of the package to `target`/memgpt."""
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
    """Write the MLflow model that run `run_id` will hold to `target`, which must not exist.

    MLflow would load the model here to write down the example's answer; so the example and the params are added
    afterwards, and the first to load it is a process of its own with the packaged code.
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
            model_config={"task": model, "device": "cpu", "memory": "resident", "weights": "float32", "compile": False},
        )
    saved = Model.load(str(target))
    if model == "ner":
        assert saved.signature is not None
        saved.signature.params = ParamSchema([ParamSpec("separator", "string", "")])
    saved.run_id, saved.artifact_path = run_id, "model"
    _save_example(saved, EXAMPLES[model], str(target))
    saved.save(str(target / "MLmodel"))


def card(model: str, report: dict[str, Any], tags: dict[str, str], sources: dict[str, dict[str, Any]]) -> str:
    """The model card. sources: name → manifest of the tables that the model learned from."""
    licences = "\n".join(
        f"| {name} | `{manifest['source']}` | {manifest['licence'] or 'not stated'} "
        f"| {'**no**' if manifest['non_commercial'] else 'yes'} |"
        for name, manifest in sources.items()
    )
    synthetic = any(str(manifest["source"]).startswith("sample://") for manifest in sources.values())
    others = "\n".join(
        f"| {name} | {value:.4f} |"
        for name, value in sorted(report.items())
        if isinstance(value, int | float) and name not in {"value", "ci_low", "ci_high", "baseline", "n"}
    )
    restricted = tags["non_commercial"] == "true"
    interval = f"{report['ci_low']:.4f} to {report['ci_high']:.4f}"
    changes = " with uncommitted changes" if tags["dirty"] == "true" else ""
    return f"""---
library_name: mlflow
tags: [memgpt{", non-commercial" if restricted else ""}]
---
# memgpt-{model}

{_WHAT[model]} A MemGPT: a memory-augmented GPT for language tasks.

```python
import mlflow
model = mlflow.pyfunc.load_model("models:/memgpt-{model}@champion")
```

## Data
| source | from | licence | commercial use |
|---|---|---|---|
{licences}
{_restriction(restricted)}{_SYNTHETIC if synthetic else ""}
## Test metrics
`{report["primary"]}` {report["value"]:.4f}, 95 % interval {interval}, on {report["n"]:g} examples;
simple baseline {report["baseline"]:.4f}.

| metric | value |
|---|---|
{others}

## Lineage
Commit `{tags["commit"]}`{changes}, weights `{tags["weights"][:16]}`,
sources lock `{tags["sources_lock"][:16]}`; the whole is in `lineage.json` beside this file and in the version's tags.
"""


_SYNTHETIC = "\nSome of this is generated text: the numbers below say nothing about quality on real text.\n"


def _restriction(restricted: bool) -> str:
    return "\n**Not for commercial use**: a source's licence forbids it.\n" if restricted else ""
