"""The cells of benchmarks/gpu.py: each measures one thing on one device and returns numbers without verdicts.

Weights and tokens are random, since speed does not depend on them. Tokens follow Zipf's law, so that few n-grams are
frequent as in text, because caches and gradients depend on that. SIZES has the model sizes; `tiny` is for the CPU.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speed import Clock
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
)

from memgpt import config
from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM, MemGPTModel, kernels
from memgpt.model.config import GLOBAL, LOCAL
from memgpt.model.kernels import float8
from memgpt.model.memory import KnowledgeMemory, make_table
from memgpt.model.residency import load, place, prefetch
from memgpt.model.serving import accelerate
from memgpt.objectives import Pretraining, fused_loss, next_token_loss
from memgpt.optimizers import RowAdagrad, clip_gradients, for_pretraining

PARAMS = config.load(Path(__file__).parents[1] / "params.yaml").pretrain
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# With Triton's interpreter the kernels also run on a CPU: slowly, but it shows that these cells work.
KERNELS = kernels.TRITON and (DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
BASE = {**PRESETS["base"], "vocab_size": 32768, "max_position_embeddings": 4096}
SIZES: dict[str, dict[str, Any]] = {  # active parameters: 46, 150 and 525 million
    "base": BASE,
    "medium": {
        **BASE,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "large": {
        **BASE,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "tiny": {**PRESETS["tiny"], "vocab_size": 512, "sliding_window": 16, "memory_rows": 128, "memory_dim": 12},
}
BATCH = {"base": (64, 1024), "medium": (48, 1024), "large": (48, 1024), "tiny": (2, 32)}  # texts, tokens of each
Z_LOSS = 1e-4
Cell = dict[str, Any]


def memgpt(size: str, memory: bool = True, **changes: Any) -> MemGPTForCausalLM:
    shape = {**SIZES[size], **({} if memory else {"memory_layers": []}), **changes}
    return MemGPTForCausalLM(MemGPTConfig(**shape))


def llama(size: str) -> LlamaForCausalLM:
    """Llama of equal hidden size, layers, heads, key-value heads and feed-forward size; layers see the whole text."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: SIZES[size][name] for name in (*names, "num_key_value_heads")}
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            attn_implementation="sdpa",
        )
    )


def ids(size: str, *shape: int) -> torch.Tensor:
    """Tokens drawn by Zipf's law."""
    vocabulary = SIZES[size]["vocab_size"]
    weights = 1 / torch.arange(1, vocabulary - 4)
    drawn = torch.multinomial(weights, torch.Size(shape).numel(), replacement=True)
    return (drawn + 5).view(shape).to(DEVICE)


def compiled(function: Callable[..., Any], tiny: bool) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend="eager" if tiny else "inductor")


# --- time


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], tiny: bool, repeats: int = 20) -> float:
    """Median time of single runs after a warm-up, measured by CUDA events on a GPU."""
    for _ in range(1 if tiny else 5):
        run()
    times = []
    for _ in range(2 if tiny else repeats):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return median(times)


@contextmanager
def peak_memory(found: Cell) -> Iterator[None]:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if DEVICE.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()


# --- what the device can do: the floors


