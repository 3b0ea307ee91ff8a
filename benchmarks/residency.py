"""Latency, memory and error by location of the memory table, and size of the key-value cache.

    nice -n 5 python benchmarks/residency.py [--quick]

Creates a model with a table of 2 GB (--quick: 64 MB) of random numbers in a temporary directory, and encodes texts of
512 tokens in a new process per location. "uniform": random ids, so that nearly every look-up reads a new row, the worst
case. "zipf": phrases drawn with probability ∝ 1 / rank, which recur as in text. "cold": the mean from the first look-up
on, with none of the file in the system's page cache. "warm": the median of a second pass over the same texts, and the
mean of its processor time. Megabytes are what loading and the first pass add to the process: its own memory, pages of
the file, and both at the peak. Without --quick the table is written to benchmarks/results/residency.json. Exits with 1
if a target is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from memgpt.atomic import write_json
from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM
from memgpt.model.cache import cache_bytes, kv_bytes_per_token, make_cache
from memgpt.model.residency import load, place

RESULTS = Path(__file__).parent / "results" / "residency.json"
LENGTH, CONTEXT = 512, 8192
SHAPE: dict[str, Any] = {
    **PRESETS["tiny"],
    "vocab_size": 8192,
    "memory_ngrams": [2, 3],
    "memory_heads": 2,  # so 4 rows per token
    "max_position_embeddings": CONTEXT,
}


def texts(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    """Ids [count, 512]: uniform, or Zipf-distributed phrases, which recur as the n-grams of a text do."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.randint(3, 8192, (count, LENGTH), generator=generator)
    weights = 1 / torch.arange(1, 8190, dtype=torch.float)
    phrases = 3 + torch.multinomial(weights, 20000 * 8, replacement=True, generator=generator).view(20000, 8)
    chosen = torch.multinomial(1 / torch.arange(1.0, 20001), count * LENGTH // 8, replacement=True, generator=generator)
    return phrases[chosen].view(count, LENGTH)


@torch.no_grad()
def encode(model: PreTrainedModel, batch: torch.Tensor) -> list[float]:
    """Microseconds per token of each text [T] of the batch [N, T]."""
    spent = []
    for ids in batch:
        start = time.perf_counter()
        model.model(ids[None], use_cache=False)
        spent.append((time.perf_counter() - start) / LENGTH * 1e6)
    return spent


def resident(file: Path) -> dict[str, int]:
    """Bytes in this process's memory: its own, all, all at the peak, and the resident pages of a mapped file."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {name: int(rest[0]) * 1024 for name, *rest in lines if name in ("RssAnon:", "VmRSS:", "VmHWM:")}
    pages, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = bool(rest) and rest[-1] == str(file)
        elif inside and name == "Rss:":
            pages += int(rest[0]) * 1024
    return {"own": found["RssAnon:"], "all": found["VmRSS:"], "peak": found["VmHWM:"], "file": pages}


def make(directory: Path, rows: int, seed: int = 0) -> None:
    """Save a model whose table holds random numbers, so that the file has no holes."""
    torch.manual_seed(seed)
    model = MemGPTForCausalLM(MemGPTConfig(**{**SHAPE, "memory_rows": rows}))
    for part in model.model.memory_table.weight.data[1:].split(1 << 20):
        part.normal_()
    model.save_pretrained(directory)


def forget(directory: Path) -> None:
    """Remove a model's file from the system's page cache."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --- in a separate process per location


def serve(directory: Path, small: Path, memory: str, kind: str, count: int) -> dict[str, float]:
    """Run in the child: load, encode cold, encode again warm."""
    encode(load(MemGPTForCausalLM, small, memory), texts("uniform", 4, seed=9))  # warms up libraries and buffers
    file = directory / "model.safetensors"
    before, start = resident(file), time.perf_counter()
    model = load(MemGPTForCausalLM, directory, memory)
    loading = time.perf_counter() - start
    batch = texts(kind, count)
    cold = encode(model, batch)
    after, start_cpu = resident(file), time.process_time()
    warm = encode(model, batch)
    cpu = (time.process_time() - start_cpu) / batch.numel() * 1e6
    return {
        "load_s": loading,
        "cold_us_per_token": statistics.fmean(cold),
        "warm_us_per_token": statistics.median(warm),
        "warm_cpu_us_per_token": cpu,
        "own_mb": (after["own"] - before["own"]) / 1e6,
        "table_file_mb": after["file"] / 1e6,
        "peak_mb": (after["peak"] - before["all"]) / 1e6,
    }


def in_a_process(*arguments: Any) -> dict[str, float]:
    forget(Path(arguments[0]))
    command = [sys.executable, __file__, "--serve", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def residencies(work: Path, quick: bool) -> dict[str, Any]:
    rows = (1 << 17 if quick else 1 << 22) - 1
    size = (1 + 4 * rows) * SHAPE["memory_dim"] * 4
    if shutil.disk_usage(work).free < 2 * size:
        raise SystemExit(f"{work}: less than {2 * size / 1e9:.1f} GB free; set TMPDIR")
    make(work / "small", 1000)
    make(work / "large", rows)
    count = 8 if quick else 32
    found: dict[str, Any] = {"table_mb": size / 1e6, "tokens": count * LENGTH}
    for memory, kind in (
        ("mapped", "uniform"),
        ("mapped", "zipf"),
        ("int8", "uniform"),
        ("host", "uniform"),
        ("resident", "uniform"),
        ("resident", "zipf"),
    ):
        found[f"{memory}, {kind}"] = in_a_process(work / "large", work / "small", memory, kind, count)
    shutil.rmtree(work / "large")
    return found


# --- in this process


def growth(quick: bool) -> dict[str, float]:
    """Encoding latency with a table of 16 times the rows: medians over interleaved runs on new texts."""
    models = []
    for rows in (8192, 16 * 8192):
        torch.manual_seed(0)
        models.append(MemGPTForCausalLM(MemGPTConfig(**{**SHAPE, "memory_rows": rows})).eval())
    spent: list[list[float]] = [[], []]
    for round_ in range(20 if quick else 80):
        batch = texts("zipf", 1, seed=round_)
        for which in (0, 1) if round_ % 2 else (1, 0):
            spent[which] += encode(models[which], batch)
    small, large = (statistics.median(times[4:]) for times in spent)
    return {"x1_us_per_token": small, "x16_us_per_token": large, "ratio": large / small}


@torch.no_grad()
def errors(work: Path) -> dict[str, float]:
    """Largest difference of a logit from the resident table's, in standard deviations of the logits."""
    batch = texts("zipf", 4)
    exact = load(MemGPTForCausalLM, work / "small")(batch).logits
    found = {}
    for memory in ("mapped", "int8", "host"):
        logits = load(MemGPTForCausalLM, work / "small", memory)(batch).logits
        found[memory] = float((logits - exact).abs().max() / exact.std())
    place(load(MemGPTForCausalLM, work / "small"), "int8").save_pretrained(work / "packed")
    files = {}
    for name in ("small", "packed"):
        with safe_open(work / name / "model.safetensors", "pt") as file:
            files[name] = file.get_tensor("model.memory_table.weight").nbytes
    model = load(MemGPTForCausalLM, work / "small")
    cache = make_cache(model.config, int8=True)
    logits = model(batch, past_key_values=cache, use_cache=True).logits
    return {
        **found,
        "int8 cache": float((logits - exact).abs().max() / exact.std()),
        "int8 file, share": files["packed"] / files["small"],
    }


def context() -> dict[str, Any]:
    """Share of full multi-head attention's key-value bytes at equal width, at 8k tokens of context."""
    found = {}
    for name, shape in PRESETS.items():
        config = MemGPTConfig(**shape)
        full = 2 * config.num_hidden_layers * config.hidden_size * 4
        shares = {
            kind: kv_bytes_per_token(config, CONTEXT, torch.float32, int8=kind == "int8") / full
            for kind in ("float32", "int8")
        }
        found[name] = {
            "bytes_per_token": shares["float32"] * full,
            "share": shares["float32"],
            "share_int8": shares["int8"],
        }
    return found


@torch.no_grad()
def stream(work: Path, quick: bool) -> dict[str, Any]:
    """Read in pieces of 100 tokens, the last 100 before each mark singly; global layers keep 1,024 (--quick: 256)."""
    model = load(MemGPTForCausalLM, work / "small", "mapped")
    marks = (1_000, 5_000, 10_000) if quick else (10_000, 50_000, 100_000)
    ids = texts("zipf", marks[-1] // LENGTH + 1).view(1, -1)
    cache = make_cache(model.config, stream=256 if quick else 1024)
    held, speed, at = {}, {}, 0

    def read(piece: int) -> None:
        nonlocal at
        model.model(
            ids[:, at : at + piece],
            past_key_values=cache,
            context_ids=ids[:, max(0, at - model.model.context) : at],
            use_cache=True,
        )
        at += piece

    begun = time.perf_counter()
    for mark in marks:
        while at < mark - 100:
            read(100)
        start = time.perf_counter()
        for _ in range(100):
            read(1)
        speed[str(mark)] = 100 / (time.perf_counter() - start)
        held[str(mark)] = cache_bytes(cache)
    return {"cache_bytes": held, "decoded_tokens_per_s": speed, "read_tokens_per_s": at / (time.perf_counter() - begun)}


def targets(result: dict[str, Any]) -> dict[str, bool]:
    table = result["residency"]["table_mb"]
    mapped = [result["residency"][f"mapped, {kind}"] for kind in ("uniform", "zipf")]
    held = list(result["stream"]["cache_bytes"].values())
    share: dict[str, bool] = {}
    if table > 1000:  # in a small table, the pages around the rows read are a large share
        share["mapped: at most 10 % of the table in the process"] = all(
            way["table_file_mb"] + max(0, way["own_mb"]) <= 0.1 * table for way in mapped
        )
    return {
        "16 times the rows: encode latency at most 1.1 times": result["growth"]["ratio"] <= 1.1,
        **share,
        "mapped and host: the same logits": result["errors"]["mapped"] == result["errors"]["host"] == 0,
        "int8 rows, int8 cache: logits within 0.1 standard deviations": max(
            result["errors"]["int8"], result["errors"]["int8 cache"]
        )
        <= 0.1,
        "presets: keys and values at most 1/8 at 8k": all(way["share"] <= 1 / 8 for way in result["context"].values()),
        "stream: constant cache": len(set(held)) == 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; no results are written")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        directory, small, memory, kind, count = arguments.serve
        print(json.dumps(serve(Path(directory), Path(small), memory, kind, int(count))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        result: dict[str, Any] = {
            "residency": residencies(work, arguments.quick),
            "growth": growth(arguments.quick),
            "errors": errors(work),
            "context": context(),
            "stream": stream(work, arguments.quick),
        }
    result["targets"] = targets(result)
    show(result)
    if not arguments.quick:
        write_json(RESULTS, _rounded(result))
    return 0 if all(result["targets"].values()) else 1


def show(result: dict[str, Any]) -> None:
    ways = {name: way for name, way in result["residency"].items() if isinstance(way, dict)}
    columns = list(next(iter(ways.values())))
    print(f"a table of {result['residency']['table_mb']:.0f} MB, {result['residency']['tokens']} tokens\n")
    print(f"{'':20}" + "".join(f"{column:>23}" for column in columns))
    for name, way in ways.items():
        print(f"{name:20}" + "".join(f"{way[column]:23.1f}" for column in columns))
    print()
    for part in ("growth", "errors", "context", "stream"):
        for name, value in result[part].items():
            print(f"{part:10}{name:24}{json.dumps(_rounded(value))}")
    print()
    for target, met in result["targets"].items():
        print(f"{'holds' if met else 'MISSED':8}{target}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
