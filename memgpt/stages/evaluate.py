"""evaluate@model: score a model on the test split, compared with a simple baseline and the core before fine-tuning.
Also its slices, robustness and worst mistakes, a table and a picture.

Reads models/<model>, models/base and the tables; writes reports/metrics/<model>.json, reports/mistakes/<model>.jsonl
and reports/plots/<model>.{csv,png}. NAME_ci_low and NAME_ci_high are the 95 % interval of the report's metric NAME.
"""

import json
from pathlib import Path

import pandas as pd

from memgpt import atomic, bootstrap, mistakes, pictures, predict, probe, robustness
from memgpt.config import TABLES, Config
from memgpt.errors import existing
from memgpt.tasks import judge

MODELS, METRICS, PLOTS = Path("models"), Path("reports/metrics"), Path("reports/plots")
MISTAKES = Path("reports/mistakes")


def run(config: Config, model: str) -> dict[str, float]:
    params, module = config.evaluate, judge(model)
    rows = module.test_rows(TABLES)
    predictor = predict.load(model, existing(MODELS / model))
    predictions = predictor.predict([row["input"] for row in rows])
    baseline = module.baseline(TABLES, rows)
    ours, theirs = module.statistics(rows, predictions), module.statistics(rows, baseline)
    low, high = bootstrap.interval(ours, module.score, params.bootstrap, params.seed)
    gain, gain_low, gain_high = bootstrap.paired(ours, theirs, module.score, params.bootstrap, params.seed)
    metrics = module.metrics(rows, predictions)
    if hasattr(module, "apart"):
        metrics |= module.apart(TABLES, rows, predictions, predictor)
    for name, chosen in module.slices(rows, TABLES).items():
        if chosen.any():
            key, part = f"{module.PRIMARY}_{name}", ours[chosen]
            bounds = bootstrap.interval(part, module.score, params.bootstrap, params.seed)
            metrics |= {key: float(module.score(part.sum(0))), f"{key}_n": float(chosen.sum())}
            metrics |= {f"{key}_ci_low": bounds[0], f"{key}_ci_high": bounds[1]}
    if params.before and model != "base":
        start = module.statistics(rows, probe.before(model, MODELS / "base", TABLES, rows))
        tuned = bootstrap.paired(ours, start, module.score, params.bootstrap, params.seed)
        metrics["before"] = float(module.score(start.sum(0)))
        metrics |= dict(zip(("tuning", "tuning_ci_low", "tuning_ci_high"), tuned, strict=True))
    metrics |= robustness.measure(
        model,
        predictor.predict,
        robustness.sample(rows, params.robustness, params.seed),
        module,
        TABLES,
        resamples=params.bootstrap,
        seed=params.seed,
    )
    numbers = {
        **metrics,
        "value": metrics[module.PRIMARY],
        "ci_low": low,
        "ci_high": high,
        "n": len(rows),
        "baseline": float(module.score(theirs.sum(0))),
        "gain": gain,
        "gain_ci_low": gain_low,
        "gain_ci_high": gain_high,
    }
    numbers = {name: round(value, 6) for name, value in numbers.items()}
    interval = f"{numbers['value']:.3f} [{low:.3f}, {high:.3f}]"
    title = f"{model}: {module.PRIMARY} {interval}, baseline {numbers['baseline']:.3f}"
    table = pd.DataFrame(module.picture(rows, predictions), columns=module.PICTURE)
    with atomic.replacing(PLOTS / f"{model}.csv") as aside:
        table.to_csv(aside, index=False, lineterminator="\n")
    calibration = module.reliability(rows, predictions) if hasattr(module, "reliability") else None
    pictures.draw(PLOTS / f"{model}.png", title, table, calibration)
    wrong = mistakes.worst(model, rows, predictions, ours, TABLES, params.mistakes)
    lines = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in wrong)
    atomic.write_text(MISTAKES / f"{model}.jsonl", lines)
    atomic.write_json(METRICS / f"{model}.json", {"primary": module.PRIMARY, **numbers})
    return numbers
