"""The optimizers of pretraining against what they are defined to do."""

from pathlib import Path

import pytest
import torch

from memgpt import config
from memgpt.model import MemGPTConfig, MemGPTForCausalLM
from memgpt.optimizers import Muon, RowAdagrad, clip_gradients, for_pretraining

ROOT = Path(__file__).parents[1]
SHAPE = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=4, memory_rows=97, memory_dim=4)


@pytest.fixture
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    return MemGPTForCausalLM(MemGPTConfig(**SHAPE, num_hidden_layers=2)).train()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_matrices_of_one_shape_move_together_as_torch_moves_each(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, torchs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(3)] for _ in range(2))
    together, alone = Muon(ours, lr=0.1), torch.optim.Muon(torchs, lr=0.1)
    for _ in range(3):
        for one, other in zip(ours, torchs, strict=True):
            one.grad = torch.randn(shape)
            other.grad = one.grad.clone()
        together.step_together(ours, together.param_groups[0])
        alone.step()
    for one, other in zip(ours, torchs, strict=True):
        assert torch.allclose(one, other, atol=0.01), "the products are in 16 bits"
        assert torch.equal(together.state[one]["momentum_buffer"], alone.state[other]["momentum_buffer"])


def test_a_row_moves_by_its_gradient_over_the_root_of_what_it_has_seen() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowAdagrad(table.parameters(), lr=0.1)
    gradients = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    expected, squares = before.clone(), torch.zeros(5)
    usual = gradients.square().mean()  # the same in every step
    for _ in range(3):
        optimizer.zero_grad()
        (table(torch.tensor([1, 4])) * gradients).sum().backward()
        optimizer.step()
        for row, gradient in zip((1, 4), gradients, strict=True):
            squares[row] += gradient.square().mean()
            expected[row] -= 0.1 * gradient / (squares[row] + 4 * usual).sqrt()
    assert torch.allclose(table.weight, expected)
    assert torch.equal(table.weight[[0, 2, 3]], before[[0, 2, 3]])
    assert sum(value.numel() for value in optimizer.state[table.weight].values()) == 5 + 1


def test_a_row_that_is_written_once_stays_small() -> None:
    table = torch.nn.Embedding(3, 2, sparse=True)
    torch.nn.init.zeros_(table.weight)
    optimizer = RowAdagrad(table.parameters(), lr=0.1)
    for step in range(100):
        optimizer.zero_grad()
        table(torch.tensor([1] if step else [1, 2])).sum().backward()
        optimizer.step()
    often, once = table.weight[1].abs().mean() / 100, table.weight[2].abs().mean()
    assert once < 0.1 / 2, "less than half of a whole step"
    assert often > 0.01 / 2


def test_sparse_and_dense_gradients_move_a_table_alike() -> None:
    tables = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = torch.nn.Embedding(9, 4, sparse=sparse)
        optimizer = RowAdagrad(table.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            table(torch.tensor([1, 1, 7])).square().sum().backward()
            optimizer.step()
        tables.append(table.weight.detach())
    assert torch.allclose(*tables)


def test_each_weight_has_the_optimizer_of_its_kind(model: MemGPTForCausalLM) -> None:
    optimizer = for_pretraining(model, config.load(ROOT / "params.yaml").pretrain)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {
        type(part).__name__: [names[id(p)] for group in part.param_groups for p in group["params"]]
        for part in optimizer.optimizers
    }
    assert sorted(name for group in kinds.values() for name in group) == sorted(names.values())
    gated = ("memory.key", "memory.value", "recall.key", "recall.value")
    assert all("proj" in name or any(part in name for part in gated) for name in kinds["Muon"])
    assert kinds["RowAdagrad"] == ["model.memory_table.weight"]
    assert "model.embed_tokens.weight" in kinds["AdamW"]


def test_saved_and_restored_it_goes_on_as_undisturbed(model: MemGPTForCausalLM, tmp_path: Path) -> None:
    params = config.load(ROOT / "params.yaml").pretrain
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))

    def steps(model: MemGPTForCausalLM, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    optimizer = for_pretraining(model, params)
    steps(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    steps(model, optimizer, 2)

    state = torch.load(tmp_path / "state", weights_only=True)
    again = MemGPTForCausalLM(model.config).train()
    again.load_state_dict(state["model"])
    restored = for_pretraining(again, params)
    restored.load_state_dict(state["optimizer"])
    steps(again, restored, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_many_touched_rows_do_not_shorten_the_step_of_the_matrices() -> None:
    dense, table = torch.nn.Parameter(torch.zeros(2)), torch.nn.Embedding(4, 2, sparse=True)
    (dense * torch.tensor([0.6, 0.0])).sum().backward()
    (table(torch.tensor([0, 1, 1])) * 100).sum().backward()
    clip_gradients([dense, table.weight], max_norm=1.0)
    assert torch.allclose(dense.grad, torch.tensor([0.6, 0.0]))
    assert table.weight.grad.coalesce().values().norm() == pytest.approx(1.0, abs=1e-4)
