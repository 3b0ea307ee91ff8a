"""Sparse memory updates: the right rows are chosen, and nothing else moves by a bit."""

import copy

import pytest
import torch
from memories import give_memory

from memgpt.model import MemGPTConfig, MemGPTForCausalLM
from memgpt.model.update import choose_rows, count_rows, load_usage, restrict_to_memory, save_usage
from memgpt.optimizers import RowAdagrad

OLD = torch.randint(3, 40, (4, 16), generator=torch.Generator().manual_seed(1))
NEW = torch.cat((OLD[:2], torch.randint(30, 64, (2, 16), generator=torch.Generator().manual_seed(2))))


@pytest.fixture
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    model = MemGPTForCausalLM(
        MemGPTConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            memory_rows=97,
            memory_dim=4,
            memory_ngrams=[2, 3],
        )
    )
    give_memory(model)
    return model


def test_counts_are_of_every_read(model, tmp_path) -> None:
    counts = count_rows(model, [{"input_ids": OLD[:3]}, {"input_ids": OLD[3:]}])
    assert counts.sum() == OLD.numel() * 4  # two orders, two heads
    assert counts[0] == 4 * 2 * (1 + 2)  # the first token of a row ends no pair, the first two no triple
    packed = count_rows(model, [{"input_ids": OLD, "position_ids": torch.arange(8).repeat(2)[None]}])
    assert packed[0] == 2 * counts[0]
    save_usage(counts, tmp_path)
    assert torch.equal(load_usage(tmp_path), counts)


def test_a_missing_count_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"memory_usage\.safetensors: not found"):
        load_usage(tmp_path)


def test_rows_of_the_new_text_are_chosen_before_common_ones() -> None:
    #                   row: 0   1   2   3   4   5
    old = torch.tensor([500, 90, 90, 10, 0, 0])
    new = torch.tensor([500, 60, 30, 30, 0, 3])
    chosen = [choose_rows(new, old, share).nonzero()[:, 0].tolist() for share in (0.25, 0.5, 1.0)]
    assert chosen == [[3], [3, 5], [3, 5]]  # 1 and 2 are the old text's as much, 4 is in neither


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="6 rows were counted"):
        choose_rows(torch.ones(5), torch.ones(6), 0.5)
    with pytest.raises(ValueError, match="share=0"):
        choose_rows(torch.ones(5), torch.ones(5), 0)


@pytest.mark.parametrize(
    ("optimizer_class", "sparse"), [(RowAdagrad, True), (RowAdagrad, False), (torch.optim.AdamW, False)]
)
def test_only_the_chosen_rows_move_and_they_learn(model, optimizer_class, sparse: bool) -> None:
    before = copy.deepcopy(model.state_dict())
    old, new = (count_rows(model, [{"input_ids": ids}]) for ids in (OLD, NEW))
    rows = choose_rows(new, old, 0.5)
    restrict_to_memory(model, rows)
    model.model.memory_table.sparse = sparse
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {} if optimizer_class is RowAdagrad else {"weight_decay": 0.0}
    optimizer = optimizer_class(trained, lr=0.3, **settings)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        for half in NEW.split(2):  # gradients that are accumulated are masked too
            loss = model(half, labels=half).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    for name, value in model.state_dict().items():
        if name.endswith("memory_table.weight"):
            moved = (value != before[name]).any(dim=1)
            assert not (moved & ~rows).any(), name
            assert moved.sum() > 0.8 * rows.sum(), name  # what ends a row predicts nothing
        else:
            assert torch.equal(value, before[name]), name


def test_text_without_a_chosen_row_reads_as_before(model) -> None:
    """What the update is for: old text that shares no row with the new one gets the same logits to the last bit."""
    far = torch.randint(3, 20, (2, 16), generator=torch.Generator().manual_seed(5))
    new = torch.randint(40, 64, (2, 16), generator=torch.Generator().manual_seed(6))
    rows = choose_rows(*(count_rows(model, [{"input_ids": ids}]) for ids in (new, far)), 1.0)
    rows &= count_rows(model, [{"input_ids": far}]) == 0
    before, learned = model(far).logits, model(new).logits
    restrict_to_memory(model, rows)
    optimizer = RowAdagrad([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model(new, labels=new).loss.backward()
    optimizer.step()
    assert torch.equal(model(far).logits, before)
    assert not torch.allclose(model(new).logits, learned, atol=1e-3)


def test_the_whole_memory_can_be_trained_and_nothing_else(model) -> None:
    restrict_to_memory(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"model.memory_table.weight"}
    model(NEW, labels=NEW).loss.backward()
    touched = count_rows(model, [{"input_ids": NEW[:, :-1]}]) > 0  # the last position predicts nothing
    touched[0] = False
    assert torch.equal(model.model.memory_table.weight.grad.any(dim=1) & ~touched, torch.zeros_like(touched))
