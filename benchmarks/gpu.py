"""How close to the limits of a GPU does the core run, and how does it compare with transformers' own models there?

    python benchmarks/gpu.py [--seconds 480]    resumes where it stopped; starts no cell after that many seconds
    python benchmarks/gpu.py --tiny             every cell at toy sizes, on any device; about a minute
    python benchmarks/gpu.py --report           the table of finished cells

A cell is one measurement (gpu_cells.py). Its JSON stays in benchmarks/results/gpu/, so the measurements may be spread
over time: repeat the command until all cells are done. Peers have the same hidden size, layers, heads, key-value heads
and feed-forward size. A peer is measured in several ways, and its fastest counts. Floors are the bytes over the
device's copy bandwidth, or the operations over its matrix-product rate, both measured.
"""

import argparse
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu_cells
from runner import done
from transformers.utils import logging

from memgpt.atomic import write_json
from memgpt.model import MemGPTConfig

RESULTS = Path(__file__).parent / "results" / "gpu"
BATCHES = (1, 16, 128)
EIGHT_BITS = ("float8", "int8")  # weights
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 operations per second, stated by NVIDIA
Spec = dict[str, Any]
Cells = dict[str, Spec]


def plan(tiny: bool) -> Cells:
    """Cell name → spec; its `run` names the function in gpu_cells. Cells that the goals need come first."""
    base = "tiny" if tiny else "base"
    cells: Cells = {"floors": {"run": "floors", "size": base}}
    for drawn in ("uniform", "zipf"):
        cells[f"look-up-{drawn}"] = {"run": "look_up", "size": base, "drawn": drawn}
    cells |= {"gate": {"run": "gate", "size": base}, "head": {"run": "head", "size": base}}
    sizes = (base,) if tiny else (base, "large", "medium")
    for size in sizes[:2]:
        cells |= _training(size, tiny, first=True)
    for batch in BATCHES[:1] if tiny else BATCHES:
        for kind in ("memgpt", "llama eager", "llama"):
            name = f"decode-{batch}-{kind.replace(' ', '-')}"
            cells[name] = {"run": "decode", "size": base, "kind": kind, "batch": batch}
    for kept in ("resident", "host", "int8", "mapped"):
        cells[f"tables-{kept}"] = {"run": "residency", "size": base, "kept": kept}
    for whole in (True, False):
        for kind in ("memgpt packed", "memgpt unpadded", "memgpt padded", "bert", "modernbert"):
            for attention in ("flex_attention", "sdpa") if kind == "memgpt packed" and not tiny else ("sdpa",):
                name = f"encode-{kind.replace(' ', '-')}-{attention}-{'compiled' if whole else 'eager'}"
                spec = {"run": "encode", "size": base, "kind": kind, "attention": attention, "compiled": whole}
                cells[name] = spec
    cells["float8-encode"] = {**cells["encode-memgpt-unpadded-sdpa-compiled"], "weights": "float8"}
    for batch in BATCHES[:1] if tiny else BATCHES:
        cells[f"decode-{batch}-plain"] = {**cells[f"decode-{batch}-memgpt"], "kind": "plain"}
        for weights in EIGHT_BITS:
            cells[f"{weights}-decode-{batch}"] = {**cells[f"decode-{batch}-memgpt"], "weights": weights}
    for size in sizes:
        cells |= _training(size, tiny, first=size == "medium") | _training(size, tiny, first=False)
    for spec in cells.values():  # the spec of a result shows which form of the core was measured
        if spec.get("kind", "").startswith("memgpt"):
            spec["recall"] = MemGPTConfig(**gpu_cells.SIZES[base]).recall_length
    return cells


