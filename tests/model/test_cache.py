"""Caches that hold less: what they hold, and that the answers stay."""

import pytest
import torch
from memories import give_memory
from transformers.cache_utils import DynamicCache

from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM
from memgpt.model.cache import cache_bytes, kv_bytes_per_token, make_cache
from memgpt.model.config import GLOBAL, LOCAL

SHAPE = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    memory_ngrams=[2, 3],
    memory_rows=97,
    memory_dim=4,
    sliding_window=64,
    eos_token_id=None,
)


def causal(types: list[str], **changes) -> MemGPTForCausalLM:
    torch.manual_seed(0)
    model = MemGPTForCausalLM(MemGPTConfig(**{**SHAPE, "layer_types": types, **changes})).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.attention.q_proj.weight)  # sharp attention: what is lost would show
    give_memory(model)
    return model


def text(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(model: MemGPTForCausalLM, ids: torch.Tensor, cache, pieces: list[int], start: int = 0) -> torch.Tensor:
    """Logits of ids from `start` on, of which the cache holds what is before."""
    logits = []
    for piece in pieces:
        context = ids[:, max(0, start - model.model.context) : start]
        part = ids[:, start : start + piece]
        logits.append(model(part, past_key_values=cache, context_ids=context, use_cache=True).logits)
        start += piece
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_hold_an_eighth_of_full_attention(preset: str) -> None:
    config = MemGPTConfig(**PRESETS[preset])
    full = 2 * config.num_hidden_layers * config.hidden_size * torch.float32.itemsize
    assert kv_bytes_per_token(config, 8192, torch.float32) <= full / 8
    assert kv_bytes_per_token(config, 8192, torch.float32, int8=True) <= full / 24


def test_the_count_of_bytes_is_what_a_cache_holds() -> None:
    model, length = causal([LOCAL, GLOBAL, LOCAL]), 200
    for int8 in (False, True):
        cache = make_cache(model.config, int8=int8)
        read(model, text(length), cache, [length])
        counted = kv_bytes_per_token(model.config, length, torch.float32, int8=int8) * length
        assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == pytest.approx(
            counted, rel=0.02
        )


def test_an_int8_cache_gives_the_logits_within_two_per_cent() -> None:
    model, ids = causal([LOCAL, GLOBAL, LOCAL]), text(160, rows=2)
    with torch.no_grad():
        exact = model(ids).logits
    whole = read(model, ids, make_cache(model.config, int8=True), [160])
    error = (whole - exact).abs().max() / exact.std()
    assert 0 < error < 0.02
    pieces = read(model, ids, make_cache(model.config, int8=True), [100, 1, 1, 8] + [1] * 50)
    assert torch.allclose(pieces, whole, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_an_int8_cache(beams: int) -> None:
    """Beams reorder the cache; a cache that is reset serves the next text."""
    model, ids = causal([LOCAL, GLOBAL, LOCAL], sliding_window=8), text(13, rows=2)
    settings = dict(max_new_tokens=15, do_sample=False, num_beams=beams)
    cache = make_cache(model.config, int8=True)
    first = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(first, model.generate(ids, **settings))
    assert cache.layers[0].keys.dtype == torch.int8
    if beams == 1:
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), first)


@pytest.mark.parametrize("int8", [False, True])
def test_a_stream_decodes_in_constant_memory(int8: bool) -> None:
    """3,000 tokens through a model of 128 positions."""
    model = causal([LOCAL, GLOBAL, LOCAL], max_position_embeddings=128)
    ids, cache = text(3000), make_cache(model.config, int8=int8, stream=64)
    held = []
    for start in range(0, 3000, 100):
        logits = read(model, ids, cache, [60, 36, 1, 1, 1, 1], start)
        held.append(cache_bytes(cache))
    assert torch.isfinite(logits).all()
    assert len(set(held[1:])) == 1
    with pytest.raises(ValueError, match="max_position_embeddings"):
        read(model, ids, make_cache(model.config), [100, 29])


def test_a_stream_through_local_layers_equals_a_pass_over_what_they_see() -> None:
    """Three windows of 64 reach back 189 tokens, and the memories 6: the rest of 3,000 does not matter."""
    model = causal([LOCAL] * 3, recall_window=3)
    ids = text(3000)
    streamed = read(model, ids, make_cache(model.config, stream=64), [500] * 5 + [499] + [1])[:, -1]
    with torch.no_grad():
        fresh = model(ids[:, -196:]).logits[:, -1]
    assert torch.allclose(streamed, fresh, atol=1e-3)


def test_a_streams_global_layers_see_a_window_of_their_own() -> None:
    """Token by token they are local layers with that window."""
    stream, local = causal([GLOBAL] * 3), causal([LOCAL] * 3, sliding_window=16)
    ids = text(60)
    streamed = read(stream, ids, make_cache(stream.config, stream=16), [1] * 60)
    with torch.no_grad():
        assert torch.allclose(streamed, local(ids).logits, atol=1e-5)
    mixed = causal([LOCAL, GLOBAL, LOCAL], sliding_window=8)
    with torch.no_grad():
        within = mixed(ids).logits
    assert torch.allclose(read(mixed, ids, make_cache(mixed.config, stream=64), [1] * 60), within, atol=1e-5)


def test_a_plain_cache_is_transformers_own() -> None:
    model, ids = causal([LOCAL, GLOBAL, LOCAL], sliding_window=8), text(30)
    ours, theirs = make_cache(model.config), DynamicCache(config=model.config)
    assert torch.equal(read(model, ids, ours, [20] + [1] * 10), read(model, ids, theirs, [20] + [1] * 10))


@pytest.mark.parametrize("stream", [1, 4097])
def test_a_stream_that_cannot_be_is_refused(stream: int) -> None:
    with pytest.raises(ValueError, match="stream"):
        make_cache(causal([LOCAL] * 3).config, stream=stream)
