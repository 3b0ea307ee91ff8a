"""Is MemGPT as good on each task as what a user would otherwise pick? Same data, same steps, same machine.

    python benchmarks/tasks.py --quick            one set per task, one seed, no trials, cores of half a million tokens
    python benchmarks/tasks.py --compare          all sets, three seeds, default settings: no trials
    python benchmarks/tasks.py --full [--jobs 2]  also trials for the peers; joint training, tuning, regularisers
    python benchmarks/tasks.py --report           tables from the finished cells of --compare and --full

Needs the real data sets in MEMGPT_REAL_DATA. All systems that are pretrained start from the cells memgpt-128-4M-1 and
bert-128-4M-1 of benchmarks/core.py (--quick: memgpt-128-0.5M-1, bert-128-0.5M-1). If their weights are missing, they
are pretrained first, which takes longest. MemGPT keeps its default settings; the peers' are chosen on validation
(--full) or are usual values. Test splits are read once, by the final cells. "beats": the paired 95 % interval of the
difference is above 0; "matches": it contains 0.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import core
import numpy as np
import runner
from task_cells import BERT, CORE, RESULTS, SETS, STATISTICS, TRUNK, WORK, prepare, start

from memgpt import bootstrap
from memgpt.atomic import write_json
from memgpt.tasks import judge

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
RESAMPLES = 1000
Cells = list[tuple[str, dict[str, Any]]]
# Settings tried on validation, by system. Without trials the middle one is used. A single one needs no trial.
RATES = [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)]
CRF = [{"c1": c1, "c2": c2} for c1 in (0.01, 0.1, 0.5) for c2 in (0.01, 0.1)]
TRIALS: dict[str, list[dict[str, Any]]] = {
    "memgpt": RATES[1:2],
    "bert": RATES,
    "crf": CRF,
    "crf_biased": CRF,
    "bag_of_words": [{"strength": c} for c in (0.3, 1.0, 3.0, 10.0, 30.0)],
    "item_knn": [{"neighbours": k} for k in (20, 50, 100, 300)],
    "ease": [{"penalty": penalty} for penalty in (100, 250, 500, 1000, 2000)],
    "sasrec": RATES,
    "popularity": [],
}
PEERS = {
    "ner": ("bert", "crf", "crf_biased"),
    "sentiment": ("bert", "bag_of_words"),
    "recommendation": ("popularity", "item_knn", "ease", "sasrec"),
}
SEEDED = ("memgpt", "bert", "sasrec")
PRETRAINED = ("memgpt", "bert")
QUICK = {"memgpt": "memgpt-128-0.5M-1", "bert": "bert-128-0.5M-1"}  # what --quick starts from
TRIO = "wikigold+financial_phrasebank+movielens"  # one set per task, for measurements across tasks
METHODS: dict[str, dict[str, Any]] = {
    **{method: {"tune": method} for method in ("all", "backbone", "memory", "head", "adapter", "lora", "adalora")},
    "prefix": {"tune": "prefix", "learning_rate": 0.01},  # few parameters, far from their optimum
}
REGULARISERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no dropout": {"dropout": 0.0},
    "dropout 0.3": {"dropout": 0.3},
    "early stopping": {"patience": 2},
    "moving average": {"ema_decay": 0.98},
    "adversarial": {"adversarial": 1.0},
    "synonyms": {"augment.synonyms": 1.0},
    "word edits": {"augment.word_edits": 1.0},
    "letter case": {"augment.letter_case": 1.0},
    "recombination": {"augment.recombination": 1.0},
    "mention replacement": {"augment.mention_replacement": 1.0},
    "soup of three": {"soup": 3},
    "ensemble of three": {"ensemble": 3},
}

DECIDING = ("as it is", "no dropout")  # with two seeds on every set

# Readers' histories have no words to change, and with one epoch there is no earlier one to stop at.
WORDS = ("synonyms", "word edits", "letter case", "recombination", "mention replacement")
NOT_FOR = {
    "ner": (),
    "sentiment": ("mention replacement",),
    "recommendation": (*WORDS, "early stopping", "ensemble of three"),
}
# As many examples as in training the three tasks separately, and the same item length.
JOINT = {"steps": 3130, "item_length": 16}


def compared(name: str, seeds: tuple[int, ...], trials: bool, starts: dict[str, str] | None = None) -> Cells:
    """Cells of all systems on a set: trials on validation, then final cells on test. starts: system → pretrained cell,
    if not the usual ones."""
    cells: Cells = []
    for system in ("memgpt", *PEERS[SETS[name][0]]):
        base = {"set": name, "system": system}
        if starts:
            base["core"] = starts.get(system, starts["memgpt"])
        tried = TRIALS[system] if trials and len(TRIALS[system]) > 1 else []
        names = []
        for number, changes in enumerate(tried):
            names.append(f"{name}-{system}-trial{number}")
            cells.append((names[-1], {**base, "seed": 1, "changes": changes}))
        middle = TRIALS[system][len(TRIALS[system]) // 2 :][:1]
        final = {"after": names} if names else {"changes": middle[0] if middle else {}}
        label = f"{name}-{system}-chosen" if names else f"{name}-{system}"
        for seed in seeds if system in SEEDED else seeds[:1]:
            cells.append((f"{label}-{seed}", {**base, "seed": seed, "test": True, **final}))
    return cells


def regularised(name: str) -> Cells:
    """Cells with all regularisers on a set of TRIO; on other sets only those that decide on a default."""
    task = SETS[name][0]
    return [
        (
            f"{name}-{label.replace(' ', '_')}-{seed}",
            {"set": name, "system": "memgpt", "seed": seed, "changes": {**TRUNK[task], **changes}},
        )
        for label, changes in REGULARISERS.items()
        if label in DECIDING or (label not in NOT_FOR[task] and name in TRIO.split("+"))
        for seed in (SEEDS[:2] if label in DECIDING else SEEDS[:1])
    ]


def plan(mode: str) -> Cells:
    """All cells of quick, compare or full, trials before the cells that wait for them. The spec of our cells contains
    that of the core from which they start, so that results from another form of it do not count."""
    pretrained = dict([*core.plan(quick=True), *core.plan(quick=False)])
    return [
        (name, {**spec, "pretrained": pretrained[core_of(spec)]} if spec.get("system", "memgpt") == "memgpt" else spec)
        for name, spec in _plan(mode)
    ]


def core_of(spec: dict[str, Any]) -> str:
    """The pretrained cell from which a cell starts."""
    return spec.get("core", BERT if spec.get("system") == "bert" else CORE)


def _plan(mode: str) -> Cells:
    if mode == "quick":
        cells = [cell for name in TRIO.split("+") for cell in compared(name, SEEDS[:1], False, QUICK)]
        return [(f"quick-{name}", spec) for name, spec in cells]
    if mode == "compare":
        return [cell for name in SETS for cell in compared(name, SEEDS, False)]
    cells = [cell for name in SETS for cell in compared(name, SEEDS, True)]
    spec: dict[str, Any] = {"kind": "joint", "set": TRIO, "seed": 1, "changes": JOINT}
    cells.append(("joint-plain-1", spec))
    cells.append(("joint-balanced-1", {**spec, "changes": {**JOINT, "balancing": "uncertainty"}}))
    for part in TRIO.split("+"):
        spec = {"kind": "forgetting", "set": TRIO, "part": part, "seed": 1, "after": ["joint-plain-1"]}
        cells += [(f"tune-{part}-{method}", {**spec, "changes": changes}) for method, changes in METHODS.items()]
    for name in SETS:
        cells += regularised(name)
    return cells


def run(cells: Cells, jobs: int) -> None:
    source = Path(os.environ.get("MEMGPT_REAL_DATA", ""))
    if not (source / "ner").is_dir():
        raise SystemExit(f"{source}: no data sets; set MEMGPT_REAL_DATA to the folder that holds them")
    for name in sorted({spec["set"] for _, spec in cells}):
        prepare(name, source)
    waiting = [spec for name, spec in cells if not runner.done(RESULTS, name, spec)]
    starts = {core_of(spec) for spec in waiting if spec.get("system", "memgpt") in PRETRAINED}
    core.provide(starts, jobs)
    for name in starts:  # before the parallel cells need it
        start(name)
    runner.run(cells, jobs, HERE / "task_cells.py", RESULTS, WORK / "logs")


# --- results


def results(cells: Cells) -> dict[str, Any]:
    return {name: cell for name, spec in cells if (cell := runner.done(RESULTS, name, spec))}


def compare(done: dict[str, Any], name: str) -> dict[str, Any]:
    """Each system's score on a set's test split, over its seeds, and MemGPT minus each peer, paired by example."""
    module = judge(SETS[name][0])
    sums: dict[str, list[np.ndarray]] = {}
    for cell, result in done.items():
        spec = result["spec"]
        if spec["set"] == name and spec.get("test"):
            sums.setdefault(spec["system"], []).append(_statistics(cell))
            if "text" in result:
                sums.setdefault(f"{spec['system']}_text", []).append(_statistics(f"{cell}-text"))
    table: dict[str, Any] = {}
    for system, seeds in sums.items():
        total = np.mean(seeds, axis=0)
        low, high = bootstrap.interval(total, module.score, RESAMPLES, 1)
        row = {"score": float(module.score(total.sum(0))), "ci_low": low, "ci_high": high, "seeds": len(seeds)}
        if system != "memgpt" and "memgpt" in sums:
            ours = np.mean(sums["memgpt_text" if system == "plain_text" else "memgpt"], axis=0)
            gain, low, high = bootstrap.paired(ours, total, module.score, RESAMPLES, 1)
            verdict = "beats" if low > 0 else "matches" if high >= 0 else "below"
            row |= {"gain": gain, "gain_ci_low": low, "gain_ci_high": high, "verdict": verdict}
        table[system] = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    return table


def _statistics(cell: str) -> np.ndarray:
    path = STATISTICS / f"{cell}.npz"
    if not path.exists():
        raise SystemExit(f"{path}: missing; remove {RESULTS / cell}.json and run its cell again")
    with np.load(path) as file:
        return file["arr_0"]


def report(cells: Cells, mode: str) -> None:
    done = results(cells)
    summary: dict[str, Any] = {"cells": {"done": len(done), "planned": len(cells)}}
    summary["compared"] = {name: table for name in SETS if (table := compare(done, name))}
    summary |= {"joint": joint(done), "tuning": tuned(done), "regularisers": regularisers(done)}
    write_json(HERE / "results" / f"tasks_{mode}.json", summary)
    print("\n".join(lines(summary["compared"])))
    for key in ("joint", "tuning", "regularisers"):
        for name, row in summary[key].items():
            print(f"{key:12} {name:48} {', '.join(f'{column} {value}' for column, value in row.items())}")


Row = dict[str, Any]


def joint(done: dict[str, Any]) -> dict[str, Row]:
    """Each task trained alone, jointly, and tuned after that: mean validation score, and the number of seeds."""
    table: dict[str, Row] = {}
    for part in TRIO.split("+"):
        task = SETS[part][0]
        singles = [f"{part}-as_it_is-{seed}" for seed in SEEDS]
        table[part] = _mean(done, singles, {"single": "validation"}, "seeds (single)")
        for kind in ("plain", "balanced"):
            columns = {f"{stage} ({kind})": f"{task}_{stage}" for stage in ("joint", "joint_then_tuned")}
            table[part] |= _mean(done, [f"joint-{kind}-1"], columns, f"seeds ({kind})")
    return {part: row for part, row in table.items() if row}


def tuned(done: dict[str, Any]) -> dict[str, Row]:
    """Each tuning method: trained parameters, minutes, the task's validation score, and the changes of the rest: nats
    per token of text (before − after) and the other tasks' metrics (after − before)."""
    table = {}
    for cell in done.values():
        if cell["spec"].get("kind") == "forgetting":
            row = {key: cell[key] for key in ("trainable_parameters", "minutes", "validation")}
            row["text"] = round(cell["text_loss_before"] - cell["text_loss_after"], 4)
            others = [key.removesuffix("_after") for key in cell if key.endswith("_after") and "text" not in key]
            row |= {task: round(cell[f"{task}_after"] - cell[f"{task}_before"], 4) for task in others}
            table[f"{cell['spec']['part']}, {cell['spec']['changes']['tune']}"] = row
    return table


