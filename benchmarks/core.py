"""Is a GPT with memory better than a plain GPT and a plain BERT of the same cost?

    python benchmarks/core.py --quick            one seed, half a million tokens, two widths
    python benchmarks/core.py --full [--jobs 2]  a day on two cores: three seeds at 4 M and 10 M tokens, four widths
    python benchmarks/core.py --ablation         what each part of the memory contributes, a million tokens each
    python benchmarks/core.py --report           tables and pictures from the finished cells

Trains on the real text in MEMGPT_REAL_DATA, on a GPU if there is one. Each cell (model, seed, budget) is a separate
process with one thread. It resumes where it was stopped; its result is stored in benchmarks/results/core/. All models
see the same rows in the same order with the same optimizer, schedule and precision: `cells.RECIPE` and `peers`.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import runner
from cells import CELLS, WORK, prepare

from memgpt.atomic import write_json

HERE = Path(__file__).parent
ROWS = 262144
WIDTHS = (64, 96, 128, 192)
MAIN, BUDGET, LARGEST = 128, 4, 10  # width, million tokens
FRONTIER = 2  # million tokens for each width
EQUAL_ROWS = 10534  # table size with which width 128 stores as many parameters as Llama's shape of width 192
MORE_ROWS = 4 * ROWS  # for the largest budget, where most n-grams own no row
AS_SHIPPED = {"least": 2, "recall": 4}  # the defaults of params.yaml and MemGPTConfig
SEEDS = (1, 2, 3)
MILLION = 1_000_000
Spec = dict[str, Any]


def pretraining(kind: str, width: int, tokens: float, seed: int, rows: int = ROWS) -> tuple[str, Spec]:
    spec: Spec = {"kind": kind, "width": width, "tokens": int(tokens * MILLION), "seed": seed}
    name = f"{kind}-{width}-{tokens:g}M-{seed}"
    if kind == "memgpt":
        spec |= {"rows": rows, **AS_SHIPPED}
        name += "" if rows == ROWS else f"-{rows}rows"
    return name, spec


def tuning(start: tuple[str, Spec], task: str, seed: int, epochs: int = 5) -> tuple[str, Spec]:
    """A fine-tuning cell. Its spec contains that of its start, so that results from another start do not count."""
    name, pretrained = start
    spec = {"kind": pretrained["kind"], "start": name, "pretrained": pretrained}
    return f"{name}-{task}-{seed}", {**spec, "task": task, "seed": seed, "epochs": epochs}


def speed() -> tuple[str, Spec]:
    _, spec = pretraining("memgpt", MAIN, 0, 1)
    del spec["tokens"], spec["seed"]
    return f"memgpt-{MAIN}-training-speed", {**spec, "kind": "speed"}


def plan(quick: bool) -> list[tuple[str, Spec]]:
    """All cells; those from which others start come first."""
    if quick:
        cells = [pretraining(kind, width, 0.5, 1) for width in (64, MAIN) for kind in ("memgpt", "llama")]
        cells.append(pretraining("bert", MAIN, 0.5, 1))
        starts = [cell for cell in cells if cell[1]["width"] == MAIN]
        return [
            *cells,
            *(tuning(start, task, 1, epochs=2) for start in starts for task in ("ner", "sentiment")),
            speed(),
        ]
    main = [pretraining(kind, MAIN, BUDGET, seed) for seed in SEEDS for kind in ("memgpt", "llama")]
    frontier = [pretraining(kind, width, FRONTIER, 1) for width in WIDTHS for kind in ("memgpt", "llama")]
    bert = pretraining("bert", MAIN, BUDGET, 1)
    tasks = ("ner", "sentiment")
    tuned = [tuning(cell, task, cell[1]["seed"]) for cell in main for task in tasks]
    tuned += [tuning(bert, task, seed) for seed in SEEDS for task in tasks]
    # Of the frontier, the cheap models with memory and the expensive ones without are compared on tasks.
    tuned += [
        tuning(cell, task, seed)
        for cell in frontier
        if (cell[1]["width"] < MAIN) == (cell[1]["kind"] == "memgpt")
        for seed in SEEDS
        for task in tasks
    ]
    short = [pretraining(kind, MAIN, 1, 1) for kind in ("memgpt", "llama")]
    stored = pretraining("memgpt", MAIN, FRONTIER, 1, rows=EQUAL_ROWS)
    large = [pretraining(kind, MAIN, LARGEST, seed) for seed in SEEDS for kind in ("memgpt", "llama")]
    large.append(pretraining("memgpt", MAIN, LARGEST, 1, rows=MORE_ROWS))
    return [*main[:4], *frontier, bert, *main[4:], *tuned, stored, *short, speed(), *large]


ABLATIONS: dict[str, Spec] = {
    "as it is": {},
    "no memory": {"rows": 0, "recall": 0},
    "no recall": {"recall": 0},
    "recall alone": {"rows": 0},
    "runs of 2": {"recall": 2},
    "runs of 8": {"recall": 8},
    "no gate": {"gate": False},
    "no convolution": {"changes": {"memory_kernel": 0}},
    "n-grams of 2 and 3": {"changes": {"memory_ngrams": [2, 3]}},
    "single tokens only": {"changes": {"memory_ngrams": [1]}},
    "n-grams of 1 to 4": {"changes": {"memory_ngrams": [1, 2, 3, 4]}},
    "first layer only": {"changes": {"memory_layers": [0]}},
    "layers 0 and 2": {"changes": {"memory_layers": [0, 2]}},
    "32 k rows": {"rows": 32768},
    "product keys instead": {"rows": 0, "recall": 0, "product_key": True},
    "a third of the table rate": {"recipe": {"memory_learning_rate": 1e-2}},
    "three times the table rate": {"recipe": {"memory_learning_rate": 1e-1}},
}


def ablations() -> list[tuple[str, Spec]]:
    """Cells of a million tokens, each of which differs from the main one in one respect."""
    cells = []
    for label, change in ABLATIONS.items():
        name, spec = pretraining("memgpt", MAIN, 1, 1)
        if change:
            name = f"ablation-{label.replace(',', '').replace(' ', '-')}"
        cells.append((name, {**spec, **change}))
    return cells


def report_ablations() -> None:
    done = results(ablations())
    rows = {
        label: {k: done[name][k] for k in ("validation", "wikitext2", "multiply_adds", "stored")}
        for label, (name, _) in zip(ABLATIONS, ablations(), strict=True)
        if name in done
    }
    write_json(HERE / "results/core_ablation.json", rows)
    for label, row in rows.items():
        print(f"{label:28} validation {row['validation']:.4f}  wikitext2 {row['wikitext2']:.4f}")


def run(cells: list[tuple[str, Spec]], jobs: int) -> None:
    prepare(Path(os.environ.get("MEMGPT_REAL_DATA", "")))
    # Results are in git, weights are not: cells from which others start are run again if their weights are missing.
    waiting = [spec for name, spec in cells if not runner.done(CELLS, name, spec)]
    again = {spec["start"] for spec in waiting if "start" in spec and not weights(spec["start"]).is_dir()}
    runner.run(cells, jobs, HERE / "cells.py", CELLS, WORK / "logs", again)


def weights(name: str) -> Path:
    """The model directory of a pretrained cell."""
    return WORK / "cells" / name / "model"


def provide(names: set[str], jobs: int) -> None:
    """Pretrain the named cells whose weights are missing, for a benchmark that starts from them."""
    lacking = [
        (name, spec)
        for name, spec in [*plan(quick=True), *plan(quick=False)]
        if name in names and not weights(name).is_dir()
    ]
    if lacking:
        prepare(Path(os.environ.get("MEMGPT_REAL_DATA", "")))
        print(f"pretraining first, for tens of minutes: {', '.join(name for name, _ in lacking)}")
        runner.run(lacking, jobs, HERE / "cells.py", CELLS, WORK / "logs", names)


# --- results


def results(cells: Iterable[tuple[str, Spec]]) -> dict[str, Any]:
    return {name: cell for name, spec in cells if (cell := runner.done(CELLS, name, spec))}


def summarise(done: dict[str, Any], budget: float, frontier: float) -> dict[str, Any]:
    """The numbers behind the targets, except those whose cells are missing. budget, frontier: millions of tokens."""
    summary: dict[str, Any] = {"targets": []}

    def cell(kind: str, width: int = MAIN, tokens: float = budget, seed: int = 1, rows: int = ROWS) -> Any:
        return done.get(pretraining(kind, width, tokens, seed, rows)[0])

    def target(name: str, value: float, wanted: str, reached: bool | None) -> None:
        summary["targets"].append({"name": name, "value": round(value, 4), "wanted": wanted, "reached": reached})

    growth = []
    for tokens in (0.5, 1, 2, 4, LARGEST):
        seeds = [s for s in SEEDS if cell("memgpt", tokens=tokens, seed=s) and cell("llama", tokens=tokens, seed=s)]
        gaps = {
            text: [
                round(cell("llama", tokens=tokens, seed=s)[text] - cell("memgpt", tokens=tokens, seed=s)[text], 4)
                for s in seeds
            ]
            for text in ("validation", "wikitext2")
        }
        if seeds:
            growth.append({"tokens": tokens, **{text: round(_mean(gap), 4) for text, gap in gaps.items()}})
        if seeds and tokens in (budget, LARGEST):
            summary[f"gaps_{tokens:g}M"] = gaps
            for text, gap in gaps.items():
                name = f"nats below Llama's shape, {text}, {tokens:g} M tokens, mean of {len(seeds)} seeds"
                target(name, _mean(gap), ">= 0.15", _mean(gap) >= 0.15)
    summary["gap_by_tokens"] = growth
    more, peer = cell("memgpt", tokens=LARGEST, rows=MORE_ROWS), cell("llama", tokens=LARGEST)
    if more and peer:
        for text in ("validation", "wikitext2"):
            gap = peer[text] - more[text]
            name = f"nats below, {text}, {LARGEST} M tokens, one seed, four times the rows"
            target(name, gap, ">= 0.15", gap >= 0.15)
    if timing := done.get(speed()[0]):
        ratio = timing["tokens_per_second_ratio"]
        target("training tokens per second, of the peer's", ratio, ">= 0.9", ratio >= 0.9)
    for tokens, theirs in ((FRONTIER, BUDGET), (BUDGET, LARGEST)):
        pairs = [(cell("memgpt", tokens=tokens, seed=s), cell("llama", tokens=theirs, seed=s)) for s in SEEDS]
        gaps = [peer["validation"] - fewer["validation"] for fewer, peer in pairs if fewer and peer]
        if gaps:
            name = f"nats below the peer's loss after {theirs} M tokens with {tokens / theirs:g} of them"
            reached = True if _mean(gaps) >= 0 else None  # with fewer tokens than the target's, a miss says nothing
            target(f"{name}, mean of {len(gaps)} seeds", _mean(gaps), ">= 0 with 0.7", reached)

    points = {
        kind: [
            {k: found[k] for k in ("multiply_adds", "stored", "validation", "wikitext2")} | {"width": width}
            for width in WIDTHS
            if (found := cell(kind, width, frontier))
        ]
        for kind in ("memgpt", "llama")
    }
    summary["frontier"] = points
    summary["scores"] = _scores(done)
    if points["memgpt"] and points["llama"]:
        best = min(points["llama"], key=lambda point: point["validation"])
        as_good = [point for point in points["memgpt"] if point["validation"] <= best["validation"]]
        if as_good:
            cheapest = min(as_good, key=lambda point: point["multiply_adds"])
            ratio = cheapest["multiply_adds"] / best["multiply_adds"]
            name = f"multiply-adds of width {cheapest['width']}, as good as the best peer (width {best['width']})"
            target(name, ratio, "<= 0.5", ratio <= 0.5)
            for task, scores in summary["scores"].items():
                ours = scores.get(f"memgpt-{cheapest['width']}-{frontier:g}M")
                peer = scores.get(f"llama-{best['width']}-{frontier:g}M")
                if seeds := _both(ours, peer):
                    gain = _gain(ours, peer, seeds)
                    target(f"its {task} F1 above that peer's, mean of {len(seeds)} seeds", gain, ">= 0", gain >= 0)
    equal = cell("memgpt", tokens=frontier, rows=EQUAL_ROWS), cell("llama", 192, frontier)
    if all(equal):
        gap = equal[1]["validation"] - equal[0]["validation"]
        target("nats below at equal stored parameters (the peer costs 1.9 times as much)", gap, "shown", None)
    for task, scores in summary["scores"].items():
        ours = scores.get(f"memgpt-{MAIN}-{budget:g}M")
        for kind in ("llama", "bert"):
            peer = scores.get(f"{kind}-{MAIN}-{budget:g}M")
            if seeds := _both(ours, peer):
                gain = _gain(ours, peer, seeds)
                target(f"{task} F1 above {kind} of equal cost, mean of {len(seeds)} seeds", gain, "> 0", gain > 0)
    return summary


def _scores(done: dict[str, Any]) -> dict[str, Any]:
    """task → pretrained model → its F1 after fine-tuning: the mean, and each seed's with its interval over examples."""
    scores: dict[str, Any] = {"ner": {}, "sentiment": {}}
    for cell in done.values():
        spec = cell["spec"]
        if "task" in spec:
            model = spec["start"].rsplit("-", 1)[0]
            found = scores[spec["task"]].setdefault(model, {"seeds": {}})
            found["seeds"][str(spec["seed"])] = [cell["f1"], cell["ci_low"], cell["ci_high"]]
    for models in scores.values():
        for found in models.values():
            found["mean"] = round(_mean([f1 for f1, *_ in found["seeds"].values()]), 4)
    return scores