def floors(spec: Cell) -> Cell:
    """Bytes per second of a copy (bytes read plus written), and operations per second of a matrix product."""
    tiny = spec["size"] == "tiny"
    source = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    width = 128 if tiny else 8192
    a, b = (torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return {
        "bytes_per_second": 2 * source.numel() / seconds(lambda: target.copy_(source), tiny),
        "flops_per_second": 2 * width**3 / seconds(lambda: a @ b, tiny),
    }


# --- training


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations of a training step per token: six per multiply-add of the matrices and of attention
    within its window. Look-ups, norms and recomputation do not count."""
    shape = model.config
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    width = shape.num_attention_heads * (getattr(shape, "head_dim", None) or 0)
    attention = 0.0
    for kind in getattr(shape, "layer_types", None) or [GLOBAL] * shape.num_hidden_layers:
        window = min(length, shape.sliding_window or length) if kind == LOCAL else length
        attention += 2 * width * (window * (window + 1) / 2 + (length - window) * window) / length
    return 6 * (matrices + attention)


def loss_of(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, **read: Any) -> torch.Tensor:
    """Pretraining's loss. The peer gets the same loss, but no position_ids, from which it would build a mask."""
    if isinstance(model, MemGPTForCausalLM) or not (KERNELS and kernels.LIGER):
        return next_token_loss(model, input_ids, position_ids, input_ids, Z_LOSS, **read)
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    return fused_loss(hidden, model.lm_head.weight, input_ids[:, 1:], Z_LOSS) / input_ids[:, 1:].numel()


def stock_loss(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def train(spec: Cell) -> Cell:
    """A training step. spec: kind "memgpt", "plain" (without memory), "llama", or "stock" (Llama with transformers' own
    loss and AdamW); attention; scope: "product" trains like the stage pretrain, "whole" compiles loss and model,
    "blocks" each block alone, so that masks are built outside; float8: the blocks' products in 8 bits."""
    size, tiny, kind = spec["size"], spec["size"] == "tiny", spec["kind"]
    model = (memgpt(size, kind == "memgpt") if kind in ("memgpt", "plain") else llama(size)).to(DEVICE).train()
    model.set_attn_implementation(spec["attention"])
    with float8.products(model, emulate=tiny) if spec.get("float8") else nullcontext():
        return _steps(model, spec, tiny)


def _steps(model: PreTrainedModel, spec: Cell, tiny: bool) -> Cell:
    size, scope = spec["size"], spec["scope"]
    optimizer: torch.optim.Optimizer = for_pretraining(model, PARAMS)
    batch, length = BATCH[size]
    input_ids, position_ids = ids(size, batch, length), torch.arange(length, device=DEVICE).expand(batch, -1)
    if scope == "product":  # it moves batches to the device itself
        input_ids, position_ids = input_ids.cpu(), position_ids.cpu()
    loss: Callable[..., torch.Tensor] = loss_of
    if spec["kind"] == "stock":
        optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), stock_loss
    if scope == "whole":
        loss = compiled(loss, tiny)
    elif scope == "blocks":
        for block in model.model.layers:
            block.forward = compiled(block.forward, tiny)
    elif scope == "product":
        changes = {"masked_share_start": 0.0, "masked_share_end": 0.0, "z_loss": Z_LOSS, "compile": not tiny}
        pretraining = Pretraining(PARAMS.model_copy(update=changes), 1, SIZES[size]["vocab_size"], 2)
        loss = partial(_by_product, pretraining)
    reads = spec["kind"] == "memgpt" and scope == "whole"

    def gradients() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            read = {"memory_entry": model.model.read_memory(input_ids, position_ids)} if reads else {}
            value = loss(model, input_ids, position_ids, **read)
        value.backward()

    def step() -> None:
        gradients()
        update()
        model.zero_grad()

    def update() -> None:
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    found: Cell = {}
    with peak_memory(found):
        whole = seconds(step, tiny)
    gradients()
    updating = seconds(update, tiny, 5)
    flops = flops_per_token(model, length) * batch * length / whole
    active = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("memory_table.weight"))
    return found | {
        "step_seconds": whole,
        "update_seconds": updating,
        "tokens_per_second": batch * length / whole,
        "flops_per_second": flops,
        "active_parameters": active,
    }