def _training(size: str, tiny: bool, first: bool) -> Cells:
    """first: training as in the stage pretrain, with and without memory, and both ways of the peer; else other ways."""
    flexible = "sdpa" if tiny else "flex_attention"  # flex attention can be trained only on GPUs
    product = ("text_by_text", "product")
    ways = [("memgpt", *product), ("llama", "sdpa", "blocks"), ("plain", *product), ("llama", "sdpa", "whole")]
    if not first:
        ways = [("stock", "sdpa", "whole"), ("memgpt", flexible, "whole"), ("memgpt", "sdpa", "whole")]
    cells: Cells = {
        f"train-{size}-{kind}-{attention}-{scope}": {
            "run": "train",
            "size": size,
            "kind": kind,
            "attention": attention,
            "scope": scope,
        }
        for kind, attention, scope in ways
    }
    if not first and find_spec("torchao") is not None:  # the extra float8
        fastest = {"run": "train", "size": size, "kind": "memgpt", "attention": product[0], "scope": product[1]}
        cells[f"float8-{size}"] = {**fastest, "float8": True}
    return cells


def measure(name: str, spec: Spec) -> Spec:
    return getattr(gpu_cells, spec["run"])(spec)


def run(cells: Cells, results: Path, limit: float, measure: Callable[[str, Spec], Spec] = measure) -> bool:
    """Run the cells that are not done; returns whether all are done. A failed cell is reported and stops no other."""
    begun, left = time.monotonic(), False
    for name, spec in cells.items():
        if done(results, name, spec) is not None:
            continue
        if time.monotonic() - begun > limit:
            return False
        start = time.monotonic()
        try:
            found = measure(name, spec)
        except Exception as error:  # if a library does not support one variant, the others still run
            lines = str(error).strip().splitlines() or [""]
            print(f"{name}: {type(error).__name__}: {lines[0]}", file=sys.stderr, flush=True)
            left = True
        else:
            write_json(results / f"{name}.json", {"spec": spec, "device": device(), **found})
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return not left


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# --- the table


Row = tuple[str, str, float, float | None, float | None, str]  # what, unit, ours, peer, bound, goal