def _both(ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> list[str]:
    """The seeds with which both models were tuned; a mean over other seeds would compare seeds, not models."""
    return sorted(set(ours["seeds"]) & set(peer["seeds"])) if ours and peer else []


def _gain(ours: dict[str, Any], peer: dict[str, Any], seeds: list[str]) -> float:
    return _mean([ours["seeds"][seed][0] - peer["seeds"][seed][0] for seed in seeds])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(done: dict[str, Any], summary: dict[str, Any], budget: float, frontier: float, target: Path) -> None:
    """Draw loss against cost, loss against tokens, and the gap against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"memgpt": "tab:red", "llama": "tab:blue"}
    names = {"memgpt": "MemGPT", "llama": "Llama's shape"}
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    for kind, points in summary["frontier"].items():
        costs = [point["multiply_adds"] / MILLION for point in points]
        axes[0].plot(costs, [p["validation"] for p in points], "o-", color=colours[kind], label=names[kind])
        for cost, point in zip(costs, points, strict=True):
            axes[0].annotate(
                str(point["width"]), (cost, point["validation"]), textcoords="offset points", xytext=(4, 4)
            )
    axes[0].set(
        xlabel="million multiply-adds per token",
        ylabel="validation loss [nats per token]",
        title=f"Quality per cost, {frontier:g} M tokens (width beside each point)",
    )
    for kind in colours:
        for seed in SEEDS:
            found = done.get(pretraining(kind, MAIN, budget, seed)[0])
            if found:
                tokens, losses = zip(*found["curve"], strict=True)
                first = names[kind] if seed == SEEDS[0] else None
                axes[1].plot(
                    [t / MILLION for t in tokens], losses, color=colours[kind], label=first, linewidth=1, alpha=0.7
                )
    axes[1].set(xlabel="million tokens", ylabel="training loss [nats per token]", title=f"Training, width {MAIN}")
    growth = summary["gap_by_tokens"]
    for text, style in (("validation", "o-"), ("wikitext2", "s--")):
        axes[2].plot([g["tokens"] for g in growth], [g[text] for g in growth], style, label=text)
    axes[2].axhline(0, color="grey", linewidth=0.5)
    axes[2].set(xlabel="million training tokens", ylabel="nats below Llama's shape", title="Gap at equal cost")
    if growth:
        axes[2].set(xscale="log")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(target, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def report(cells: list[tuple[str, Spec]], quick: bool) -> None:
    done = results(cells)
    budget, frontier = (0.5, 0.5) if quick else (BUDGET, FRONTIER)
    summary = summarise(done, budget, frontier)
    summary["cells"] = {"done": len(done), "planned": len(cells)}
    name = "core_quick" if quick else "core"
    write_json(HERE / "results" / f"{name}.json", summary)
    draw(done, summary, budget, frontier, HERE / "results" / f"{name}.png")
    for kind, points in summary["frontier"].items():
        for point in points:
            print(
                f"{kind:7} width {point['width']:4} {point['multiply_adds'] / MILLION:6.2f} M multiply-adds "
                f"{point['stored'] / MILLION:7.2f} M stored  validation {point['validation']:.4f}  "
                f"wikitext2 {point['wikitext2']:.4f}"
            )
    for task, models in summary["scores"].items():
        for model, scores in sorted(models.items()):
            seeds = ", ".join(f"{f1:.3f} [{low:.3f}, {high:.3f}]" for f1, low, high in scores["seeds"].values())
            print(f"{task:10} {model:16} F1 {scores['mean']:.4f}  seeds {seeds}")
    for gap in summary["gap_by_tokens"]:
        print(f"gap at {gap['tokens']:g} M tokens: {gap['validation']:+.4f} (validation), {gap['wikitext2']:+.4f}")
    for target in summary["targets"]:
        verdict = {True: "reached", False: "MISSED", None: "-"}[target["reached"]]
        print(f"{verdict:8} {target['name']}: {target['value']:.4f} (wanted {target['wanted']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--quick", action="store_true", help="one seed, 0.5 M tokens, two widths")
    mode.add_argument("--full", action="store_true", help="every cell that has no result yet")
    mode.add_argument("--ablation", action="store_true", help="the memory without each of its parts, 1 M tokens")
    mode.add_argument("--report", action="store_true", help="only tables and pictures of the full plan")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    arguments = parser.parse_args()
    if arguments.ablation:
        run(ablations(), arguments.jobs)
        report_ablations()
        return
    cells = plan(arguments.quick)
    if not arguments.report:
        run(cells, arguments.jobs)
    report(cells, arguments.quick)


if __name__ == "__main__":
    main()
