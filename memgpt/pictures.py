"""PNG pictures: an evaluation's confusion matrix or curve, its calibration curve, and the monitor's trends."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from memgpt import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(target: Path, title: str, table: pd.DataFrame, calibration: np.ndarray | None) -> None:
    """`table` has the columns actual and predicted, a row per decision, or two columns of a curve.

    calibration: [bins, (confidence, accuracy, share)], drawn beside it, or None. The file depends on these alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 1 if calibration is None else 2
    figure, row = plt.subplots(1, panels, figsize=(6 * panels, 5), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10)
    if "predicted" in table:
        _confusion(row[0, 0], table)
    else:
        _curve(row[0, 0], table)
    if calibration is not None:
        _calibration(row[0, 1], calibration)
    with atomic.replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def _confusion(axes: "Axes", table: pd.DataFrame) -> None:
    names = sorted(set(table["actual"]) | set(table["predicted"]))
    counts = pd.crosstab(table["actual"], table["predicted"]).reindex(index=names, columns=names, fill_value=0)
    numbers = counts.to_numpy()
    shares = numbers / np.maximum(numbers.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (y, x), count in np.ndenumerate(numbers):
        axes.text(x, y, str(count), ha="center", va="center", color="white" if shares[y, x] > 0.5 else "black")
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")


def _curve(axes: "Axes", table: pd.DataFrame) -> None:
    across, up = table.columns
    axes.plot(table[across], table[up])
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(up.replace("_", " "))
    axes.grid(alpha=0.3)


def _calibration(axes: "Axes", bins: np.ndarray) -> None:
    confidence, accuracy, share = bins.T
    axes.plot([0, 1], [0, 1], linestyle="--", color="gray", linewidth=1, label="as sure as right")
    axes.plot(confidence, accuracy, marker="o", label="accuracy")
    axes.bar(confidence, share, width=0.04, alpha=0.3, label="share of texts")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the answer given", ylabel="share that is right")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_trend(target: Path, title: str, table: pd.DataFrame) -> None:
    """A share by day, with the band of usual values; days above it are marked.

    `table` has day, share, expected, low and high; NaN where there is no value.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axes.set_title(title, fontsize=10, parse_math=False)  # a topic may contain dollar signs
    known = table[table["share"].notna()]
    axes.fill_between(known["day"], known["low"], known["high"], alpha=0.2, step="mid", label="nothing unusual")
    axes.plot(known["day"], known["expected"], linestyle="--", linewidth=1, color="gray", label="expected")
    axes.plot(known["day"], known["share"], marker=".", linewidth=1, label="seen")
    beyond = known[known["share"] > known["high"]]
    axes.scatter(beyond["day"], beyond["share"], color="red", zorder=3)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=3)
    with atomic.replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=80, metadata={"Software": None})
    plt.close(figure)
