"""What pretraining minimises, against its definition."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memories import give_memory
from torch.utils.data import default_collate

from memgpt import config
from memgpt.model import MemGPTConfig, MemGPTForCausalLM
from memgpt.objectives import Pretraining, mask, next_token_loss
from memgpt.optimizers import for_pretraining
from memgpt.training import train

ROOT = Path(__file__).parents[1]
MASK = 2


@pytest.fixture
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
    return MemGPTForCausalLM(MemGPTConfig(**shape, **layers, memory_rows=97, memory_dim=4)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.arange(12).repeat(2).expand(2, -1)}


def objective(**changes) -> Pretraining:
    params = config.load(ROOT / "params.yaml").pretrain.model_copy(update={"z_loss": 0.0, **changes})
    return Pretraining(params, steps=100, vocab_size=64, mask_token_id=MASK)


def test_without_masks_it_is_the_models_own_loss(model: MemGPTForCausalLM, batch) -> None:
    own = model(**batch, labels=batch["input_ids"]).loss
    assert torch.allclose(objective()(model, batch, 0), own, atol=1e-6)


def test_z_loss_adds_the_squared_normaliser(model: MemGPTForCausalLM, batch) -> None:
    log_z = model(**batch).logits[:, :-1].logsumexp(-1)
    gain = objective(z_loss=0.5)(model, batch, 0) - objective()(model, batch, 0)
    assert torch.allclose(gain, 0.5 * log_z.square().mean(), atol=1e-4)


def test_masks_hide_their_share_and_never_a_documents_first_token(batch) -> None:
    draw = torch.Generator().manual_seed(0)
    ids, positions = (batch[name].repeat(50, 1) for name in ("input_ids", "position_ids"))
    shown, labels = mask(ids, positions, 0.3, MASK, 64, draw)
    hidden = labels != -100
    assert not hidden[positions == 0].any()
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(shown[~hidden], ids[~hidden])
    assert hidden[positions > 0].float().mean() == pytest.approx(0.3, abs=0.03)
    assert (shown[hidden] == MASK).float().mean() == pytest.approx(0.8, abs=0.05)


def test_the_share_of_masked_steps_moves_from_start_to_end(model: MemGPTForCausalLM, batch) -> None:
    mixed = objective(masked_share_start=0.0, masked_share_end=1.0)
    causal = objective()(model, batch, 0)
    masked = [not torch.allclose(mixed(model, batch, step), causal) for step in range(100)]
    assert sum(masked[:25]) < sum(masked[25:75]) / 2 < sum(masked[75:])
    assert 35 < sum(masked) < 65


def test_a_masked_token_is_read_from_both_sides(model: MemGPTForCausalLM, batch) -> None:
    ids, positions = batch["input_ids"], batch["position_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 5] = ids[:, 5]
    shown = ids.clone()
    shown[:, 5] = MASK
    changed = shown.clone()
    changed[:, 9] = 3  # later in the same document
    elsewhere = shown.clone()
    elsewhere[:, 20] = 3  # in the other document of the row
    losses = [
        next_token_loss(model, x, positions, labels, 0.0, attention_mode="bidirectional")
        for x in (shown, changed, elsewhere)
    ]
    assert losses[0] != losses[1]
    assert torch.allclose(losses[0], losses[2], atol=1e-6)


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_a_compiled_step_is_one_graph_and_learns_the_same(model: MemGPTForCausalLM, batch, masked: float) -> None:
    give_memory(model)
    plain = objective(masked_share_start=masked, masked_share_end=masked)
    compiled = objective(masked_share_start=masked, masked_share_end=masked, compile=True)
    # Every break would be an error; and without the minute that generating code takes.
    compiled.loss = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True, dynamic=False)
    for_pretraining(model, plain.params)  # makes the tables' gradients sparse
    losses, gradients = [], []
    for loss in (plain, compiled):
        model.zero_grad()
        losses.append(loss(model, batch, 0))
        losses[-1].backward()
        gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert any("memory_table" in name for name in gradients[1])


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_read_document_by_document_a_step_learns_the_same(model: MemGPTForCausalLM, batch, masked: float) -> None:
    """As on a GPU, where packed rows become one."""
    give_memory(model)
    objectives = [objective(masked_share_start=masked, masked_share_end=masked) for _ in range(2)]
    for_pretraining(model, objectives[0].params)
    losses, gradients = [], []
    for loss, attention in zip(objectives, ("sdpa", "text_by_text"), strict=True):
        model.set_attn_implementation(attention)
        model.zero_grad()
        losses.append(loss(model, batch, 0))
        losses[-1].backward()
        gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_what_a_gpu_compiles_for_its_steps_is_gone_after_training(
    model: MemGPTForCausalLM, batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch that a GPU takes, on the CPU: document by document, and compiled block by block."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    graphs: list[torch.fx.GraphModule] = []
    plain = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, dynamic: plain(part, dynamic=dynamic, backend=backend))
    loss = objective(compile=True, batch_size=2, checkpoint_steps=100)
    loss.loss = loss._prepare(model, torch.device("cuda"))
    rows = [{name: values[row] for name, values in batch.items()} for row in range(2)]
    steps: list[float] = []
    train(
        model,
        rows,
        default_collate,
        loss.params,
        steps=2,
        checkpoints=tmp_path,
        title="pretrain",
        loss=loss,
        log=lambda numbers, step: steps.append(numbers["loss"]),
    )
    assert len(steps) == 2 and steps[0] != steps[1]
    made = len(graphs)
    assert made >= 3, "the hashes, and a local and a global block"
    model(**{name: values[:, :20] for name, values in batch.items()})
    assert len(graphs) == made
