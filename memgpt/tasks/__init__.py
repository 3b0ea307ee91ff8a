"""What differs between the tasks in training and evaluation. `judge("base")` and the three tasks share these names:

PRIMARY, PICTURE, test_rows, statistics, score, metrics, baseline, slices, picture. The three tasks add model and
Training, ner and sentiment also labels. `tables` is always the root of the tables, data/tables.
"""

import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from memgpt.errors import existing


def judge(name: str) -> ModuleType:
    """The module of `base`, `ner`, `sentiment` or `recommendation`."""
    return import_module(f"memgpt.tasks.{name}")


def manifest(tables: Path, source: str) -> dict[str, Any]:
    return json.loads(existing(tables / source / "manifest.json").read_text(encoding="utf-8"))


def rows_of(tables: Path, source: str, table: str) -> list[dict[str, Any]]:
    """A table as a list of dictionaries."""
    import pyarrow.parquet as pq

    return pq.read_table(existing(tables / source / f"{table}.parquet")).to_pylist()


def metric_names(labels: Sequence[str]) -> list[str]:
    """Labels as parts of metric names, with letters, digits, _ and . only, which MLflow accepts: "+1" and "-1" become
    plus1 and minus1. Of labels that become equal, all but the first get a number."""
    names: list[str] = []
    for label in labels:
        spelled = re.sub(r"^-(?=\d)", "minus", label.lower().replace("+", "plus"))
        base = name = re.sub(r"[^\w.]", "_", spelled)
        number = 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names


def by_length(lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The slices short and long: rows of at most the median length, and the longer ones."""
    long = np.array(lengths) > np.median(lengths) if len(lengths) else np.zeros(0, dtype=bool)
    return {"short": ~long, "long": long}
