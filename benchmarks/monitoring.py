"""False-alarm rate of `memgpt monitor`, and how soon it finds a surge, by simulation.

    python benchmarks/monitoring.py [--topics 2000] [--sentiment FOLDER]

The number of texts and the share of negative ones depend on the weekday, and days vary more than binomially. A day is
judged once. Drift is tested on samples of held-out rows of the newsroom, and of a folder with train.jsonl, dev.jsonl
and test.jsonl. The table is written to benchmarks/results/monitoring.json.
"""

import argparse
import contextlib
import tempfile
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

from memgpt import config, monitoring, tables
from memgpt.atomic import write_json
from memgpt.monitoring import WINDOWS, alarm_level, predict, survival
from memgpt.newsroom import generate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "monitoring.json"
WEEKS = 12
TEXTS = {
    "1 a day": [1] * 7,
    "5": [5] * 7,
    "12, Saturday and Sunday 3": [12] * 5 + [3] * 2,
    "30": [30] * 7,
    "100, 40": [100] * 5 + [40] * 2,
}
SHARES = {"0.2": [0.2] * 7, "0.3 on Mondays, 0.12 Saturday, Sunday": [0.3] + [0.2] * 4 + [0.12] * 2, "0.05": [0.05] * 7}
VARYING = (0.0, 0.02, 0.05)  # intraclass correlation of a day's texts


def draw(
    rng: np.random.Generator, topics: int, days: int, texts: list[int], share: list[float], rho: float, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(negative, texts), each [topics, days]; `start` is the weekday of the first day."""
    weekday = (np.arange(days) + start) % 7
    n = rng.poisson(np.array(texts)[weekday], (topics, days))
    p = np.broadcast_to(np.array(share)[weekday], n.shape)
    if rho:
        p = rng.beta(p * (1 / rho - 1), (1 - p) * (1 / rho - 1))
    return rng.binomial(n, p), n


def alarms(negative: np.ndarray, texts: np.ndarray, weeks: int, false_alarms: float) -> np.ndarray:
    """[topics]: whether the last day is a surge, by the rule of `monitoring.judge`."""
    alarm = np.zeros(len(texts), bool)
    for days in WINDOWS:
        x, n = negative[:, -7 * weeks - days :], texts[:, -7 * weeks - days :]
        chances = survival(n[:, -days:].sum(1), *predict(x[:, :-days], n[:, :-days], n[:, -days:]))
        alarm |= chances[np.arange(len(x)), x[:, -days:].sum(1)] <= alarm_level(false_alarms)
    return alarm


def rate(
    rng: np.random.Generator, topics: int, texts: list[int], share: list[float], rho: float, weeks: int = WEEKS
) -> float:
    """Alarms per topic and year without any surge, averaged over the days of the week; the nominal rate is 1."""
    found = 0
    for start in range(7):
        found += alarms(*draw(rng, topics, 7 * weeks + 3, texts, share, rho, start), weeks, 1.0).sum()
    return 365 * found / (7 * topics)


def power(
    rng: np.random.Generator, topics: int, texts: int, before: float, after: float, rho: float, weeks: int = WEEKS
) -> list[float]:
    """Probability that a lasting surge is found on its first day, by its second, third, …, seventh day."""
    days = 7 * weeks + 3
    calm, many = draw(rng, topics, days + 7, [texts] * 7, [before] * 7, rho)
    surge, more = draw(rng, topics, 7, [texts] * 7, [after] * 7, rho)
    negative, counts = (np.concatenate([a[:, :days], b], 1) for a, b in ((calm, surge), (many, more)))
    found, told = np.zeros(topics, bool), []
    for day in range(1, 8):
        found |= alarms(negative[:, : days + day], counts[:, : days + day], weeks, 1.0)
        told.append(float(found.mean()))
    return told


def false_drifts(train: pd.DataFrame, held_out: pd.DataFrame, samples: int = 200, texts: int = 200) -> dict[str, int]:
    """Number of samples of held-out rows for which drift from train is reported; the tokenizer is trained on train."""
    settings = config.load(ROOT / "params.yaml").monitor
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train["text"], vocab_size=4096, show_progress=False)
    found: dict[str, int] = dict.fromkeys(settings.max_psi.model_dump(), 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for path in (monitoring.TRAIN, monitoring.TOKENIZER):
            path.parent.mkdir(parents=True)
        rows = pa.Table.from_pandas(train[["text", "topic", "label"]], preserve_index=False)
        tables.write(rows, monitoring.TRAIN)
        tokenizer.save(str(monitoring.TOKENIZER))
        monitoring.keep_reference(Path("reference"), "1")
        for seed in tqdm(range(samples), desc="drift"):
            sample = held_out.sample(texts, random_state=seed)[["text", "topic", "label"]]
            for drift in monitoring.drifts(settings, sample.assign(day=date(2024, 6, 3)), Path("reference")):
                found[drift.what] += 1
    return found


def held_out_sets(folder: Path | None) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Data set name → (train, held-out rows)."""
    newsroom = generate()["sentiment"]
    sets = {"newsroom": (newsroom["train"], pd.concat([newsroom["validation"], newsroom["test"]]))}
    if folder:
        parts = {name: pd.read_json(folder / f"{name}.jsonl", lines=True) for name in ("train", "dev", "test")}
        parts = {name: part.assign(topic=None) for name, part in parts.items()}
        sets[folder.name] = (parts["train"], pd.concat([parts["dev"], parts["test"]]))
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms and power of `memgpt monitor`, by simulation.")
    parser.add_argument("--topics", type=int, default=2000, help="simulated in each row of the table")
    parser.add_argument("--sentiment", type=Path, metavar="FOLDER", help="labelled texts, for drift")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    rates = [
        {
            "texts": texts,
            "negative": share,
            "correlation": rho,
            "false_alarms_per_year": rate(rng, options.topics, TEXTS[texts], SHARES[share], rho),
        }
        for texts, share, rho in tqdm(list(product(TEXTS, SHARES, VARYING)), desc="false alarms")
    ]
    found: list[dict[str, Any]] = [
        {
            "texts_a_day": texts,
            "from": 0.2,
            "to": after,
            "correlation": rho,
            "found_by_day": power(rng, options.topics, texts, 0.2, after, rho),
        }
        for texts, after, rho in tqdm(list(product((10, 30, 100), (0.3, 0.4), VARYING)), desc="power")
    ]
    for row in rates:
        print(*row.values(), sep="  ")
    for row in found:
        print(*row.values(), sep="  ")
    drifted = {name: false_drifts(*rows) for name, rows in held_out_sets(options.sentiment).items()}
    print(drifted)
    result = {"stated_false_alarms_per_year": 1.0, "weeks": WEEKS, "topics": options.topics}
    write_json(RESULTS, result | {"rates": rates, "power": found, "drifted_of_200_samples": drifted})


if __name__ == "__main__":
    main()
