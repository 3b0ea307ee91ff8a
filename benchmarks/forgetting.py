"""How much of an old domain is forgotten by learning a new one? Full tuning, LoRA, the whole memory, a few of its rows.

    python benchmarks/forgetting.py [--quick]

A small MemGPT learns fiction (domain A), then some science (domain B) with each method, at several learning rates and
seeds. Measured on held-out documents, before and after: the loss on B, which should fall (gain), and on A, which should
not rise (forgetting). Needs peft for LoRA, and MEMGPT_REAL_DATA: a folder with text/train-*.jsonl.gz, whose lines are
{"domain", "text"}, with the domains "book" and "science". Writes benchmarks/results/forgetting.json and .png; with
--quick it only shows that everything runs. The model trained on A is cached in .memgpt/benchmarks/forgetting.
"""

import argparse
import copy
import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from memgpt.atomic import replacing, write_json
from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTTokenizer, canonical_ids
from memgpt.model.kernels import multiplies_bfloat16
from memgpt.model.update import choose_rows, count_rows, restrict_to_memory
from memgpt.optimizers import RowAdagrad, for_pretraining

RESULTS = Path(__file__).parent / "results"
CACHE = Path(".memgpt/benchmarks/forgetting")

LENGTH, BATCH = 256, 16
FULL = {
    "shape": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "memory_rows": 131072,
        "memory_dim": 32,
        "memory_ngrams": [2, 3],
        "memory_kernel": 0,
    },
    "old_steps": 256,
    "new_steps": 16,
    "held_out_rows": 48,
    "seeds": [1, 2],
}
QUICK = FULL | {
    "shape": FULL["shape"] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "memory_rows": 512},
    "old_steps": 4,
    "new_steps": 2,
    "held_out_rows": 16,
    "seeds": [1],
}
PRETRAINING = {"matrix_learning_rate": 0.02, "weight_decay": 0.02, "learning_rate": 2e-3, "memory_learning_rate": 0.03}
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
GRID = {  # method → learning rates
    "full": [3e-4, 1e-3, 3e-3],
    "lora": [1e-3, 3e-3, 1e-2],
    "memory": [1e-2, 3e-2, 1e-1],
    "sparse memory, 50 %": [1e-2, 3e-2, 1e-1],
    "sparse memory, 10 %": [1e-2, 3e-2, 1e-1],
}
SHARES = {"sparse memory, 50 %": 0.5, "sparse memory, 10 %": 0.1}
GAINS = [0.2, 0.3, 0.4, 0.5]  # gains on B, in nats, at which the methods' forgetting on A is compared

Batch = dict[str, torch.Tensor]


# --- data


def documents(folder: Path, domain: str) -> Iterator[str]:
    for path in sorted(folder.glob("train-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                if record["domain"] == domain:
                    yield record["text"]


class Rows:
    """Documents as token ids, each after an end token, concatenated and cut into rows of `LENGTH`."""

    def __init__(self, tokenizer: MemGPTTokenizer, texts: list[str]):
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        self.ids = np.concatenate([np.asarray([tokenizer.eos_token_id, *ids]) for ids in encoded])
        self.starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded)][:-1])

    def __len__(self) -> int:
        return len(self.ids) // LENGTH

    def batch(self, rows: np.ndarray) -> Batch:
        where = rows[:, None] * LENGTH + np.arange(LENGTH)
        document = self.starts[np.searchsorted(self.starts, where, side="right") - 1]
        return {
            "input_ids": torch.from_numpy(self.ids[where]),
            "position_ids": torch.from_numpy(where - np.maximum(document, where[:, :1])),
        }

    def batches(self, order: np.ndarray) -> Iterator[Batch]:
        for first in range(0, len(order), BATCH):
            yield self.batch(order[first : first + BATCH])


