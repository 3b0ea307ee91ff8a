"""Recall: it finds what a search by hand finds, in every way of reading, and starts as nothing."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from memories import give_memory
from safetensors.torch import load_file, save_file

from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTForMaskedLM

PAD, MASK = 0, 2


def small(**changes: object) -> MemGPTForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2, memory_rows=64, memory_dim=4)
    return MemGPTForCausalLM(MemGPTConfig(**{**shape, "recall_length": 3, "recall_window": 7, **changes})).eval()


def by_hand(ids: list[int], starts: list[int], longest: int, window: int) -> list[tuple[int, int]]:
    """(token, length of its run) for each place; a token where there is none is −1."""
    found = []
    for place in range(len(ids)):
        first = max(start for start in starts if start <= place)
        best = (0, 0, -1)
        for back in range(1, min(window, place - first) + 1):
            run = 0
            while (
                run < longest
                and place - back - run >= first
                and ids[place - run] == ids[place - back - run]
                and ids[place - run] not in (PAD, MASK)
            ):
                run += 1
            follower = ids[place - back + 1]
            if follower not in (PAD, MASK):
                best = max(best, (run, -back, follower))
        found.append((best[2], best[0]) if best[0] else (-1, 0))
    return found


def test_it_finds_the_longest_run_and_of_these_the_nearest() -> None:
    model = small()
    ids = torch.randint(0, 6, (3, 60))  # padding and masks among them
    positions = torch.cat((torch.arange(37), torch.arange(23)))[None]
    tokens, lengths = model.model.recall.look_back(model.model.ngram_hash, ids, positions)
    for row in range(3):
        expected = by_hand(ids[row].tolist(), [0, 37], longest=3, window=7)
        told = zip(tokens[row].tolist(), lengths[row].tolist(), strict=True)
        assert [(token if length else -1, length) for token, length in told] == expected
    assert {1, 2, 3} <= set(lengths.unique().tolist())


def test_spellings_of_a_word_are_one_and_what_followed_is_as_it_was_written() -> None:
    model = small()
    model.model.ngram_hash.canonical_ids[4] = 3
    tokens, lengths = model.model.recall.look_back(
        model.model.ngram_hash, torch.tensor([[3, 5, 6, 4]]), torch.arange(4)[None]
    )
    assert (tokens[0, 3], lengths[0].tolist()) == (5, [0, 0, 0, 1])


def test_in_pieces_it_recalls_what_it_recalls_at_once() -> None:
    model = small()
    give_memory(model)
    ids = torch.randint(3, 7, (2, 40))
    whole = model(ids).logits
    cache, pieces = None, []
    for first, last in ((0, 9), (9, 10), (10, 30), (30, 31), (31, 40)):
        found = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        pieces.append(found.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert model.model.context == 7 + 3 - 1


def test_padding_and_neighbouring_documents_change_nothing() -> None:
    model = small()
    give_memory(model)
    first, second = torch.randint(3, 7, (1, 20)), torch.randint(3, 7, (1, 15))
    alone = [model(ids).logits for ids in (first, second)]
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(20), torch.arange(15)))[None]
    torch.testing.assert_close(model(packed, position_ids=positions).logits, torch.cat(alone, dim=1))
    padded = torch.nn.functional.pad(second, (5, 0), value=PAD)
    shown = (padded != PAD).long()
    position_ids = (shown.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=shown, position_ids=position_ids).logits[:, 5:]
    torch.testing.assert_close(found, alone[1])


def test_what_comes_later_is_not_recalled() -> None:
    model = small(recall_window=64)
    give_memory(model)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 3, MASK]])
    tokens, lengths = model.model.recall.look_back(model.model.ngram_hash, ids, torch.arange(8)[None])
    assert (tokens[0, 6], lengths[0].tolist()) == (4, [0] * 6 + [1, 0])
    other = ids.clone()
    other[0, 7] = 9
    torch.testing.assert_close(model(other).logits[:, :7], model(ids).logits[:, :7])


def test_it_starts_as_nothing_and_learns_from_the_first_step() -> None:
    model = small()
    ids = torch.randint(3, 7, (2, 30))
    with_recall = model(ids, labels=ids)
    with_recall.loss.backward()
    assert model.model.recall.value.weight.grad.abs().max() > 0
    model.model.recall = None
    torch.testing.assert_close(model(ids).logits, with_recall.logits, rtol=0, atol=0)


def test_without_a_memory_there_is_none_unless_it_is_asked_for() -> None:
    assert small(memory_layers=[], recall_length=None).model.recall is None
    assert small(recall_length=None).config.recall_length == 4
    assert small(memory_layers=[], recall_length=2).model.recall is not None
    with pytest.raises(StrictDataclassError, match="recall_window=0 must be 1 or more"):
        small(recall_window=0)


def test_a_checkpoint_from_before_answers_as_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small()
    give_memory(model)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({k: v for k, v in load_file(file).items() if ".recall." not in k}, file, {"format": "pt"})
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in settings.items() if not k.startswith("recall_")}))
    capfd.readouterr()
    older = MemGPTForCausalLM.from_pretrained(tmp_path).eval()
    told = capfd.readouterr()
    assert "MISSING" not in told.out + told.err
    model.model.recall = None
    ids = torch.randint(3, 7, (2, 20))
    torch.testing.assert_close(older(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_it_learns_to_copy_what_attention_alone_does_not() -> None:
    """Random tokens, then the same again: 80 steps teach a model with recall to repeat them."""
    losses = {}
    for longest in (0, 2):
        model = small(vocab_size=64, recall_length=longest, recall_window=32).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(80):
            half = torch.randint(3, 64, (16, 12))
            labels = torch.cat((torch.full_like(half, -100), half), dim=1)
            loss = model(torch.cat((half, half), dim=1), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[longest] = loss.item()
    assert losses[2] < 1.0 < 3.0 < losses[0], losses


def test_masked_models_recall_too() -> None:
    torch.manual_seed(0)
    model = MemGPTForMaskedLM(small().config).eval()
    give_memory(model)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 3, MASK]])
    with_recall = model(ids).logits
    model.model.recall = None
    assert not torch.allclose(model(ids).logits[0, 7], with_recall[0, 7])
