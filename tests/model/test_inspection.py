"""A look inside the memory: what is said of it is what the forward pass did."""

import pytest
import torch
from memories import give_memory

from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTTokenizer, canonical_ids
from memgpt.model.inspection import explain, usage
from memgpt.model.memory import NGramHash

TEXT = "The bank raised its rates. the bank kept its rates."


@pytest.fixture(scope="module")
def tokenizer() -> MemGPTTokenizer:
    return MemGPTTokenizer.train([TEXT] * 4, vocab_size=300)


@pytest.fixture
def model(tokenizer: MemGPTTokenizer) -> MemGPTForCausalLM:
    torch.manual_seed(0)
    model = MemGPTForCausalLM(
        MemGPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            memory_rows=997,
            memory_dim=4,
            memory_ngrams=[2, 3],
        )
    ).eval()
    model.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer))
    give_memory(model)
    return model


def test_every_token_is_explained_in_every_memory_layer(model, tokenizer) -> None:
    records = [r for r in explain(model, tokenizer, TEXT) if r["layer"] != "recall"]
    ids = tokenizer(TEXT)["input_ids"]
    assert [(r["position"], r["layer"]) for r in records] == [(p, layer) for p in range(len(ids)) for layer in (0, 2)]
    assert "".join(r["token"] for r in records if r["layer"] == 0) == TEXT.replace(" ", "")
    last = records[-1]
    assert [gram["n"] for gram in last["ngrams"]] == [2, 3]
    assert all(TEXT.endswith(gram["text"].strip()) for gram in last["ngrams"])
    assert [gram["n"] for gram in records[0]["ngrams"]] == [2]  # only the end token comes before the first
    assert all(0 < r["gate"] < 2 for r in records)


def test_strength_is_what_the_memory_changes(model, tokenizer) -> None:
    """Against the definition: hidden states before and after the memory of the first block."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]])
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    recall = model.model.recall
    tokens, lengths = recall.look_back(model.model.ngram_hash, ids, positions)
    hidden = hidden + recall(hidden, model.model.embed_tokens(tokens), lengths, positions)
    addresses = model.model.ngram_hash(ids, positions)
    added = model.model.layers[0].memory(hidden, model.model.read_memory(ids, positions), positions)
    expected = (added.norm(dim=-1) / hidden.norm(dim=-1))[0, 1:]
    records = [r for r in explain(model, tokenizer, TEXT) if r["layer"] == 0]
    assert torch.allclose(torch.tensor([r["strength"] for r in records]), expected, atol=1e-6)
    assert [gram["rows"] for gram in records[-1]["ngrams"]] == addresses[0, -1].reshape(2, 2).tolist()


def test_what_is_recalled_is_explained(model, tokenizer) -> None:
    found = [r for r in explain(model, tokenizer, TEXT) if r["layer"] == "recall"]
    ids = tokenizer(TEXT)["input_ids"]
    assert found
    for record in found:
        assert 0 < record["gate"] < 2 and record["strength"] > 0
        (gram,) = record["ngrams"]
        at = record["position"]
        run, followed = gram["text"].split(" → ")
        assert run == tokenizer.decode(ids[at - gram["n"] + 1 : at + 1])
        assert (run + followed).replace(" ", "").lower() in TEXT.replace(" ", "").lower()


def test_an_emptied_row_falls_silent_where_its_ngram_stands_and_nowhere_else(model, tokenizer) -> None:
    before = [r for r in explain(model, tokenizer, TEXT) if r["layer"] == 0]
    gram = before[-1]["ngrams"][0]
    with torch.no_grad():
        model.model.memory_table.weight[gram["rows"]] = 0
    after = [r for r in explain(model, tokenizer, TEXT) if r["layer"] == 0]
    assert gram["strength"] > 0
    assert after[-1]["ngrams"][0]["strength"] == 0
    assert after[-1]["ngrams"][1]["strength"] > 0
    others = [r for r in before if r["ngrams"] and r["ngrams"][0]["rows"] != gram["rows"]]
    assert all(r["ngrams"] == after[r["position"]]["ngrams"] for r in others)
    same = [r for r in before if r["ngrams"] and r["ngrams"][0]["rows"] == gram["rows"]]
    assert len(same) == 2  # the two sentences end alike


def test_looking_leaves_the_model_as_it_was(model, tokenizer) -> None:
    model.train()
    explain(model, tokenizer, TEXT)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_explained_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="text"):
        explain(model, tokenizer, "")
    plain = MemGPTForCausalLM(MemGPTConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, memory_layers=[]))
    with pytest.raises(ValueError, match="memory_layers"):
        explain(plain, tokenizer, TEXT)


def test_usage_counts_what_a_slow_count_finds(model) -> None:
    """Two batches of random packed text against sets and loops; a small table, so that there are collisions."""
    hash_ = NGramHash(MemGPTConfig(vocab_size=model.config.vocab_size, memory_rows=31, memory_ngrams=[2, 3]))
    hash_.canonical_ids.copy_(model.model.ngram_hash.canonical_ids)
    model.model.ngram_hash = hash_
    model.model.memory_table = torch.nn.Embedding(1 + 4 * 31, 4, padding_idx=0)
    with torch.no_grad():
        model.model.memory_table.weight[1 : 1 + 2 * 31] = 0
    draw = torch.Generator().manual_seed(3)
    batches = [
        {"input_ids": torch.randint(3, 12, (2, 20), generator=draw), "position_ids": torch.arange(10).repeat(2)[None]}
        for _ in range(2)
    ]
    found = {r["n"]: r for r in usage(model, batches)}
    assert set(found) == {2, 3}
    assert found[2]["unlearned"] == found[2]["rows"] == 62
    assert found[3]["unlearned"] == 0
    for i, n in enumerate((2, 3)):
        rows_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        for batch in batches:
            canonical = hash_.canonical_ids[batch["input_ids"]].tolist()
            addresses = hash_(batch["input_ids"], batch["position_ids"])[:, hash_.lead :, 2 * i : 2 * i + 2].tolist()
            for b in range(2):
                for t in (t for t in range(20) if t % 10 >= n - 1):
                    rows_of[tuple(canonical[b][t - n + 1 : t + 1])] = tuple(addresses[b][t])
        record = found[n]
        heads = [[rows[head] for rows in rows_of.values()] for head in range(2)]
        alone = [[head.count(row) == 1 for row in head] for head in heads]
        assert record["ngrams"] == len(rows_of)
        assert record["touched"] == sum(len(set(head)) for head in heads) == record["rows"] - record["dead"]
        assert record["colliding"] == pytest.approx(1 - sum(map(sum, alone)) / (2 * len(rows_of)))
        assert record["inseparable"] == pytest.approx(
            sum(not (a or b) for a, b in zip(*alone, strict=True)) / len(rows_of)
        )
        assert 0 < record["inseparable"] < record["colliding"] < 1
        assert record["load"] == pytest.approx(len(rows_of) / 31)


def test_expected_usage_is_that_of_an_even_hash(model) -> None:
    """Many random n-grams: what is seen must be near what is expected, or the hash is not even."""
    ids = torch.randint(3, 300, (8, 100), generator=torch.Generator().manual_seed(0))
    model.model.ngram_hash.canonical_ids.copy_(torch.arange(model.config.vocab_size))
    for record in usage(model, [{"input_ids": ids % model.config.vocab_size}]):
        assert record["touched"] == pytest.approx(record["expected_touched"], rel=0.05)
        assert record["colliding"] == pytest.approx(record["expected_colliding"], rel=0.15)