def regularisers(done: dict[str, Any]) -> dict[str, Row]:
    """Mean validation score and minutes with each regulariser."""
    columns = {"validation": "validation", "minutes": "minutes"}
    table = {}
    for name in SETS:
        for label in REGULARISERS:
            cells = [f"{name}-{label.replace(' ', '_')}-{seed}" for seed in SEEDS]
            if row := _mean(done, cells, columns):
                table[f"{name}, {label}"] = row
    return table


def _mean(done: dict[str, Any], cells: list[str], columns: dict[str, str], number: str = "seeds") -> Row:
    """Column → mean of the cells' values of its key, and the number of finished cells; empty if there are none."""
    there = [done[cell] for cell in cells if cell in done]
    if not there:
        return {}
    means = {column: round(float(np.mean([cell[key] for cell in there])), 4) for column, key in columns.items()}
    return {**means, number: len(there)}


def lines(compared: dict[str, Any]) -> Iterator[str]:
    for name, table in compared.items():
        for system, row in table.items():
            line = f"{name:22} {system:14} {row['score']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
            if "gain" in row:
                interval = f"[{row['gain_ci_low']:+.3f}, {row['gain_ci_high']:+.3f}]"
                line += f"  memgpt {row['verdict']}: {row['gain']:+.3f} {interval}"
            yield f"{line}  ({row['seeds']} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--quick", action="store_true", help="a set per task, one seed, no trials")
    modes.add_argument("--compare", action="store_true", help="every set, three seeds, no trials")
    modes.add_argument("--full", action="store_true", help="trials for the peers, joint training, tuning, regularisers")
    modes.add_argument("--report", action="store_true", help="only the tables")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    arguments = parser.parse_args()
    if arguments.report:
        for mode in ("compare", "full"):
            report(plan(mode), mode)
        return
    mode = next(mode for mode in ("quick", "compare", "full") if getattr(arguments, mode))
    run(plan(mode), arguments.jobs)
    report(plan(mode), mode)


if __name__ == "__main__":
    main()
