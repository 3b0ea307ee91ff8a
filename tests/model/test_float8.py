"""Matrix products in 8 bits: near the others, in the blocks alone, and gone afterwards."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from memgpt import config, distributed
from memgpt.errors import UserError
from memgpt.model import MemGPTConfig, MemGPTForCausalLM
from memgpt.model.kernels import float8
from memgpt.optimizers import for_pretraining
from memgpt.stages import pretrain


@pytest.fixture
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return MemGPTForCausalLM(MemGPTConfig(**shape, memory_rows=97, memory_dim=16))


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao, the extra float8")
def test_a_step_in_8_bits_is_near_one_in_32(model: MemGPTForCausalLM) -> None:
    ids = torch.randint(3, 64, (2, 32))
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), model.model.layers[1].mlp.up_proj.weight.grad.clone()

    loss, gradient = step()
    optimizer = for_pretraining(model, config.load("params.yaml").pretrain)
    with float8.products(model, emulate=True):
        replaced = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
        found, near = step()
        optimizer.step()
    assert replaced == linears - {"lm_head"}
    assert found != loss
    torch.testing.assert_close(found, loss, rtol=5e-3, atol=0)
    assert (near - gradient).norm() < 0.1 * gradient.norm()
    assert linears == {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert step()[0] < loss  # what was learnt in 8 bits stays


def test_without_such_a_gpu_a_line_says_so_and_without_torchao_an_error(
    model: MemGPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = config.load("params.yaml").pretrain.model_copy(update={"float8": True})
    told: list[str] = []
    monkeypatch.setattr(distributed, "print_once", told.append)
    monkeypatch.setattr(float8, "available", lambda: False)
    with pretrain._products(model, params):
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert "no GPU that multiplies in 8 bits" in told[0]
    monkeypatch.setattr(float8, "available", lambda: True)
    monkeypatch.setattr(pretrain, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[float8\]' in the checkout"):
        pretrain._products(model, params)
