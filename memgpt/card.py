"""The model card of a version: Markdown with the front matter that the Hugging Face hub reads. All its numbers come
from the run's own files, none is typed by hand. After *Model Cards for Model Reporting* (arXiv 1810.03993)."""

from collections.abc import Callable
from typing import Any

WHAT = {
    "base": "Language model: text → `{nats, tokens, bytes, bits_per_byte}`.",
    "ner": (
        "Named entities: text → `[{text, type, score, start, end}]`. For text that is already split into words pass "
        '`params={"separator": " "}`.'
    ),
    "sentiment": "Sentiment: text, or `{text, topic}` → `{label, scores, topic, predicted_topic?}`.",
    "recommendation": "Recommendation: `{history: [id | text], k, candidates?}` → `[{item_id, title, score}]`.",
}
_USE = {
    "base": "The core that the tasks start from; to compare texts by how well they are predicted. Not to be asked for "
    "facts.",
    "ner": "To find names in text like that of the training data. Not to decide on its own about the people it names.",
    "sentiment": "To follow the tone of many texts over time. A single text's label is a guess, not a ground for a "
    "decision about a person or a company.",
    "recommendation": "To rank items for readers by what they read before. It repeats what readers chose; it knows "
    "nothing of quality, truth or harm.",
}
_PIPELINE = {"base": "text-generation", "ner": "token-classification", "sentiment": "text-classification"}
_ROBUST = ("drop_", "flips_", "shift_", "gap_", "wrong_", "overlap_")
_MEANING = """drop: what the score loses when the input is changed so. flips, shift, gap: how many answers change, how
much probability moves, and by how much two groups' means differ, when names of one group stand for another's (`_same`:
for two names of one group). wrong: share of texts that move against a clause that is clearly good, bad or a negation.
overlap: share of the ten best that stay."""
_COMPARED = ("baseline", "gain", "before", "tuning")
_SERIOUS = 0.05  # a drop whose whole interval lies above this is named among the limits


def write(
    model: str, report: dict[str, Any], tags: dict[str, str], sources: dict[str, dict[str, Any]], story: dict[str, Any]
) -> str:
    """The card. report: from evaluate; tags: the version's; sources: name → manifest of the tables that the model
    was trained on, with their sha256; story: its lineage."""
    numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
    primary = report["primary"]

    def table(chosen: Callable[[str], bool], n: float = report["n"]) -> str:
        """A row per metric. n: the rows it was measured on, unless the report has a number for this metric."""
        shown = [name for name in sorted(numbers) if chosen(name) and not name.endswith(("_ci_low", "_ci_high", "_n"))]
        rows = [
            f"| {name} | {numbers[name]:.4f} | {_interval(numbers, name)} | {numbers.get(f'{name}_n', n):g} |"
            for name in shown
        ]
        return "\n".join(["| metric | value | 95 % interval | rows |", "|---|---|---|---|", *rows]) if rows else ""

    def is_slice(name: str) -> bool:
        return name.startswith(f"{primary}_")

    def is_robust(name: str) -> bool:
        return name.startswith(_ROBUST)

    known = {"value", "ci_low", "ci_high", "n", primary}
    restricted = tags["non_commercial"] == "true"
    synthetic = any(str(manifest["source"]).startswith("sample://") for manifest in sources.values())
    data = "\n".join(
        f"| {name} | `{manifest['source']}` | {manifest['licence'] or 'not stated'} "
        f"| {'**no**' if manifest['non_commercial'] else 'yes'} | `{manifest['sha256'][:16]}` |"
        for name, manifest in sources.items()
    )
    settings = "\n".join(f"| {name} | {value} |" for name, value in sorted(story["params"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(story["versions"].items()))
    sections = [
        ("Slices", table(is_slice), ""),
        ("Robustness and bias", table(is_robust, numbers.get("robustness_n", 0)), _MEANING),
    ]
    parts = "".join(f"\n## {title}\n{text}\n\n{rows}\n" for title, rows, text in sections if rows)
    changes = " with uncommitted changes" if tags["dirty"] == "true" else ""
    return f"""---
{_front_matter(model, report, sources, restricted)}
---
# memgpt-{model}

{WHAT[model]} A MemGPT: a memory-augmented GPT for language tasks.

```python
import mlflow
model = mlflow.pyfunc.load_model("models:/memgpt-{model}@champion")
```

## Intended use
{_USE[model]}

## Training data
| source | from | licence | commercial use | sha256 of its tables |
|---|---|---|---|---|
{data}
{_RESTRICTION if restricted else ""}{_SYNTHETIC if synthetic else ""}
## Test metrics
`{primary}` {report["value"]:.4f}, 95 % interval {report["ci_low"]:.4f} to {report["ci_high"]:.4f}, on {report["n"]:g}
examples. baseline: a simple one, gain over it; before: the pretrained core, untouched, tuning: the gain over that.

{table(lambda name: name in _COMPARED)}

{table(lambda name: not (name in known or name in _COMPARED or is_slice(name) or is_robust(name)))}
{parts}
## Limits
{_limits(numbers, synthetic)}

## Training
Stage `{story["stage"]}`, seed {story["seed"]}; {versions}.

| parameter | value |
|---|---|
{settings}

## Lineage
Commit `{tags["commit"]}`{changes}, weights `{tags["weights"][:16]}`,
sources lock `{tags["sources_lock"][:16]}`; the whole is in `lineage.json` beside this file and in the version's tags.
"""


def _interval(numbers: dict[str, float], name: str) -> str:
    if f"{name}_ci_low" not in numbers:
        return ""
    return f"{numbers[f'{name}_ci_low']:.4f} to {numbers[f'{name}_ci_high']:.4f}"


def _front_matter(model: str, report: dict[str, Any], sources: dict[str, dict[str, Any]], restricted: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    licences = {manifest["licence"] for manifest in sources.values()}
    (licence,) = licences if len(licences) == 1 else {None}
    learned = "corpus" if model == "base" else model
    result = EvalResult(
        task_type=_PIPELINE.get(model, model),
        dataset_type=learned,
        dataset_name=sources[learned]["source"],
        metric_type=report["primary"],
        metric_value=report["value"],
    )
    return ModelCardData(
        library_name="mlflow",
        license=licence.lower() if licence else "other",
        tags=["memgpt", *(["non-commercial"] if restricted else [])],
        pipeline_tag=_PIPELINE.get(model),
        model_name=f"memgpt-{model}",
        eval_results=[result],
    ).to_yaml()


def _limits(numbers: dict[str, float], synthetic: bool) -> str:
    """Weaknesses that the run's own numbers show."""
    found = ["Measured on data like its training data; on other text expect less."]
    if synthetic:
        found.append("Trained on generated text, at least in part: its numbers say nothing about real text.")
    for name, value in sorted(numbers.items()):
        if name.startswith("drop_") and numbers.get(f"{name}_ci_low", 0.0) > _SERIOUS:
            found.append(f"Loses {value:.2f} of its score by this change of the input: {name.removeprefix('drop_')}.")
    if numbers.get("tuning_ci_low", 1.0) <= 0:
        found.append("Fine-tuning has not certainly brought anything over the untouched core.")
    return "\n".join(f"- {line}" for line in found)


_RESTRICTION = "\n**Not for commercial use**: a source's licence forbids it.\n"
_SYNTHETIC = "\nSome of this is generated text: the numbers below say nothing about quality on real text.\n"