def read_domains(folder: Path) -> tuple[MemGPTTokenizer, dict[str, Rows]]:
    """Training and held-out rows (every tenth document) of each domain. The tokenizer is trained on A only."""
    parts: dict[str, Rows] = {}
    tokenizer = None
    for name, domain in (("old", "book"), ("new", "science")):
        texts = list(documents(folder, domain))
        if len(texts) < 20:
            sys.exit(f"error: {folder}: {len(texts)} documents of the domain {domain!r}, expected 20 or more")
        np.random.default_rng(0).shuffle(texts)
        held_out, train = texts[::10], [text for i, text in enumerate(texts) if i % 10]
        if tokenizer is None:
            train = train[: len(train) // 3]  # still more than training reads
            tokenizer = MemGPTTokenizer.train(train, FULL["shape"]["vocab_size"])
        parts[name], parts[f"{name} held out"] = Rows(tokenizer, train), Rows(tokenizer, held_out)
    return tokenizer, parts


# --- training


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Loop:
    """A model with its compiled loss, for many runs: compiling for every run would take longer than the runs."""

    def __init__(self, model: nn.Module, quick: bool):
        torch._dynamo.reset()
        self.model = model
        self.loss = next_token_loss if quick else torch.compile(next_token_loss, dynamic=False)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, factor: float) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= factor
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu"))):
            loss = self.loss(self.model, batch)
        loss.backward()
        dense = [p for p in self.model.parameters() if p.grad is not None and not p.grad.is_sparse]
        nn.utils.clip_grad_norm_(dense, 1.0)  # not the tables: Adagrad's steps do not depend on gradient scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def judge(self, rows: Rows, count: int) -> float:
        """Nats per token on the first `count` rows."""
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu"))):
            order = np.arange(min(count, len(rows)) // BATCH * BATCH)
            return float(np.mean([self.loss(self.model, batch).item() for batch in rows.batches(order)]))


def pretrained(tokenizer: MemGPTTokenizer, old: Rows, settings: dict[str, Any]) -> MemGPTForCausalLM:
    """The model trained on A: a short run with Muon, AdamW and row-wise Adagrad, as in the pretrain stage."""
    made_of = [settings["shape"], settings["old_steps"], PRETRAINING, len(old), old.ids[:99999].tolist()]
    directory = CACHE / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    if directory.is_dir():
        return MemGPTForCausalLM.from_pretrained(directory)
    torch.manual_seed(0)
    model = MemGPTForCausalLM(MemGPTConfig(**settings["shape"]))
    model.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer, settings["shape"]["vocab_size"]))
    optimizer = for_pretraining(model, SimpleNamespace(**PRETRAINING))  # type: ignore[arg-type]
    loop, steps, began = Loop(model, quick=settings is QUICK), settings["old_steps"], time.monotonic()
    for step, batch in enumerate(old.batches(old_order(old, settings))):
        loop.step(batch, optimizer, min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.3 * steps)))
        if step % 40 == 39:
            print(f"pretrain {step + 1}/{steps}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    with replacing(directory) as aside:
        model.save_pretrained(aside)
    return model


def old_order(old: Rows, settings: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(old))[: settings["old_steps"] * BATCH]


# --- the methods


class Learner:
    """A model that is trained with one kind of method, repeatedly from the same initial weights."""

    def __init__(self, kind: str, base: MemGPTForCausalLM, quick: bool):
        self.kind = kind
        model: nn.Module = copy.deepcopy(base).train()
        model.model.memory_table.sparse = kind != "full"  # AdamW takes no sparse gradients
        self.rows = torch.ones(len(count_rows(base, [])), dtype=torch.bool)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(**LORA))
        elif kind == "memory":
            restrict_to_memory(model, self.rows)
        self.model, self.loop = model, Loop(model, quick)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    def learn(self, data: Iterator[Batch], rate: float, rows: torch.Tensor | None) -> None:
        """Train from the initial weights, once over the data; of the memory only `rows`, if given."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
        self.rows.copy_(torch.ones_like(self.rows) if rows is None else rows)
        if self.kind == "memory":
            optimizer: torch.optim.Optimizer = RowAdagrad(self.trained, lr=rate)
        else:
            optimizer = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step, batch in enumerate(data, start=1):
            self.loop.step(batch, optimizer, min(1.0, step / 4))


def runs_of(
    method: str, learner: Learner, base: MemGPTForCausalLM, parts: dict[str, Rows], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One point per learning rate and seed: {learning_rate, seed, old, new}, with the losses after training."""
    points, began = [], time.monotonic()
    old_usage = count_rows(base, parts["old"].batches(old_order(parts["old"], settings)))
    for seed in settings["seeds"]:
        order, rows = new_order(parts["new"], settings, seed), None
        if method in SHARES:
            rows = choose_rows(count_rows(base, parts["new"].batches(order)), old_usage, SHARES[method])
        for rate in GRID[method]:
            learner.learn(parts["new"].batches(order), rate, rows)
            losses = held_out(learner.loop, parts, settings)
            points.append({"learning_rate": rate, "seed": seed, **losses})
            print(f"{method:20} {points[-1]} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return points


def held_out(loop: Loop, parts: dict[str, Rows], settings: dict[str, Any]) -> dict[str, float]:
    count = settings["held_out_rows"]
    return {name: round(loop.judge(parts[f"{name} held out"], count), 4) for name in ("old", "new")}


def new_order(new: Rows, settings: dict[str, Any], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(new))[: settings["new_steps"] * BATCH]


# --- results


def frontier(points: list[dict[str, Any]], before: dict[str, float]) -> list[tuple[float, float]]:
    """(forgetting, gain), means over seeds, of the learning rates that no other one of the method beats in both."""
    grouped: dict[float, list[tuple[float, float]]] = {}
    for point in points:
        change = (point["old"] - before["old"], before["new"] - point["new"])
        grouped.setdefault(point["learning_rate"], []).append(change)
    means = sorted(tuple(np.mean(changes, axis=0).tolist()) for changes in grouped.values())
    best: list[tuple[float, float]] = []
    for forgetting, gain in means:
        if gain > max((g for _, g in best), default=0.0):
            best.append((round(forgetting, 4), round(gain, 4)))
    return best


def cost_at(gain: float, line: list[tuple[float, float]]) -> float | None:
    """Forgetting at a gain, interpolated linearly on the frontier, from (0, 0) on; None if the gain is not reached."""
    costs, gains = zip((0.0, 0.0), *line, strict=True)
    return round(float(np.interp(gain, gains, costs)), 4) if gain <= gains[-1] else None


def draw(target: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    before = results["before"]
    for method, entry in results["methods"].items():
        line = np.array([(0.0, 0.0), *entry["frontier"]])
        (drawn,) = axes.plot(line[:, 0], line[:, 1], marker="o", label=method)
        across = [point["old"] - before["old"] for point in entry["points"]]
        up = [before["new"] - point["new"] for point in entry["points"]]
        axes.scatter(across, up, s=8, alpha=0.35, color=drawn.get_color())
    edge = max(forgetting for entry in results["methods"].values() for forgetting, _ in entry["frontier"])
    axes.set(xlim=(-0.05 * edge - 0.01, 1.1 * edge + 0.01), ylim=(0, None))
    axes.set(xlabel="forgetting: loss on A, rise in nats", ylabel="gain: loss on B, fall in nats")
    axes.set_title("Learning science after fiction: further up and left is better", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, numbers without meaning, nothing written")
    settings = QUICK if parser.parse_args().quick else FULL
    if "MEMGPT_REAL_DATA" not in os.environ:
        sys.exit("error: set MEMGPT_REAL_DATA to a folder with text/train-*.jsonl.gz, of the domains book and science")
    try:
        import peft
    except ImportError:
        sys.exit("error: LoRA is measured with peft: pip install peft")
    torch.set_num_threads(1)
    began = time.monotonic()
    tokenizer, parts = read_domains(Path(os.environ["MEMGPT_REAL_DATA"]) / "text")
    base = pretrained(tokenizer, parts["old"], settings)

    before = held_out(Loop(base, quick=True), parts, settings)
    print(f"before: {before}; {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    methods, learner = {}, None
    for method in GRID:
        kind = "memory" if "memory" in method else method
        if learner is None or learner.kind != kind:
            learner = Learner(kind, base, quick=settings is QUICK)
        points = runs_of(method, learner, base, parts, settings)
        line = frontier(points, before)
        methods[method] = {
            "points": points,
            "frontier": line,
            "forgetting_at_gain": {str(gain): cost_at(gain, line) for gain in GAINS},
        }
    results = {
        "domains": {"old": "book", "new": "science"},
        "settings": {
            **settings,
            "pretraining": PRETRAINING,
            "lora": LORA,
            "grid": GRID,
            "shares": SHARES,
            "batch_tokens": BATCH * LENGTH,
        },
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "before": before,
        "methods": methods,
    }
    print(f"forgetting (rise of the loss on A) at a gain on B of  {'  '.join(f'{gain:6}' for gain in GAINS)}")
    for method, entry in methods.items():
        costs = entry["forgetting_at_gain"].values()
        print(f"{method:53} {'  '.join('     –' if cost is None else f'{cost:6.3f}' for cost in costs)}")
    if settings is FULL:
        write_json(RESULTS / "forgetting.json", results)
        draw(RESULTS / "forgetting.png", results)


if __name__ == "__main__":
    main()
