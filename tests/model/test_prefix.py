"""A trained prefix of keys and values: seen by every token, at no position, whatever else a model is asked to do."""

import copy

import pytest
import torch
from memories import give_memory
from transformers import DynamicCache

from memgpt.model import (
    MemGPTConfig,
    MemGPTForCausalLM,
    MemGPTForMultiTask,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTModel,
)
from memgpt.model.config import GLOBAL, LOCAL
from memgpt.model.residency import load
from memgpt.model.serving import accelerate

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_types=[LOCAL, GLOBAL, LOCAL],
    sliding_window=3,
    memory_rows=97,
    memory_dim=8,
    initializer_range=0.2,
    num_labels=5,
    prefix_length=4,
)
CLASSES = [MemGPTForTokenClassification, MemGPTForSequenceClassification, MemGPTForRecommendation]


def made(kind: type = MemGPTForTokenClassification, **changes):
    torch.manual_seed(0)
    model = kind(MemGPTConfig(**{**SHAPE, **changes})).eval()
    give_memory(model)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("position_embedding", ["rotary", "learned"])
def test_it_is_keys_and_values_that_come_before(padding: int, position_embedding: str, ids: torch.Tensor) -> None:
    """What transformers' cache would give for them, where no window hides it; positions begin with the text."""
    settings = dict(layer_types=[GLOBAL] * 3, position_embedding=position_embedding)
    model, plain = made(**settings), made(**settings, prefix_length=0)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], ["model.prefix.weight"])
    cache = DynamicCache()
    for layer, (key, value) in enumerate(model.model.prefix.weight):
        cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
    mask = torch.ones_like(ids)
    mask[1, 12 - padding :] = 0
    seen = torch.nn.functional.pad(mask, (4, 0), value=1)
    positions = torch.arange(12)[None]
    wanted = plain(ids, attention_mask=seen, past_key_values=cache, position_ids=positions).logits[mask > 0]
    found = model(ids, attention_mask=mask).logits[mask > 0]
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain(ids, attention_mask=mask).logits[mask > 0])


def test_no_window_ends_before_it(ids: torch.Tensor) -> None:
    model = made()
    model.set_attn_implementation("eager")
    near, everywhere, _ = model(ids, output_attentions=True).attentions
    assert near.shape == (2, 4, 12, 4 + 12)
    assert (near[..., :4] > 0).all() and (everywhere > 0).all()
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    assert torch.equal(near[0, 0, :, 4:] > 0, distance <= 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_packing_change_nothing(side: str, ids: torch.Tensor) -> None:
    model = made()
    alone = model(ids).logits
    pad = (3, 0) if side == "left" else (0, 3)
    padded, mask = (torch.nn.functional.pad(part, pad) for part in (ids, torch.ones_like(ids)))
    positions = torch.arange(15)[None] - (3 if side == "left" else 0)
    logits = model(padded, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    torch.testing.assert_close(logits[:, 3:] if side == "left" else logits[:, :12], alone)
    packed = model(ids.reshape(1, -1), position_ids=torch.arange(12).repeat(2)[None]).logits
    torch.testing.assert_close(packed.view_as(alone), alone)


def test_every_back_end_shows_it(ids: torch.Tensor) -> None:
    model = made()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for arguments in ({}, {"attention_mask": mask}):
        wanted = model(ids, **arguments).logits[mask > 0]
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        grouped, rounded = (accelerate(copy.deepcopy(model), weights) for weights in ("float32", "bfloat16"))
        compiled = copy.deepcopy(model)
        compiled.base_model.compile(dynamic=True, backend="eager")  # the graph, without the code generation
        for other in (eager, grouped, compiled):
            torch.testing.assert_close(other(ids, **arguments).logits[mask > 0], wanted, rtol=1e-4, atol=1e-5)
        assert (rounded(ids, **arguments).logits[mask > 0] - wanted).abs().max() < 0.1 * wanted.std()


@pytest.mark.parametrize("memory", ["resident", "mapped", "host"])
@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_saved_as_a_weight_of_the_model(kind, memory, ids: torch.Tensor, tmp_path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path, memory)
    assert loaded.config.prefix_length == 4
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    trunk = MemGPTModel.from_pretrained(tmp_path)
    assert torch.equal(trunk.prefix.weight, model.model.prefix.weight)
    core = MemGPTForCausalLM.from_pretrained(tmp_path, prefix_length=0)  # as pretraining starts from it
    assert core.model.prefix is None and core(ids).logits.isfinite().all()


def test_readers_of_items_have_none(ids: torch.Tensor) -> None:
    """Of the two towers only the one that reads texts."""
    model, plain = made(MemGPTForRecommendation), made(MemGPTForRecommendation, prefix_length=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    items = torch.randn(1, 3, model.config.pooled_size)
    assert torch.equal(model.head.encode_reader(items), plain.head.encode_reader(items))
    assert not torch.allclose(model.encode_item(ids), plain.encode_item(ids))


def test_what_it_cannot_do_is_refused_in_one_line(ids: torch.Tensor) -> None:
    model = made(MemGPTForMultiTask)
    with pytest.raises(ValueError, match=r"attention_mode='causal': a model with a prefix \(prefix_length=4\)"):
        model(ids, attention_mode="causal", task="ner")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="prefix_length=4: flex_attention takes no mask for it; use sdpa or eager"):
        model(ids, task="ner")
    model = accelerate(made(MemGPTForMultiTask), "float32", padding=False)
    with pytest.raises(ValueError, match="prefix_length=4: text_by_text takes no mask for it"):
        model(ids, task="ner")
