"""An accelerated model gives the answers of the original, within what rounding its weights allows."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from memories import give_memory

from memgpt import predict
from memgpt.model import (
    MemGPTConfig,
    MemGPTForCausalLM,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
)
from memgpt.model.config import GLOBAL, LOCAL
from memgpt.model.residency import load
from memgpt.model.serving import Float8Linear, Int8Linear, accelerate
from memgpt.model.unpadded import unpad

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_types=[LOCAL, GLOBAL, LOCAL],
    sliding_window=6,
    memory_rows=97,
    memory_dim=8,
    initializer_range=0.2,
    eos_token_id=None,
    num_labels=5,
)


def made(kind: type = MemGPTForCausalLM, **changes):
    torch.manual_seed(0)
    model = kind(MemGPTConfig(**{**SHAPE, **changes})).eval()
    give_memory(model)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def greedy(model: MemGPTForCausalLM, ids: torch.Tensor, **changes) -> torch.Tensor:
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **changes)


def distance(model, exact, ids: torch.Tensor, **arguments) -> float:
    """Largest difference of logits, in standard deviations of the exact ones."""
    with torch.no_grad():
        wanted, got = exact(ids, **arguments).logits, model(ids, **arguments).logits.float()
    return ((got - wanted).abs().max() / wanted.std()).item()


@pytest.mark.parametrize(("weights", "compile"), [("int8", False), ("float8", False), ("float32", True)])
def test_what_would_be_loaded_as_another_model_is_not_saved(weights: str, compile: bool, tmp_path: Path) -> None:
    model = accelerate(made(), weights, compile=compile)
    with pytest.raises(ValueError, match="not saved; save it before"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    if weights != "float32":
        with pytest.raises(RuntimeError, match="rounded_weight"):
            made().load_state_dict(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_8_bits_may_be_offloaded(weights: str) -> None:
    model, ids = accelerate(made(), weights), tokens(2, 8)
    wanted = model(ids).logits
    torch.testing.assert_close(cpu_offload(model, torch.device("cpu"))(ids).logits, wanted)


@pytest.mark.parametrize("length", [3, 9, 130])
@pytest.mark.parametrize("kind", [MemGPTForCausalLM, MemGPTForTokenClassification])
def test_grouped_attention_is_attention(kind, length: int) -> None:
    exact = made(kind)
    model = accelerate(copy.deepcopy(exact), "float32")
    assert model.config._attn_implementation == "grouped_sdpa"
    ids = tokens(2, length)
    assert distance(model, exact, ids) < 1e-4
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    with torch.no_grad():
        wanted, got = (m(ids, attention_mask=mask).logits for m in (exact, model))
    assert torch.allclose(got[0], wanted[0], atol=1e-4)
    assert torch.allclose(got[1, : length - 2], wanted[1, : length - 2], atol=1e-4)


def test_a_mask_of_numbers_is_added() -> None:
    exact = made()
    model, ids = accelerate(copy.deepcopy(exact), "float32"), tokens(2, 9)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[:, 2] = False
    mask = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted, got = (m(ids, attention_mask=mask).logits for m in (exact, model))
    assert torch.allclose(got, wanted, atol=1e-4)


def test_the_same_tokens_are_generated() -> None:
    exact = made()
    model = accelerate(copy.deepcopy(exact), "float32")
    ids = tokens(2, 10)
    assert torch.equal(greedy(model, ids), greedy(exact, ids))
    padded = torch.nn.functional.pad(ids, (3, 0))
    assert torch.equal(greedy(model, padded)[:, 3:], greedy(exact, ids))
    assert torch.equal(greedy(model, ids, cache_implementation="static"), greedy(exact, ids))


@pytest.mark.parametrize("weights, error", [("bfloat16", 0.15), ("int8", 0.3), ("float8", 0.6)])
def test_rounded_weights_move_the_logits_a_little(weights: str, error: float) -> None:
    exact = made()
    model = accelerate(copy.deepcopy(exact), weights)
    assert 0 < distance(model, exact, tokens(2, 20)) < error
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "rounded, far positions would turn wrongly"
    far = torch.arange(3000, 3020)[None]
    assert distance(model, exact, tokens(1, 20), position_ids=far) < error
    assert greedy(model, tokens(2, 5)).shape == (2, 17)


@pytest.mark.parametrize("inputs, rows", [(16, 1), (16, 64), (48, 3), (32, 65), (12, 2)])
def test_int8_products_are_within_the_rounding(inputs: int, rows: int) -> None:
    linear = torch.nn.Linear(inputs, 7)
    x = torch.randn(1, rows, inputs, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = linear(x.float())
    steps = linear.weight.abs().amax(dim=1) / 254 * x.float().abs().sum(-1, keepdim=True)
    got = Int8Linear(linear.bfloat16())(x)
    assert got.shape == wanted.shape
    assert ((got.float() - wanted).abs() <= steps + 0.02 * wanted.abs() + 0.02).all()


@pytest.mark.parametrize(("kind", "share"), [(Int8Linear, 1 / 254), (Float8Linear, 1 / 16)])
def test_a_weight_is_within_its_bound(kind: type[Int8Linear] | type[Float8Linear], share: float) -> None:
    linear = torch.nn.Linear(64, 200, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(3))
    rounded = kind(linear)
    kept = rounded.rounded_weight.float() * rounded.scale.float()[:, None]
    error = (kept - linear.weight).abs() / linear.weight.abs().amax(dim=1, keepdim=True)
    # a scale that bfloat16 rounds down takes up to 1/256 from the largest
    assert error.max() <= share * 1.01 + (kind is Float8Linear) / 256


@pytest.mark.parametrize("eighth", [False, True])
@pytest.mark.parametrize("inputs, rows", [(16, 1), (48, 3), (32, 65)])
def test_float8_products_are_within_the_rounding(inputs: int, rows: int, eighth: bool) -> None:
    """eighth: with the activations rounded too, as on a GPU. torch multiplies 8-bit floats on a CPU as well."""
    linear = torch.nn.Linear(inputs, 32)
    x = torch.randn(1, rows, inputs, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = linear(x.float())
    sizes = x.float().abs() @ linear.weight.abs().T
    rounded = Float8Linear(linear.bfloat16())
    assert not rounded.eighth
    rounded.eighth = eighth
    got = rounded(x)
    assert got.shape == wanted.shape
    assert got.dtype == torch.bfloat16
    assert ((got.float() - wanted).abs() <= ((17 / 16) ** (1 + eighth) - 1 + 0.01) * sizes + 0.02).all()


def test_float8_products_as_on_a_gpu_answer_alike() -> None:
    exact = made()
    model = accelerate(copy.deepcopy(exact), "float8")
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.eighth = not any(n % 16 for n in module.rounded_weight.shape)
    assert distance(model, exact, tokens(2, 20)) < 0.8
    assert greedy(model, tokens(2, 5)).shape == (2, 17)


@pytest.mark.parametrize("weights, dtype", [("int8", torch.int8), ("float8", torch.float8_e4m3fn)])
def test_8_bits_leave_no_matrix_behind(weights: str, dtype: torch.dtype) -> None:
    model = accelerate(made(), weights)
    assert not [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert model.lm_head.rounded_weight.dtype == dtype


@pytest.mark.parametrize("length, padding", [(3, 0), (3, 2), (1, 1), (9, 4)])
def test_compiled_steps_generate_the_same_tokens(length: int, padding: int) -> None:
    """Prompts shorter and longer than the local window, which slides on; left-padded ones, whose padding leaves it."""
    exact = made(num_hidden_layers=2, layer_types=[LOCAL, GLOBAL])
    model = accelerate(copy.deepcopy(exact), "float32", compile=True)
    model.generation_config.compile_config.backend = "eager"  # the graphs, without the minutes of code generation
    ids = tokens(1 + (padding > 0), length + padding)
    ids[-1, :padding] = 0
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(greedy(model, ids), greedy(exact, ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all lengths


def test_compiled_models_of_one_shape_keep_their_own_code() -> None:
    torch.compiler.reset()
    for eps in (1e-6, 1.0):  # a constant of the code
        exact = made(num_hidden_layers=1, layer_types=[GLOBAL], rms_norm_eps=eps)
        model = accelerate(copy.deepcopy(exact), "float32", compile=True)
        model.generation_config.compile_config.backend = "eager"
        assert torch.equal(greedy(model, tokens(1, 5)), greedy(exact, tokens(1, 5)))


def test_compiled_encoders_answer_alike(tmp_path) -> None:
    exact = made(MemGPTForTokenClassification, num_hidden_layers=1, layer_types=[LOCAL])
    exact.save_pretrained(tmp_path)
    changed = copy.deepcopy(exact)
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(2)  # one must not get the frozen weights of the other
    changed.save_pretrained(tmp_path / "changed")
    pairs = [
        (load(MemGPTForTokenClassification, tmp_path, "resident"), exact),
        (load(MemGPTForTokenClassification, tmp_path / "changed", "mapped"), changed),
    ]
    for model, _ in pairs:
        accelerate(model, "float32", compile=True)
    for ids in (tokens(3, 9), tokens(2, 14)):
        for model, same in pairs:
            assert distance(model, same, ids) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", [MemGPTForTokenClassification, MemGPTForSequenceClassification])
def test_without_padding_the_answers_are_the_same(kind, compile: bool, side: str) -> None:
    exact = made(kind)
    exact.config.max_position_embeddings = 24  # of one text, not of all in the row
    model = unpad(copy.deepcopy(exact))
    assert model.config._attn_implementation == "text_by_text"
    if compile:
        model.base_model.compile(backend="eager", dynamic=True)
    for lengths in ([20, 1, 13, 7], [3, 9]):  # the window is 6
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        mask = mask.flip(1) if side == "left" else mask
        ids = tokens(*mask.shape) * mask
        with torch.no_grad():
            wanted, got = (m(ids, attention_mask=mask).logits for m in (exact, model))
        if kind is MemGPTForTokenClassification:
            wanted, got = wanted[mask.bool()], got[mask.bool()]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert distance(model, exact, tokens(2, 9)) < 1e-4, "nothing is hidden"
    assert distance(model, exact, tokens(2, 9), attention_mode="causal") < 1e-4, "left to sdpa"


def test_items_are_encoded_without_padding_and_their_readers_as_ever() -> None:
    exact = made(MemGPTForRecommendation)
    model = accelerate(copy.deepcopy(exact), "float32", padding=False)
    ids, mask = tokens(3, 9), (torch.arange(9) < torch.tensor([[9], [2], [5]])).long()
    with torch.no_grad():
        wanted, got = (m.encode_item(ids, mask) for m in (exact, model))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        wanted, got = (m.head.encode_reader(wanted[None]) for m in (exact, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_generates_is_not_read_without_padding() -> None:
    with pytest.raises(ValueError, match="padding=False"):
        accelerate(made(), "bfloat16", padding=False)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights='int4'"):
        accelerate(made(), "int4")


def test_a_predictor_answers_alike_when_accelerated(tmp_path) -> None:
    texts = ["Ada Brandt of Norvale Systems fell in Port Dunham, said the bank.", "Ada fell", "", "the bank"] * 2
    tokenizer = MemGPTTokenizer.train(texts, 300, 1)
    tags = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
    torch.manual_seed(6)  # weights that know nothing, of a seed whose best path is no near-tie
    settings = MemGPTConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, id2label=tags)
    MemGPTForTokenClassification(settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    exact, even, fast = (
        predict.load("ner", tmp_path, **settings).predict(texts)
        for settings in ({}, {"padding": False}, {"weights": "bfloat16"})
    )
    assert any(exact)
    for one, other in zip(exact, even, strict=True):
        assert [{**e, "score": pytest.approx(e["score"], abs=1e-5)} for e in one] == other
    for one, other in zip(exact, fast, strict=True):
        assert [(e["start"], e["end"], e["type"]) for e in one] == [(e["start"], e["end"], e["type"]) for e in other]
        for e, f in zip(one, other, strict=True):
            assert e["score"] == pytest.approx(f["score"], abs=0.03)
