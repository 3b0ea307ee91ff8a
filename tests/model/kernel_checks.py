"""The GPU kernels against the plain PyTorch beside them, both passes. tests/model/test_kernels.py runs this file: on a
GPU as it is, elsewhere under Triton's interpreter, which must be chosen before Triton is imported.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from memories import give_memory

from memgpt import objectives
from memgpt.model import MemGPTConfig, MemGPTForCausalLM, kernels
from memgpt.model.kernels import memory as fused
from memgpt.model.memory import KnowledgeMemory, look_up, make_table, row_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _serve_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "serve", lambda *_, **__: True)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "serve", lambda *_, **__: False)


def agree(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """As far apart as `tolerance` of the reference's largest element, at most."""
    assert ours.shape == reference.shape
    reference = reference.float()
    assert (ours.float() - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(("width", "reads", "dtype"), [(12, 3, torch.float32), (8, 2, torch.bfloat16)])
def test_rows_are_looked_up_and_their_gradients_added_up(width: int, reads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, width, padding_idx=0, sparse=True, device=DEVICE)
    addresses = torch.randint(0, 50, (3, 137, reads), device=DEVICE)
    addresses[0] = 7  # more often than a small program adds up
    addresses[1, ::2] = 0
    ours = fused.look_up(table.weight, addresses, dtype)
    reference = table(addresses).flatten(-2).to(dtype)
    agree(ours, reference, 0 if dtype == torch.float32 else 2**-7)  # the interpreter cuts off where a GPU rounds
    gradient = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, table.weight, gradient)
    (expected,) = torch.autograd.grad(reference, table.weight, gradient)
    assert found.is_sparse
    assert torch.equal(found._indices(), expected.coalesce().indices())
    agree(found._values(), expected.coalesce().values(), 1e-5)


def test_padding_alone_changes_no_row() -> None:
    table = torch.nn.Embedding(5, 4, padding_idx=0, device=DEVICE)
    fused.look_up(table.weight, torch.zeros(1, 3, 2, dtype=torch.long, device=DEVICE), torch.float32).sum().backward()
    assert table.weight.grad._nnz() == 0


def test_look_ups_in_16_bits_of_a_table_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autocast that the Trainer uses: rows leave the table rounded, their gradients are added in 32 bits."""
    table = make_table(MemGPTConfig(memory_rows=9, memory_dim=8)).to(DEVICE)
    table.sparse = True
    addresses = torch.randint(0, 50, (1, 8, 6), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        entry = look_up(table, addresses)
    assert entry.dtype == torch.bfloat16
    entry.sum().backward()
    assert table.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("kernel", "width", "dtype", "packed"),
    [
        (4, 24, torch.float32, True),
        (0, 16, torch.float32, False),
        (2, 130, torch.float32, False),
        (4, 32, torch.bfloat16, True),
    ],
)
def test_the_memory_is_the_same(
    kernel: int, width: int, dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    shape = dict(hidden_size=width, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    config = MemGPTConfig(**shape, memory_rows=9, memory_dim=4, memory_kernel=kernel)
    memory = KnowledgeMemory(config)
    memory.table = make_table(config)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.5)
    memory.to(DEVICE, dtype).table.sparse = True
    batch, length = 2, 19
    positions = torch.arange(length, device=DEVICE)
    positions = torch.stack((positions % 7, positions % 5)) if packed else positions[None]
    addresses = torch.randint(0, 50, (batch, memory.lead + length, 6), device=DEVICE)
    hidden = torch.randn(batch, length, width, device=DEVICE, dtype=dtype)
    gradient = torch.randn_like(hidden)

    def passes(memory: KnowledgeMemory) -> tuple[torch.Tensor, ...]:
        start = hidden.clone().requires_grad_()
        out = memory(start, look_up(memory.table, addresses), positions)
        out.backward(gradient)
        grads = {name: parameter.grad.to_dense() for name, parameter in memory.named_parameters()}
        return out, start.grad, *(grads[name] for name in sorted(grads))

    ours = passes(copy.deepcopy(memory))
    plain(monkeypatch)
    for found, expected in zip(ours, passes(memory), strict=True):
        agree(found, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_compiled_code_calls_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    memory = KnowledgeMemory(MemGPTConfig(hidden_size=16, memory_dim=4, memory_rows=31)).to(DEVICE)
    torch.nn.init.normal_(memory.taps)
    hidden, entry = torch.randn(2, 9, 16, device=DEVICE), torch.randn(2, memory.lead + 9, 24, device=DEVICE)
    positions = torch.arange(9, device=DEVICE)[None]

    def passes(memory: torch.nn.Module) -> list[torch.Tensor]:
        start = hidden.clone().requires_grad_()
        memory.zero_grad()
        out = memory(start, entry, positions)
        out.square().sum().backward()
        return [out, start.grad, *(parameter.grad for parameter in memory.parameters())]

    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() as watched:
        ours = passes(compiled)
    assert any("gated_convolution_backward" in event.key for event in watched.key_averages())
    plain(monkeypatch)
    for found, expected in zip(ours, passes(memory), strict=True):
        agree(found, expected, 1e-5)


def test_a_gradient_is_taken_as_coalesced_only_as_it_was_made() -> None:
    table = torch.nn.Embedding(9, 4, padding_idx=0, device=DEVICE)
    addresses = torch.tensor([[[1, 3], [3, 8]]], device=DEVICE)

    def read() -> None:
        fused.look_up(table.weight, addresses, torch.float32).sum().backward()

    read()
    assert not table.weight.grad.is_coalesced(), "autograd has learnt to remember: row_gradient is not needed"
    assert row_gradient(table.weight)._indices().tolist() == [[1, 3, 8]]
    assert row_gradient(table.weight).values()[:, 0].tolist() == [1, 2, 1]
    read()  # adds to what is there
    assert row_gradient(table.weight).values()[:, 0].tolist() == [2, 4, 2]


@pytest.mark.parametrize(("length", "context", "longest"), [(70, 0, 3), (1, 40, 4), (9, 600, 1)])
def test_what_is_recalled(length: int, context: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and places alike, with padding and masks, several documents in a row, and tokens before it."""
    made = model(recall_length=longest, recall_window=37).model
    ids = torch.randint(0, 7, (3, context + length), device=DEVICE)
    positions = (torch.arange(context, context + length, device=DEVICE) % 53)[None]
    read = made.ngram_hash, ids[:, context:], positions, ids[:, :context] if context else None
    ours = made.recall.look_back(*read)
    plain(monkeypatch)
    tokens, lengths = made.recall.look_back(*read)
    assert torch.equal(ours[1], lengths)
    assert torch.equal(ours[0], tokens)
    assert lengths.any()


