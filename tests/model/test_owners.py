"""Rows of the memory that belong to one n-gram each: who gets them, and what all others read."""

from collections import Counter, defaultdict

import pytest
import torch
from memories import give_memory
from safetensors.torch import load_file, save_file

from memgpt.model import MemGPTConfig, MemGPTForCausalLM, inspection
from memgpt.model.memory import FREE

SHAPE = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, memory_rows=31
)


@pytest.fixture
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    made = MemGPTForCausalLM(MemGPTConfig(**SHAPE, memory_dim=4)).eval()
    give_memory(made)
    return made


def text(seed: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Packed rows of two documents each, over few words, so that n-grams recur."""
    draw = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, 24, generator=draw).square() * 30).long() + 5
    return {"input_ids": ids, "position_ids": (torch.arange(24) % 13).expand(rows, -1)}


def addresses(model: MemGPTForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hash_ = model.model.ngram_hash
    return hash_(**batch)[:, hash_.lead :]


@pytest.mark.parametrize("least", [1, 2, 3])
def test_a_row_is_its_most_frequent_ngrams_alone(least: int, model: MemGPTForCausalLM) -> None:
    parts, hash_ = [text(1), text(2)], model.model.ngram_hash
    shared = [addresses(model, part) for part in parts]
    counts: dict[int, Counter] = defaultdict(Counter)
    names: list[list[tuple[int, int, int, tuple[int, ...]]]] = [[], []]  # row of text, place, head, n-gram
    for which, (part, rows) in enumerate(zip(parts, shared, strict=True)):
        for i, j, k in rows.nonzero().tolist():
            n = hash_.ngrams[k // hash_.heads]
            ngram = tuple(part["input_ids"][i, j - n + 1 : j + 1].tolist())
            counts[int(rows[i, j, k])][ngram] += 1
            names[which].append((i, j, k, ngram))
    hash_.claim(parts, least)
    readers: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for part, rows, named in zip(parts, shared, names, strict=True):
        owned = addresses(model, part)
        assert torch.equal(owned[rows == 0], rows[rows == 0])
        for i, j, k, ngram in named:
            if owned[i, j, k]:
                assert owned[i, j, k] == rows[i, j, k]
                readers[int(rows[i, j, k])].add(ngram)
    for row, found in counts.items():
        most = max(found.values())
        assert len(readers[row]) == (most >= least)
        assert all(found[ngram] == most for ngram in readers[row])


def test_what_was_not_learned_reads_nothing(model: MemGPTForCausalLM) -> None:
    other = text(3)
    other["input_ids"] = other["input_ids"].flip(1)
    before = model(**other).logits
    model.model.ngram_hash.claim([text(1)], 10**6)
    assert (model.model.ngram_hash.owners[1:] == FREE).all()
    assert not addresses(model, other).any()
    model.model.memory_table.weight.data.normal_()
    model.model.memory_table.weight.data[0] = 0
    silent = model(**other).logits
    assert not torch.allclose(silent, before)
    model.model.memory_table.weight.data.zero_()
    assert torch.equal(model(**other).logits, silent)


def test_later_text_gets_what_is_free(model: MemGPTForCausalLM, tmp_path) -> None:
    hash_ = model.model.ngram_hash
    hash_.claim([text(1)], 3)
    first = hash_.owners.clone()
    assert (first == FREE).any()
    model.save_pretrained(tmp_path)
    loaded = MemGPTForCausalLM.from_pretrained(tmp_path).model.ngram_hash
    assert torch.equal(loaded.owners, first)
    loaded.claim([text(2)], 2)
    assert torch.equal(loaded.owners[first > 0], first[first > 0])
    assert (loaded.owners[first == FREE] > 0).any()


def test_what_was_learned_in_shared_rows_stays(model: MemGPTForCausalLM) -> None:
    table, hash_ = model.model.memory_table, model.model.ngram_hash
    read = addresses(model, text(1)).unique()
    with torch.no_grad():
        table.weight[torch.isin(torch.arange(len(table.weight)), read, invert=True)] = 0
    before, known = model(**text(1)).logits, read[read > 0]
    hash_.claim([text(2)], 2, table.weight.any(dim=1))
    assert (hash_.owners[known] == 0).all() and (hash_.owners > 0).any()
    assert torch.equal(model(**text(1)).logits, before)


def test_a_checkpoint_from_before_owners_shares_its_rows(model: MemGPTForCausalLM, tmp_path, capfd) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.ngram_hash.owners"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    loaded = MemGPTForCausalLM.from_pretrained(tmp_path)
    assert "MISSING" not in capfd.readouterr().err
    assert torch.equal(loaded(**text(1)).logits, model(**text(1)).logits)


def test_the_order_and_cut_of_the_text_do_not_matter(model: MemGPTForCausalLM) -> None:
    hash_, whole = model.model.ngram_hash, text(4, rows=12)
    hash_.claim([whole], 2)
    owners = hash_.owners.clone()
    hash_.owners.zero_()
    hash_.claim([{name: values[i : i + 5] for name, values in whole.items()} for i in (10, 5, 0)], 2)
    assert torch.equal(hash_.owners, owners)


def test_decoding_reads_what_one_pass_reads(model: MemGPTForCausalLM) -> None:
    batch = text(1)
    model.model.ngram_hash.claim([batch], 2)
    ids = batch["input_ids"][:2, :12]
    whole = model.generate(ids, use_cache=False, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), whole)
    at, positions = addresses(model, {"input_ids": whole, "position_ids": torch.arange(18)[None]}), torch.arange(18)
    for place in range(1, 18):
        context = whole[:, max(0, place - model.model.context) : place]
        hash_ = model.model.ngram_hash
        step = hash_(whole[:, place : place + 1], positions[None, place : place + 1], context)
        assert torch.equal(step[:, hash_.lead :][:, 0], at[:, place])


def test_owned_rows_do_not_collide(model: MemGPTForCausalLM) -> None:
    parts = [text(1)]
    crowded = inspection.usage(model, parts)
    assert all(record["colliding"] > 0 for record in crowded)
    model.model.ngram_hash.claim(parts, 2)
    owned = inspection.usage(model, parts)
    assert all(record["colliding"] == record["inseparable"] == 0 for record in owned)
    assert all(0 < after["ngrams"] < before["ngrams"] for before, after in zip(crowded, owned, strict=True))
