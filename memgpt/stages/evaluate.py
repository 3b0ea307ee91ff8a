"""evaluate@model: the test split, with an interval, beside a simple baseline; a table and a picture of it.

Reads models/<model> and the tables; writes reports/metrics/<model>.json and reports/plots/<model>.{csv,png}.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memgpt import atomic, bootstrap, predict
from memgpt.config import Config
from memgpt.tasks import TABLES, judge

MODELS, METRICS, PLOTS = Path("models"), Path("reports/metrics"), Path("reports/plots")


def run(config: Config, model: str) -> dict[str, float]:
    params, module = config.evaluate, judge(model)
    rows = module.test_rows(TABLES)
    predictions = predict.load(model, MODELS / model).predict([row["input"] for row in rows])
    baseline = module.baseline(TABLES, rows)
    ours, theirs = module.statistics(rows, predictions), module.statistics(rows, baseline)
    low, high = bootstrap.interval(ours, module.score, params.bootstrap, params.seed)
    gain, gain_low, gain_high = bootstrap.paired(ours, theirs, module.score, params.bootstrap, params.seed)
    metrics = module.metrics(rows, predictions)
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
    table, kind = module.picture(rows, predictions)
    _draw(model, table, kind, numbers, module.PRIMARY)
    atomic.write_json(METRICS / f"{model}.json", {"primary": module.PRIMARY, **numbers})
    return numbers


def _draw(model: str, table: list[dict[str, Any]], kind: str, numbers: dict[str, float], primary: str) -> None:
    """`table` as CSV for `dvc plots` and as PNG for everybody: a confusion matrix or a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frame = pd.DataFrame(table)
    with atomic.replacing(PLOTS / f"{model}.csv") as aside:
        frame.to_csv(aside, index=False, lineterminator="\n")
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    if kind == "confusion":
        names = sorted(set(frame["actual"]) | set(frame["predicted"]))
        counts = pd.crosstab(frame["actual"], frame["predicted"]).reindex(index=names, columns=names, fill_value=0)
        shares = counts.to_numpy() / np.maximum(counts.to_numpy().sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts.to_numpy()):
            axes.text(
                column,
                row,
                str(count),
                ha="center",
                va="center",
                color="white" if shares[row, column] > 0.5 else "black",
            )
        axes.set_xlabel("predicted")
        axes.set_ylabel("actual")
    else:
        across, up = frame.columns
        axes.plot(frame[across], frame[up])
        axes.set_xlabel(across.replace("_", " "))
        axes.set_ylabel(up.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_title(
        f"{model}: {primary} {numbers['value']:.3f} [{numbers['ci_low']:.3f}, {numbers['ci_high']:.3f}], "
        f"baseline {numbers['baseline']:.3f}",
        fontsize=10,
    )
    with atomic.replacing(PLOTS / f"{model}.png") as aside:
        figure.savefig(aside, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
