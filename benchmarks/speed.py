"""How fast is the core served? Encoding sentences and decoding, compared with transformers' own models, in one process.

    python benchmarks/speed.py [--quick] [--threads N]

All weights are random, since speed does not depend on them; the shapes are those of benchmarks/peers.py. The variants
run in turn in each round. A ratio is the median over rounds of the ratio within a round, so that other load on the
machine affects all alike. Sentences are from WNUT 2017 and WikiGold in MEMGPT_REAL_DATA (ner/…/test.conll), else from
the newsroom. Several of our widths are compared with one peer width; benchmarks/core.py measures their quality. Half
precision is bfloat16 if the processor multiplies it; else all models, peers too, stay in 32 bits. --quick: fewer
sentences, tokens and rounds, and nothing compiled; writes no file.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from transformers import (
    BertForTokenClassification,
    ModernBertConfig,
    ModernBertForTokenClassification,
    PreTrainedModel,
    StoppingCriteria,
    pipeline,
)
from transformers.utils import logging

from memgpt import predict
from memgpt.atomic import write_json
from memgpt.model import MemGPTForTokenClassification, MemGPTTokenizer
from memgpt.model.config import GLOBAL, LOCAL
from memgpt.model.kernels import multiplies_bfloat16
from memgpt.model.serving import accelerate
from memgpt.newsroom import generate

PEER, OURS = 256, (256, 192, 128)  # widths
ROWS = 32768  # rows of the memory table, per hash head
WEIGHTS = "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"
MARK = {"bfloat16": "bf16", "float32": "f32"}[WEIGHTS]
RESULTS = Path(__file__).parent / "results" / f"speed_{MARK}.json"
BIG = f"ours 192 {MARK}, table x16"
LABELS = ["O", *(f"{mark}-{kind}" for kind in ("PER", "LOC", "ORG", "MISC") for mark in "BI")]
LAYERS = {"layer_types": [LOCAL, LOCAL, GLOBAL] * (peers.LAYERS // 3), "max_position_embeddings": 2048}
ARRIVAL = 16  # sentences in a batch of the ordinary pipeline
Rounds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    rounds = 2 if options.quick else 5
    source, sentences = read_sentences(48 if options.quick else 256)
    with tempfile.TemporaryDirectory() as folder:
        many, single = encode(sentences, Path(folder), rounds, not options.quick)
    decoded = {
        name: decode(batch, context, tokens, rounds, not options.quick)
        for name, batch, context, tokens in (
            ("batch 1", 1, 16, 16 if options.quick else 64),
            ("batch 16 at context 1000", 16, 100 if options.quick else 1000, 8 if options.quick else 24),
        )
    }
    report = {
        "sentences": {"source": source, "count": len(sentences)},
        "machine": {
            "cores": os.cpu_count(),
            "threads": options.threads,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "precision": WEIGHTS,
            "torch": torch.__version__,
        },
        "seconds per pass": medians(many),
        "seconds per single text": medians(single),
        "seconds per decoded token": {name: medians(times) for name, times in decoded.items()},
        "targets": targets(many, single, decoded),
    }
    show(report)
    if not options.quick:
        write_json(RESULTS, report)


def read_sentences(count: int) -> tuple[str, list[list[str]]]:
    """(source, the words of `count` sentences in the order of the files)."""
    root = os.environ.get("MEMGPT_REAL_DATA")
    if root is None:
        return "newsroom", [list(words) for words in generate(0.2)["ner"]["test"]["tokens"]][:count]
    sentences = []
    for name in ("wnut17", "wikigold"):
        blocks = (Path(root) / "ner" / name / "test.conll").read_text(encoding="utf-8").strip().split("\n\n")
        words = [[line.split("\t")[0] for line in block.splitlines()] for block in blocks]
        sentences += words[: count // 2]
    return "wnut17, wikigold", sentences


# --- encoding


def encode(sentences: list[list[str]], folder: Path, rounds: int, compiled: bool) -> tuple[Rounds, Rounds]:
    """Seconds from text to entities by variant, for all sentences and for one."""
    tokenizer = MemGPTTokenizer.train([" ".join(words) for words in sentences] * 2, peers.VOCABULARY)
    names: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}

    small = peers.memgpt(min(OURS)).config
    small.update(names)
    MemGPTForTokenClassification(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def served(model: PreTrainedModel) -> Callable[[list[str]], Any]:
        """Serves our models and the peers by the same predictor: the same tokens, batches and decoding of entities."""
        predictor = predict.load("ner", folder)
        predictor.model = model.eval()
        shape = predictor.model.config
        shape.window, shape.label_temperature, shape.outside_bias = small.window, 1.0, 0.0
        return predictor.predict

    def ours(width: int, rows: int = ROWS, compile: bool = False) -> Callable[[list[str]], Any]:
        shape = peers.memgpt(width, rows, sliding_window=128, **LAYERS).config
        shape.update(names)
        return served(accelerate(MemGPTForTokenClassification(shape), WEIGHTS, compile))

    def accelerated(model: PreTrainedModel, compile: bool) -> Callable[[list[str]], Any]:
        """A peer with the same optimisations as `accelerate`."""
        model = model.to(getattr(torch, WEIGHTS)).requires_grad_(False)
        if compile:
            unchecked = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            options = {"freezing": True, "guard_filter_fn": unchecked}
            model.base_model.compile(dynamic=True, isolate_recompiles=True, options=options)
        return served(model)

    def bert() -> PreTrainedModel:
        shape = peers.bert(PEER).config
        shape.update(names)
        return BertForTokenClassification(shape).eval()

    def modern() -> PreTrainedModel:
        shape = ModernBertConfig(
            vocab_size=peers.VOCABULARY,
            hidden_size=PEER,
            intermediate_size=PEER * 3 // 2,
            num_hidden_layers=peers.LAYERS,
            num_attention_heads=PEER // 32,
            attn_implementation="sdpa",
            pad_token_id=0,
            **names,
        )
        return ModernBertForTokenClassification(shape).eval()

    def ordinary(model: PreTrainedModel) -> Callable[[list[str]], Any]:
        return pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple", batch_size=ARRIVAL
        )

    variants: dict[str, Callable[[list[str]], Any]] = {
        f"BERT {PEER} pipeline": ordinary(bert()),
        f"ModernBERT {PEER} pipeline": ordinary(modern()),
    }
    for compile in (False, True) if compiled else (False,):
        mark = " compiled" if compile else ""
        variants[f"BERT {PEER} {MARK}{mark}"] = accelerated(bert(), compile)
        variants[f"ModernBERT {PEER} {MARK}{mark}"] = accelerated(modern(), compile)
        for width in OURS:
            variants[f"ours {width} {MARK}{mark}"] = ours(width, compile=compile)
    variants[BIG] = ours(192, ROWS * 16)
    texts = [" ".join(words) for words in sentences]
    for run in variants.values():  # compiles for many texts and for one, and warms up caches
        run(texts)
        run(texts[:1])
    many = take_turns({name: timed(run, texts) for name, run in variants.items()}, rounds)
    single = take_turns(
        {name: lambda run=run: median(timed(run, [text])() for text in texts[:12]) for name, run in variants.items()},
        rounds,
    )
    return many, single


def timed(run: Callable[[list[str]], Any], texts: list[str]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        run(texts)
        return time.perf_counter() - start

    return measure


def take_turns(variants: dict[str, Callable[[], float]], rounds: int) -> Rounds:
    times: Rounds = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(variants[name]())
    return times


# --- decoding


class Clock(StoppingCriteria):
    """Records when each token is generated; never stops the generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def decode(batch: int, context: int, tokens: int, rounds: int, compiled: bool) -> Rounds:
    """Seconds per step of `generate` (the median within a call), without reading the prompt."""

    def ours(rows: int = ROWS) -> PreTrainedModel:
        return peers.memgpt(PEER, rows, sliding_window=256, **LAYERS)

    models = {
        f"Llama {PEER}": peers.llama(PEER),
        f"ours {PEER} {MARK}": accelerate(ours(), WEIGHTS),
        f"ours {PEER} int8": accelerate(ours(), "int8"),
        f"ours {PEER} int8, without memory": accelerate(ours(0), "int8"),
    }
    if WEIGHTS == "bfloat16":
        models[f"Llama {PEER} bf16"] = peers.llama(PEER).to(torch.bfloat16)
    if compiled:
        for weights, mark in ((WEIGHTS, MARK), ("int8", "int8")):
            models[f"ours {PEER} {mark} compiled"] = accelerate(ours(), weights, compile=True)
    prompt = torch.randint(5, peers.VOCABULARY, (batch, context))

    def step(model: PreTrainedModel) -> float:
        clock = Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return median(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))

    for name, model in models.items():
        model.eval()
        if "compiled" in name:
            step(model)
    return take_turns({name: lambda model=model: step(model) for name, model in models.items()}, rounds)


