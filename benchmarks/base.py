"""Preset `base` with memory, and without it at equal cost, pretrained on real text and fine-tuned on real tasks.

    python benchmarks/base.py [--seconds 480]   resumes where it stopped; starts no cell after that many seconds
    python benchmarks/base.py --tiny            everything at toy sizes on synthetic text; about a minute without a GPU
    python benchmarks/base.py --report          the table of finished cells

Needs MEMGPT_REAL_DATA. Both models are pretrained by MemGPT's own training loop on the same rows in the same order, in
some steps bidirectionally. The one without memory has wider feed-forward layers, for equal multiply-adds (peers.py).
After --seconds, pretraining stops at its next checkpoint. Results are in benchmarks/results/base/. Weights are in
.memgpt/benchmarks/, outside git, those with memory also as shards, which `restore` loads.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cells
import gpu
import gpu_cells
import peers
import runner
import task_cells
import tasks
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from memgpt import atomic, newsroom
from memgpt.model import MemGPTConfig, MemGPTForCausalLM
from memgpt.model.residency import place

RESULTS = Path(__file__).parent / "results" / "base"
SETS = ("wikigold", "financial_phrasebank", "movielens")
MB = 1_000_000
SHARD = 14 * MB  # tensors per shard; with its header a file stays below 15 MB
GIT = 20 * MB  # weights that the repository may contain
TOLERANCE = 0.01  # nats by which the shards' validation loss may differ from that of the trained weights
HYBRID = {"masked_share_start": 0.25, "masked_share_end": 0.25}
RECIPE: gpu.Spec = {**HYBRID, "sequence_length": 512, "batch_size": 64, "checkpoint_steps": 1000}
TINY_RECIPE: gpu.Spec = {**HYBRID, "sequence_length": 64, "batch_size": 8, "checkpoint_steps": 4, "compile": False}
# A third of the learning rate used for a core of a quarter of the width. A checkpoint of `base` takes 1.5 GB.
TUNING: gpu.Spec = {"learning_rate": 3e-4, "checkpoint_steps": 500}
TINY_TUNING: gpu.Spec = {**TUNING, "epochs": 1}


def plan(tiny: bool) -> gpu.Cells:
    """Cell name → spec. 43 million tokens are three epochs of the text."""
    pretraining = {
        "preset": "tiny" if tiny else "base",
        "tokens": 12 * 8 * 64 if tiny else 43 * 10**6,
        "seed": 1,
        "recipe": TINY_RECIPE if tiny else RECIPE,
    }
    cells: gpu.Cells = {"base-memgpt": {"kind": "memgpt", "least": 2, **pretraining}, "shards": {"core": "base-memgpt"}}
    cells["base-plain"] = {"kind": "plain", **pretraining}
    for name in SETS:
        for kind in ("memgpt", "plain"):
            spec = {"set": name, "system": kind, "core": f"base-{kind}", "seed": 1, "test": True}
            cells[f"base-{name}-{kind}"] = {**spec, "changes": TINY_TUNING if tiny else TUNING}
    return cells


def measure(name: str, spec: gpu.Spec, source: Path, deadline: float) -> gpu.Spec:
    if "preset" in spec:
        return cells.pretrain(name, spec, go_on=lambda model, step: time.monotonic() < deadline)
    if "set" in spec:
        task_cells.prepare(spec["set"], source)
        return task_cells.measure(name, spec)
    return shards(cells.WORK / "cells" / spec["core"], cells.WORK / "shards")


# --- weights small enough to distribute


def shards(core: Path, folder: Path) -> gpu.Spec:
    """Write the trained weights in `core` as safetensors shards to `folder`: in 16 bits, memory tables in 8 bits with a
    scale per row; tensors larger than a shard are split by rows. Fails if the loaded shards change the loss."""
    model = MemGPTForCausalLM.from_pretrained(core / "model").to(gpu_cells.DEVICE)
    trained = cells.held_out(model, "validation", False, 1)
    model = place(model.cpu(), "int8").to(torch.bfloat16)
    sizes: dict[str, int] = {}
    pieces = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embeddings
            continue
        part = "tables" if "memory_table" in name else "embeddings" if "embed" in name else "blocks"
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
        rows = max(1, SHARD * len(tensor) // max(1, tensor.nbytes))
        pieces |= {f"{name}:{number}": piece.clone() for number, piece in enumerate(tensor.split(rows))}
    with atomic.replacing(folder) as aside:
        aside.mkdir()
        save_torch_state_dict(pieces, aside, max_shard_size=SHARD)
        model.config.save_pretrained(aside)
    loss = cells.held_out(restore(folder).to(gpu_cells.DEVICE), "validation", False, 1)
    if abs(loss - trained) > TOLERANCE:
        raise ValueError(f"{folder}: loss {loss:.4f} and not {trained:.4f}, as before they were written")
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return {
        "files": len(files),
        "largest_bytes": max(files),
        "total_bytes": sum(files),
        "parts_bytes": sizes,
        "fits_into_git": [part for part, size in sizes.items() if size <= GIT],
        "loss_trained": round(trained, 4),
        "loss_restored": round(loss, 4),
    }


def restore(folder: Path) -> MemGPTForCausalLM:
    """Load the model that `shards` wrote: in bf16, its memory tables in int8."""
    model = place(MemGPTForCausalLM(MemGPTConfig.from_pretrained(folder)), "int8").to(torch.bfloat16)
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            name, number = key.rsplit(":", 1)
            pieces.setdefault(name, {})[int(number)] = tensor
    whole = {name: torch.cat([parts[number] for number in sorted(parts)]) for name, parts in pieces.items()}
    model.load_state_dict({**whole, "lm_head.weight": whole["model.embed_tokens.weight"]})
    return model


# --- the table


def summarise(planned: gpu.Cells, results: Path) -> dict[str, Any]:
    found = {name: cell for name, spec in planned.items() if (cell := runner.done(results, name, spec))}
    compared = {name: cell for name, cell in found.items() if "set" in cell["spec"]}
    kept = ("validation", "wikitext2", "tokens_per_second", "multiply_adds", "stored", "device")
    return {
        "cells": {"done": len(found), "planned": len(planned)},
        "pretrained": {
            name: {"tokens": cell["spec"]["tokens"], **{key: cell[key] for key in kept}}
            for name, cell in found.items()
            if "preset" in cell["spec"]
        },
        "tasks": {name: table for name in SETS if (table := tasks.compare(compared, name))},
        "shards": {key: value for key, value in found.get("shards", {}).items() if key != "spec"},
    }


def show(summary: dict[str, Any]) -> None:
    print("{done} of {planned} cells are done".format(**summary["cells"]))
    for name, row in summary["pretrained"].items():
        print(
            f"{name:14} validation {row['validation']:.4f}, WikiText-2 {row['wikitext2']:.4f} after {row['tokens']:,} "
            f"tokens at {row['tokens_per_second']:,} a second ({row['device']}); "
            f"{row['multiply_adds'] / 1e6:.1f} M multiply-adds a token, {row['stored'] / 1e6:.1f} M parameters stored"
        )
    for line in tasks.lines(summary["tasks"]):
        print(line)
    if stored := summary["shards"]:
        parts = ", ".join(f"{part} {size / MB:.1f} MB" for part, size in stored["parts_bytes"].items())
        print(
            f"{stored['files']} shards, {stored['total_bytes'] / MB:.1f} MB in all ({parts}), the largest "
            f"{stored['largest_bytes'] / MB:.1f} MB; validation {stored['loss_restored']:.4f} as loaded, "
            f"{stored['loss_trained']:.4f} as trained\n"
            f"of 20 MB or less, so fit for git: {', '.join(stored['fits_into_git']) or 'none'}"
        )


# --- running


def run(planned: gpu.Cells, source: Path, results: Path, seconds: float) -> bool:
    """Run the cells that are not done yet; returns whether all are done."""
    deadline = time.monotonic() + seconds
    cells.prepare(source)
    limit = deadline - time.monotonic()
    complete = gpu.run(planned, results, limit, lambda name, spec: measure(name, spec, source, deadline))
    summary = summarise(planned, results)
    atomic.write_json(results.with_suffix(".json"), summary)
    show(summary)
    return complete


def toy(folder: Path) -> None:
    """From now on, work below `folder`, with synthetic text and task data in place of the real ones."""
    cells.WORK, peers.VOCABULARY = folder / "core", 512
    task_cells.WORK = folder / "tasks"
    task_cells.STATISTICS = tasks.STATISTICS = folder / "statistics"
    tables = newsroom.generate(scale=0.05)
    (folder / "text/wikitext2").mkdir(parents=True)
    for name in ("train-0", "validation", "wikitext2/validation"):
        tables["corpus"]["train"].to_json(folder / f"text/{name}.jsonl.gz", orient="records", lines=True)
    for task, place_of in (task_cells.SETS[name] for name in SETS):
        (folder / place_of).mkdir(parents=True)
        for split, frame in tables[task].items():
            frame.to_json(folder / place_of / f"{split}.jsonl", orient="records", lines=True, date_format="iso")


def main() -> int:
    options = gpu.options(__doc__ or "")
    if options.report:
        if not (summary := RESULTS.with_suffix(".json")).exists():
            raise SystemExit(f"{summary}: not there yet; run this command without --report")
        show(json.loads(summary.read_text(encoding="utf-8")))
        return 0
    if not (options.tiny or torch.cuda.is_available()):
        raise SystemExit("no GPU that torch can use; --tiny runs everything at toy sizes without one")
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            toy(Path(folder))
            complete = run(plan(True), Path(folder), Path(folder) / "results", 600)
    else:
        complete = run(plan(False), Path(os.environ.get("MEMGPT_REAL_DATA", "")).resolve(), RESULTS, options.seconds)
    if not complete:
        print("not all cells are done: run the same command again", file=sys.stderr)
    return not complete


if __name__ == "__main__":
    sys.exit(main())