def model(**changes) -> MemGPTForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=70, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4)
    made = MemGPTForCausalLM(MemGPTConfig(**shape, memory_rows=31, memory_dim=4, **changes)).to(DEVICE)
    give_memory(made)
    made.model.memory_table.sparse = True
    return made


def test_decoding_with_a_cache_reads_what_one_pass_reads() -> None:
    made = model().eval()
    ids = torch.randint(3, 70, (2, 9), device=DEVICE)
    with torch.no_grad():
        whole = made(ids).logits
        first = made(ids[:, :5], use_cache=True)
        rest = [first.logits]
        for at in range(5, 9):
            step = made(ids[:, at : at + 1], past_key_values=first.past_key_values, use_cache=True)
            rest.append(step.logits)
    agree(torch.cat(rest, dim=1), whole, 1e-5)


def test_offloaded_weights_are_brought() -> None:
    made = model().eval()
    made.model.memory_table.sparse = False  # as a model that does not learn has it
    ids = torch.randint(3, 70, (2, 9), device=DEVICE)
    with torch.no_grad():
        before = made(ids).logits
        cpu_offload(made, execution_device=torch.device(DEVICE))
        agree(made(ids).logits, before, 1e-5)


@pytest.mark.skipif(not kernels.LIGER, reason="liger-kernel is not installed")
@pytest.mark.parametrize(("autocast", "count"), [(False, None), (True, 40.0)])
def test_the_fused_loss_is_the_plain_one(autocast: bool, count: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(monkeypatch)
    made = model()
    ids = torch.randint(3, 70, (2, 11), device=DEVICE)
    labels = ids.masked_fill(torch.rand(ids.shape, device=DEVICE) < 0.3, -100)
    positions = torch.arange(11, device=DEVICE)[None].expand(2, -1) % 8
    divisor = None if count is None else torch.tensor(count, device=DEVICE)

    def passes() -> list[torch.Tensor]:
        made.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = objectives.next_token_loss(made, ids, positions, labels, 0.1, divisor)
        loss.backward()
        return [loss, *(parameter.grad.to_dense() for parameter in made.parameters())]

    monkeypatch.setattr(objectives, "_fuses", lambda *_: False)
    expected = passes()
    monkeypatch.setattr(objectives, "_fuses", lambda *_: True)
    for found, wanted in zip(passes(), expected, strict=True):
        agree(found, wanted, 3e-2 if autocast else 1e-5)