def _by_product(pretraining: Pretraining, model: PreTrainedModel, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return pretraining(model, {"input_ids": ids, "position_ids": at}, 0)


# --- kernels, compared with their references


def look_up(spec: Cell) -> Cell:
    """Look-up of rows into 16 bits, and its gradient, for uniform rows (caches do not help) or rows as in text."""
    tiny, shape = spec["size"] == "tiny", SIZES[spec["size"]]
    memory = make_table(MemGPTConfig(**shape)).to(DEVICE)
    memory.sparse = True
    table = memory.weight
    batch, length = BATCH[spec["size"]]
    width = shape["memory_dim"]
    reads = len(table) // shape["memory_rows"]
    if spec["drawn"] == "uniform":
        addresses = torch.randint(1, len(table), (batch, length, reads), device=DEVICE)
    else:
        model = MemGPTModel(MemGPTConfig(**shape)).to(DEVICE)
        positions = torch.arange(length, device=DEVICE)[None]
        addresses = model.ngram_hash(ids(spec["size"], batch, length), positions)[:, -length:]
    gradient = torch.randn(batch, length, reads * width, device=DEVICE, dtype=torch.bfloat16)
    count, distinct = addresses.numel(), len(addresses.unique())

    def plain(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(addresses, rows, padding_idx=0, sparse=True).flatten(-2).to(torch.bfloat16)

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        from memgpt.model.kernels.memory import look_up

        return look_up(rows, addresses, torch.bfloat16)

    def readers() -> None:
        from memgpt.model.kernels.memory import readers

        readers(addresses.flatten())

    optimizer = RowAdagrad([table])
    found: Cell = {
        "forward_bytes": distinct * width * 4 + count * (width * 2 + 8),
        "backward_bytes": count * (width * 2 + 8) + distinct * width * 4,
    }
    for name, run in {"plain": plain, **({"kernel": kernel} if KERNELS else {})}.items():
        out = run(table)

        def backward(out: torch.Tensor = out) -> None:
            table.grad = None
            out.backward(gradient, retain_graph=True)
            table.grad = table.grad.coalesce()  # as the optimizer does

        found[f"{name}_forward"] = seconds(partial(run, table.detach()), tiny)
        found[f"{name}_backward"] = seconds(backward, tiny)
        if name == "kernel":  # sorting the readers, which its gradient needs beforehand
            found["kernel_backward"] += seconds(readers, tiny)
        found[f"{name}_update"] = seconds(optimizer.step, tiny)
    return found


def gate(spec: Cell) -> Cell:
    """Gate and convolution: the memory layer without its look-up and its two matrix products."""
    size, tiny = spec["size"], spec["size"] == "tiny"
    memory = KnowledgeMemory(MemGPTConfig(**SIZES[size])).to(DEVICE)
    (batch, length), width, lead = BATCH[size], SIZES[size]["hidden_size"], memory.lead
    nn.init.normal_(memory.taps)
    hidden = torch.randn(batch, length, width, device=DEVICE, requires_grad=True)
    key, value = (
        torch.randn(batch, lead + length, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    positions = torch.arange(length, device=DEVICE)[None]
    gradient = torch.randn_like(hidden)

    def plain() -> torch.Tensor:
        match = (memory.query_norm(hidden) * memory.key_norm(key[:, lead:])).sum(-1, keepdim=True)
        return 2 * torch.sigmoid(match * width**-0.5) * memory.convolve(value, positions)

    def kernel() -> torch.Tensor:
        from memgpt.model.kernels.memory import gated_convolution

        weight = memory.query_norm.weight * memory.key_norm.weight
        return gated_convolution(hidden, key, value, weight, memory.taps, positions, 1e-6)[0]

    # forward: hidden, key, value and the output; backward: the output's gradient, the three and their gradients
    found: Cell = {"forward_bytes": hidden.numel() * 12, "backward_bytes": hidden.numel() * 20}
    variants = {"plain": plain, "compiled": compiled(plain, tiny), **({"kernel": kernel} if KERNELS else {})}
    learn = [hidden, key, value, memory.taps, memory.query_norm.weight, memory.key_norm.weight]
    for name, run in variants.items():
        found[f"{name}_forward"] = seconds(run, tiny)
        backward = partial(run().backward, gradient, retain_graph=True, inputs=learn)
        found[f"{name}_backward"] = seconds(backward, tiny)
    return found


def head(spec: Cell) -> Cell:
    """Output matrix and loss, forward and backward."""
    size, tiny = spec["size"], spec["size"] == "tiny"
    (batch, length), width, vocabulary = BATCH[size], SIZES[size]["hidden_size"], SIZES[size]["vocab_size"]
    hidden = torch.randn(batch, length, width, device=DEVICE, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, requires_grad=True)
    targets = ids(size, batch, length)[:, 1:]

    def plain() -> torch.Tensor:
        logits = nn.functional.linear(hidden[:, :-1], weight).float()
        log_z = logits.logsumexp(-1)
        return (log_z - logits.gather(-1, targets[..., None])[..., 0] + Z_LOSS * log_z.square()).sum()

    def kernel() -> torch.Tensor:
        return fused_loss(hidden, weight, targets, Z_LOSS)

    found: Cell = {"flops": 6 * batch * length * width * vocabulary}
    variants = {"plain": plain, "compiled": compiled(plain, tiny)}
    if KERNELS and kernels.LIGER:
        variants["kernel"] = kernel
    for name, run in variants.items():

        def both(run: Callable[[], torch.Tensor] = run) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                total = run()
            total.backward()

        memory: Cell = {}
        with peak_memory(memory):
            found[f"{name}_seconds"] = seconds(both, tiny)
        found.update({f"{name}_{key}": number for key, number in memory.items()})
    return found


# --- encoding


def encode(spec: Cell) -> Cell:
    """Encode sentences of uneven length. Ours are packed into rows without padding ("packed") or, like the peers',
    padded in batches of similar length ("padded"), which the trunk can read without the padding ("unpadded"). weights:
    as in `accelerate`."""
    size, tiny = spec["size"], spec["size"] == "tiny"
    shape, names = SIZES[size], ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    same = {name: shape[name] for name in names}
    model: PreTrainedModel
    if spec["kind"] == "bert":
        model = BertModel(BertConfig(**same, intermediate_size=4 * shape["hidden_size"]))
    elif spec["kind"] == "modernbert":
        wide = 3 * shape["hidden_size"] // 2
        model = ModernBertModel(ModernBertConfig(**same, intermediate_size=wide, pad_token_id=0))
    else:
        model = MemGPTModel(MemGPTConfig(**shape))
    model.set_attn_implementation(spec["attention"])
    if "memgpt" in spec["kind"]:
        padding = spec["kind"] != "memgpt unpadded"
        model = accelerate(model.to(DEVICE), spec.get("weights", "bfloat16"), padding=padding)
    else:
        model = model.to(DEVICE, torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(0)
    row, sentences = (64, 12) if tiny else (1024, 4096)
    lengths = (torch.randn(sentences, generator=draw) * 0.6 + 3.3).exp().long().clamp(4, row // 2).tolist()
    batches = list(_packed(lengths, row, size) if spec["kind"].endswith("packed") else _padded(lengths, row, size))
    run = torch.compile(model, dynamic=True, backend="eager" if tiny else "inductor") if spec["compiled"] else model
    mode = {"attention_mode": "bidirectional"} if "memgpt" in spec["kind"] else {}

    @torch.no_grad()
    def read() -> None:
        for batch in batches:
            run(**batch, **mode)

    taken = seconds(read, tiny, 5)
    return {"seconds": taken, "tokens_per_second": sum(lengths) / taken, "sentences_per_second": sentences / taken}


def _padded(lengths: list[int], row: int, size: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches with as many tokens as 16 rows; sentences are sorted by length."""
    waiting = sorted(lengths, reverse=True)
    while waiting:
        longest = waiting[0]
        now, waiting = waiting[: 16 * row // longest], waiting[16 * row // longest :]
        mask = torch.arange(longest)[None] < torch.tensor(now)[:, None]
        yield {"input_ids": ids(size, len(now), longest), "attention_mask": mask.long().to(DEVICE)}


def _packed(lengths: list[int], row: int, size: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of 16 rows in which texts follow one another; the rest of a row is filled with a dummy text."""
    texts, room = [], 0
    for length in lengths:
        if length > room:
            texts.append(torch.arange(room))
            room = row
        texts.append(torch.arange(length))
        room -= length
    positions = torch.cat([*texts, torch.arange(room)]).view(-1, row)
    for part in positions.split(16):
        whole = torch.nn.functional.pad(part, (0, 0, 0, 16 - len(part)))  # one shape, compiled once
        yield {"input_ids": ids(size, *whole.shape), "position_ids": whole.to(DEVICE)}


# --- decoding


def decode(spec: Cell) -> Cell:
    """A step of `generate`. kind: "memgpt" with `accelerate` (weights: as there), "plain" (the same without memory),
    "llama" with transformers' compiled static cache, "llama eager" with its default cache."""
    size, tiny, batch = spec["size"], spec["size"] == "tiny", spec["batch"]
    if "llama" in spec["kind"]:
        model: PreTrainedModel = llama(size).to(DEVICE, torch.bfloat16).eval()
        if spec["kind"] == "llama":
            model.generation_config.cache_implementation = "static"
    else:
        weights = spec.get("weights", "bfloat16")
        model = accelerate(memgpt(size, spec["kind"] == "memgpt").to(DEVICE), weights, compile=True)
        if tiny:
            model.generation_config.compile_config.backend = "eager"
    context, tokens = (8, 4) if tiny else (128, 128)
    prompt = ids(size, batch, context)
    rows = ("memory_table.weight", "embed_tokens.weight", "canonical_ids")  # a step reads only a few of their rows
    read = sum(weight.nbytes for name, weight in model.state_dict().items() if not name.endswith(rows))
    step = _step(model, prompt, tokens, tiny)
    return {"step_seconds": step, "tokens_per_second": batch / step, "step_bytes": read}


def _step(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, tiny: bool) -> float:
    def call() -> float:
        clock = Clock()
        mask = torch.ones_like(prompt)
        model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return median(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))

    return median(call() for _ in range(1 if tiny else 4))


# --- location of the tables


def residency(spec: Cell) -> Cell:
    """Time to read a batch while the next one's rows are prefetched, and to decode a token, by table location."""
    size, tiny, kept = spec["size"], spec["size"] == "tiny", spec["kept"]
    with tempfile.TemporaryDirectory() as folder:
        model = memgpt(size).to(torch.bfloat16)
        nn.init.normal_(model.model.memory_table.weight[1:].detach())
        if kept == "mapped":
            model.save_pretrained(folder)
            model = load(MemGPTForCausalLM, folder, "mapped", dtype=torch.bfloat16).to(DEVICE)
        else:
            model = place(model.to(DEVICE), kept)
        model = accelerate(model, "bfloat16")
        batch, length = BATCH[size][0] // 4 or 1, BATCH[size][1] // 4
        batches = [ids(size, batch, length) for _ in range(4)]
        ahead = [batch.cpu() for batch in batches]
        turn = 0

        @torch.no_grad()
        def read() -> None:
            nonlocal turn
            model.model(batches[turn % 4], use_cache=False)
            turn += 1
            prefetch(model, ahead[turn % 4])

        reading = seconds(read, tiny)
        return {
            "read_seconds": reading,
            "tokens_per_second": batch * length / reading,
            "decode_seconds": _step(model, ids(size, 1, 8), 4 if tiny else 64, tiny),
        }