def table(cells: Cells, results: Path) -> list[Row]:
    """The rows for which the finished cells suffice. A ratio above 1 means that ours is better."""
    found = {name: cell for name, spec in cells.items() if (cell := done(results, name, spec))}
    floors, rows = found.get("floors", {}), []
    peak = next((rate for name, rate in PEAKS.items() if name in floors.get("device", "")), None)
    copy, product = floors.get("bytes_per_second"), floors.get("flops_per_second")

    def best(start: str, key: str, least: bool = False) -> float | None:
        values = [cell[key] for name, cell in found.items() if name.startswith(start)]
        return (min if least else max)(values, default=None)

    def add(what: str, unit: str, ours: float | None, peer: float | None, bound: float | None, goal: str = "") -> None:
        if ours is not None:
            rows.append((what, unit, ours, peer, bound, goal))

    for size in gpu_cells.SIZES:
        ours, peer = (best(f"train-{size}-{kind}-", "tokens_per_second") for kind in ("memgpt", "llama"))
        flops = best(f"train-{size}-memgpt-", "flops_per_second")
        bound = ours * product / flops if ours and flops and product else None
        add(f"train {size}, against Llama", "tokens/s", ours, peer, bound, "base >= 1.3x")
        stock = best(f"train-{size}-stock-", "tokens_per_second")
        if stock:
            add(f"train {size}, against Llama with AdamW", "tokens/s", ours, stock, bound)
        if flops and peak:
            add(f"train {size}, of the peak that NVIDIA names", "share", flops / peak, None, 1.0, "large >= 0.45")
        eighth = found.get(f"float8-{size}", {}).get("tokens_per_second")
        add(f"train {size} in float8, against bf16", "tokens/s", eighth, ours, None)
        for name, cell in found.items():
            way = name.removeprefix(f"train-{size}-memgpt-")
            plain = found.get(f"train-{size}-plain-{way}")
            if way != name and plain:
                share = cell["step_seconds"] / plain["step_seconds"] - 1
                add(f"memory's share of a step, {size}", "of it", share, None, None, "<= 0.05")
    for name in ("look-up-uniform", "look-up-zipf", "gate"):
        cell = found.get(name, {})
        for way in ("forward", "backward"):
            plain = min((cell[key] for key in (f"plain_{way}", f"compiled_{way}") if key in cell), default=None)
            bound = cell[f"{way}_bytes"] / copy if cell and copy else None
            goal = "floor >= 0.7" if name == "look-up-uniform" else ""
            add(f"{name}, {way}", "s", cell.get(f"kernel_{way}"), plain, bound, goal)
    if cell := found.get("head"):
        plain = min(cell["plain_seconds"], cell["compiled_seconds"])
        add("output and loss", "s", cell.get("kernel_seconds"), plain, cell["flops"] / product if product else None)
    for batch in BATCHES:
        ours = best(f"decode-{batch}-memgpt", "tokens_per_second")
        cell = found.get(f"decode-{batch}-memgpt")
        bound = batch * copy / cell["step_bytes"] if cell and copy else None
        for peer_name, goal in (("llama", ""), ("llama-eager", ">= 3x")):
            peer = found.get(f"decode-{batch}-{peer_name}", {}).get("tokens_per_second")
            add(f"decode {batch}, against {peer_name}", "tokens/s", ours, peer, bound, goal)
        for weights in EIGHT_BITS:
            cell = found.get(f"{weights}-decode-{batch}", {})
            bound = batch * copy / cell["step_bytes"] if cell and copy else None
            what = f"decode {batch}, {weights} weights against bf16"
            add(what, "tokens/s", cell.get("tokens_per_second"), ours, bound)
    ours = best("encode-memgpt", "tokens_per_second")
    for kind in ("bert", "modernbert"):
        add(f"encode, against {kind}", "tokens/s", ours, best(f"encode-{kind}-", "tokens_per_second"), None)
    ways = {way: best(f"encode-memgpt-{way}-", "tokens_per_second") for way in ("unpadded", "packed", "padded")}
    for way in ("unpadded", "packed"):
        add(f"encode, {way} against padded", "tokens/s", ways[way], ways["padded"], None)
    bf16 = found.get("encode-memgpt-unpadded-sdpa-compiled", {}).get("tokens_per_second")
    eighth = found.get("float8-encode", {}).get("tokens_per_second")
    add("encode, float8 weights against bf16", "tokens/s", eighth, bf16, None)
    resident = found.get("tables-resident", {})
    for kept in ("int8", "host", "mapped"):
        cell = found.get(f"tables-{kept}", {})
        for what in ("read", "decode"):
            goal = "ratio >= 0.91" if (kept, what) == ("host", "decode") else ""
            key = f"{what}_seconds"
            add(f"{what}, tables {kept}, against resident", "s", cell.get(key), resident.get(key), None, goal)
    return rows


def show(rows: list[Row]) -> None:
    print(f"{'':48}{'':10}{'ours':>12}{'peer':>12}{'ratio':>8}{'floor':>12}{'of it':>8}  goal")
    for what, unit, ours, peer, bound, goal in rows:
        seconds = unit == "s"
        cells = [f"{ours:12.4g}", f"{peer:12.4g}" if peer else f"{'-':>12}"]
        for other, width in ((peer, 8), (bound, 8)):
            if other is bound:
                cells.append(f"{bound:12.4g}" if bound else f"{'-':>12}")
            share = None if not other else other / ours if seconds else ours / other
            cells.append(f"{share:{width}.2f}" if share is not None else f"{'-':>{width}}")
        print(f"{what:48}{unit:10}{''.join(cells)}  {goal}")


def options(description: str) -> argparse.Namespace:
    """Command-line options of a benchmark that resumes, with its docstring as help; also silences the libraries."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--report", action="store_true")
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return parser.parse_args()


def main() -> int:
    asked = options(__doc__ or "")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # many models share one forward here
    if not (asked.tiny or asked.report or torch.cuda.is_available()):
        raise SystemExit("no GPU that torch can use; --tiny runs every cell at toy sizes without one")
    cells = plan(asked.tiny)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) if asked.tiny else RESULTS
        complete = asked.report or run(cells, results, asked.seconds)
        show(table(cells, results))
    if not complete:
        print("not all cells are done: run the same command again", file=sys.stderr)
    return not complete


if __name__ == "__main__":
    sys.exit(main())
