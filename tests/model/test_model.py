"""The core as a Hugging Face model: what holds exactly, at sizes of a few thousand parameters."""

import pytest
import torch
from memories import give_memory
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from memgpt.model import (
    MemGPTConfig,
    MemGPTForCausalLM,
    MemGPTForMultiTask,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
)

SHAPE = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    memory_rows=97,
    memory_dim=4,
)


def config(**changes) -> MemGPTConfig:
    return MemGPTConfig(**{**SHAPE, **changes})


@pytest.fixture
def model() -> MemGPTForCausalLM:
    """A causal model whose memory says something."""
    torch.manual_seed(0)
    model = MemGPTForCausalLM(config()).eval()
    give_memory(model)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def test_memory_starts_as_nothing(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    fresh = MemGPTForCausalLM(config()).eval()
    plain = MemGPTForCausalLM(config(memory_layers=[])).eval()
    missing, unexpected = plain.load_state_dict(fresh.state_dict(), strict=False)
    assert not missing
    assert all("memory" in name or "recall" in name or name == "model.ngram_hash.owners" for name in unexpected)
    assert torch.equal(fresh(ids).logits, plain(ids).logits)


def test_a_new_gate_lets_everything_through(ids: torch.Tensor) -> None:
    memory = MemGPTForCausalLM(config()).model.layers[0].memory
    hidden = torch.randn(*ids.shape, memory.query_norm.weight.numel())
    entry = torch.randn(*ids.shape, memory.key.in_features)
    assert (memory.gate(hidden, entry) == 1).all()


def test_memory_is_used_and_reaches_only_its_positions(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    before = model(ids).logits
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] - 3 + 1) % 61 + 3
    after = model(changed).logits
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_a_cache_equals_the_full_pass(model: MemGPTForCausalLM, ids: torch.Tensor, beams: int) -> None:
    settings = dict(max_new_tokens=15, min_new_tokens=15, do_sample=False, num_beams=beams)
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (2, 27)


def test_left_padding_does_not_change_what_is_generated(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(ids[:1], (4, 0))
    mask = (padded != 0).long()
    plain = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 4:])


def test_documents_in_a_packed_row_do_not_see_each_other(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    alone = model(ids).logits
    positions = torch.arange(12).repeat(2)[None]
    packed = model(ids.reshape(1, -1), position_ids=positions).logits.reshape(2, 12, -1)
    assert torch.allclose(alone, packed, atol=1e-5)


def test_padding_changes_nothing_when_read_in_both_directions(ids: torch.Tensor) -> None:
    model = MemGPTForTokenClassification(config(num_labels=5)).eval()
    give_memory(model)
    padded = torch.nn.functional.pad(ids, (0, 5))
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    assert torch.allclose(logits[:, :12], model(ids).logits, atol=1e-5)


def test_understanding_reads_both_directions_and_generation_one(ids: torch.Tensor) -> None:
    model = MemGPTForTokenClassification(config(num_labels=5)).eval()
    changed = ids.clone()
    changed[:, -1] = 3
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])
    causal = [model(x, attention_mode="causal").logits[:, 0] for x in (ids, changed)]
    assert torch.allclose(*causal)


@pytest.mark.parametrize(
    "kind",
    [
        MemGPTForCausalLM,
        MemGPTForTokenClassification,
        MemGPTForSequenceClassification,
        MemGPTForRecommendation,
        MemGPTForMultiTask,
    ],
)
def test_saved_and_loaded_gives_equal_weights(kind, tmp_path) -> None:
    torch.manual_seed(0)
    model = kind(config())
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = kind.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_weights_that_a_core_does_not_have_are_initialised(model: MemGPTForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # what nobody writes is NaN then
    try:
        joint = MemGPTForMultiTask.from_pretrained(tmp_path, task_balancing=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not joint.log_variance.any()
    assert all(weight.isfinite().all() for weight in joint.state_dict().values())


def test_auto_classes_and_heads_on_a_pretrained_trunk(model: MemGPTForCausalLM, ids: torch.Tensor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=7)
    assert tagger(ids).logits.shape == (2, 12, 7)
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, tagger.model.state_dict()[name]), name


def test_attention_back_ends_agree(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(sdpa, eager.logits, atol=1e-5)
    assert len(eager.attentions) == 3
    assert eager.attentions[0].shape == (2, 4, 12, 12)
    assert len(eager.hidden_states) == 4


def test_new_tokens_can_be_added(model: MemGPTForCausalLM) -> None:
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[5, 69, 68]])).logits.shape == (1, 3, 70)


def test_gradient_checkpointing_gives_the_same_gradients(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_recommendation_learns_who_reads_what_next(ids: torch.Tensor) -> None:
    """Ten items in a ring: after each comes the next. The loss must fall to that of knowing it."""
    torch.manual_seed(1)
    model = MemGPTForRecommendation(config()).train()
    items = torch.arange(10)[:, None] + torch.arange(3, 6)[None]
    history = (torch.arange(10)[:, None] + torch.arange(4)[None]) % 10
    batch = dict(input_ids=items, history=history, labels=(history + 1) % 10, log_frequency=torch.zeros(10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.1
    assert losses[-1] < 0.3
    again = model(**{**batch, "labels": history}).loss  # of readers who choose what they have just read
    assert again < 20


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_size=15), "num_attention_heads"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(memory_layers=[3]), "memory_layers"),
        (dict(memory_ngrams=[0]), "memory_ngrams"),
        (dict(memory_rows=0), "memory_rows=0 must be 1"),
        (dict(memory_ngrams=[]), "one at least"),
        (dict(layer_types=["full_attention", "around_attention", "full_attention"]), "unknown 'around_attention'"),
        (dict(layer_types=["full_attention"]), "layer_types names 1"),
        (dict(layer_types=["sliding_attention"] * 3), "give sliding_window"),
    ],
)
def test_impossible_shapes_are_refused_by_name(changes, words) -> None:
    with pytest.raises(Exception, match=words):
        config(**changes)


def test_wrong_calls_are_refused(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mode"):
        model(ids, attention_mode="sideways")


def test_four_training_steps_give_the_golden_losses(ids: torch.Tensor) -> None:
    """A change of these numbers is a change of the model or its initialisation: say so where it is made."""
    torch.manual_seed(0)
    model = MemGPTForCausalLM(config(memory_ngrams=[2, 3], memory_kernel=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([4.1648, 3.9600, 3.7989, 3.6202], abs=2e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_in_bfloat16_on_a_cpu_attends_in_float32(
    implementation: str, model: MemGPTForCausalLM, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's backward pass of attention in bfloat16 is several times slower there; answers stay in bfloat16."""
    seen: list[torch.dtype] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *rest, **kwargs) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *rest, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.set_attn_implementation(implementation)
    exact = torch.autograd.grad(model(ids, labels=ids).loss, model.model.embed_tokens.weight)[0]
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        with torch.no_grad():
            model(ids)
    assert seen == ([torch.float32] * 3 + [torch.bfloat16] * 3 if implementation == "sdpa" else [])
    rounded = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_model_in_bfloat16_learns_under_a_mask_of_numbers(model: MemGPTForCausalLM, ids: torch.Tensor) -> None:
    model = model.to(torch.bfloat16)
    causal = torch.full((12, 12), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)
    model.config.memory_layers, model.model.recall = [], None  # which take no such mask
    told = model(ids, attention_mask=causal.expand(2, 1, 12, 12), labels=ids)
    told.loss.backward()
    assert told.loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=0.02)
