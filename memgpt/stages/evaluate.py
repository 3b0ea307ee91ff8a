"""evaluate@model: the test split, with an interval, beside a simple baseline; a table and a picture of it.

Reads models/<model> and the tables; writes reports/metrics/<model>.json and reports/plots/<model>.{csv,png}.
"""

from pathlib import Path

import pandas as pd

from memgpt import atomic, bootstrap, pictures, predict
from memgpt.config import Config
from memgpt.tasks import TABLES, judge

MODELS, METRICS, PLOTS = Path("models"), Path("reports/metrics"), Path("reports/plots")


def run(config: Config, model: str) -> dict[str, float]:
    params, module = config.evaluate, judge(model)
    rows = module.test_rows(TABLES)
    predictor = predict.load(model, MODELS / model)
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
            metrics[f"{module.PRIMARY}_{name}"] = float(module.score(ours[chosen].sum(0)))
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
    atomic.write_json(METRICS / f"{model}.json", {"primary": module.PRIMARY, **numbers})
    return numbers