# --- results


def medians(times: Rounds) -> dict[str, float]:
    return {name: round(median(values), 6) for name, values in times.items()}


def fastest(times: Rounds, start: str) -> str:
    """The fastest variant by median whose name starts with `start`: every model, peers too, counts at its best."""
    return min((name for name in times if name.startswith(start) and name != BIG), key=lambda n: median(times[n]))


def ratio(times: Rounds, slow: str, fast: str) -> float:
    return round(median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 3)


def targets(many: Rounds, single: Rounds, decoded: dict[str, Rounds]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, target: float, reached: float, least: bool = True) -> None:
        met = reached >= target if least else reached <= target
        rows.append({"what": what, "target": f"{'>=' if least else '<='} {target}", "reached": reached, "met": met})

    ordinary, peer = f"BERT {PEER} pipeline", fastest(many, f"BERT {PEER} {MARK}")
    for width in OURS:
        best = fastest(many, f"ours {width} {MARK}")
        add(f"encode: {best} over {ordinary}", 5, ratio(many, ordinary, best))
        add(f"encode: {best} over {peer}", 1.3, ratio(many, peer, best))
    for width in OURS:
        best = fastest(single, f"ours {width} {MARK}")
        add(f"one text: {best} against {ordinary}", 0.5, ratio(single, best, ordinary), least=False)
    add("encode: table x16 against x1", 1.1, ratio(many, BIG, f"ours 192 {MARK}"), least=False)
    for (name, times), target in zip(decoded.items(), (2, 3), strict=True):
        best = fastest({n: t for n, t in times.items() if "without" not in n}, "ours")
        add(f"decode, {name}: {best} over Llama {PEER}", target, ratio(times, f"Llama {PEER}", best))
    return rows


def show(report: dict[str, Any]) -> None:
    tables = {f"decode, {name}": times for name, times in report["seconds per decoded token"].items()}
    tables = {
        f"encode {report['sentences']['count']} sentences": report["seconds per pass"],
        "encode one": report["seconds per single text"],
        **tables,
    }
    for title, times in tables.items():
        first = next(iter(times.values()))
        print(f"\n{title}")
        for name, seconds in times.items():
            print(f"  {name:36} {seconds * 1000:10.2f} ms {first / seconds:7.2f}x")
    print(f"\n{'':72} target   reached")
    for row in report["targets"]:
        print(f"{row['what']:72} {row['target']:8} {row['reached']:6.2f}  {'yes' if row['met'] else 'NO'}")


if __name__ == "__main__":
    main()
