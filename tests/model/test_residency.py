"""Where a table is kept does not change the answers, and a mapped one does not come into the process."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memories import give_memory
from transformers import AutoModelForCausalLM

from memgpt.model import MemGPTConfig, MemGPTForCausalLM, MemGPTForTokenClassification, MemGPTModel
from memgpt.model.residency import HostTable, dequantise, load, place, prefetch, quantise

SHAPE = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    memory_layers=[0, 2],
    memory_ngrams=[2, 3],
    memory_heads=2,
    memory_rows=997,
    memory_dim=5,
)


@pytest.fixture(scope="module")
def model() -> MemGPTForCausalLM:
    torch.manual_seed(0)
    model = MemGPTForCausalLM(MemGPTConfig(**SHAPE)).eval()
    give_memory(model)
    return model


@pytest.fixture(scope="module")
def directory(model: MemGPTForCausalLM, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("memory", ["resident", "mapped", "host"])
def test_the_logits_are_the_same(memory, model, directory: Path, ids: torch.Tensor) -> None:
    loaded = load(MemGPTForCausalLM, directory, memory)
    assert type(loaded) is MemGPTForCausalLM
    assert not loaded.training
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    settings = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_int8_rows_are_within_their_bound(model, directory: Path, ids: torch.Tensor) -> None:
    rows = torch.randn(1000, 7) * 10.0 ** torch.randint(-30, 30, (1000, 1))
    rows[3] = 0
    error = (dequantise(quantise(rows), torch.float32) - rows).abs()
    assert (error <= rows.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    assert torch.equal(dequantise(quantise(rows), torch.float32)[3], rows[3])
    exact = logits(model, ids)
    loaded = load(MemGPTForCausalLM, directory, "int8")
    assert loaded.model.memory_table.weight.dtype == torch.int8
    assert 0 < (logits(loaded, ids) - exact).abs().max() / exact.std() < 0.03  # as the docs say
    placed = place(load(MemGPTForCausalLM, directory), "int8")
    assert torch.equal(logits(placed, ids), logits(loaded, ids))


def test_int8_rows_are_saved_and_loaded_in_every_way(directory: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    int8 = load(MemGPTForCausalLM, directory, "int8")
    int8.save_pretrained(tmp_path)
    size = [(path / "model.safetensors").stat().st_size for path in (tmp_path, directory)]
    table = 1 + 4 * 997
    assert size[1] - size[0] == pytest.approx(table * (20 - 9), rel=0.01)
    expected = logits(int8, ids)
    for memory in ("resident", "mapped", "int8", "host"):
        assert torch.equal(logits(load(MemGPTForCausalLM, tmp_path, memory), ids), expected), memory
    learning = load(MemGPTForCausalLM, tmp_path, "resident").train()
    learning(ids, labels=ids).loss.backward()
    assert learning.model.memory_table.weight.grad[1:].abs().sum() > 0
    with pytest.raises(Exception, match="mismatch"):  # never silently without its tables
        MemGPTForCausalLM.from_pretrained(tmp_path)


def test_tables_in_shards_other_heads_and_precisions(model, ids: torch.Tensor, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(MemGPTForCausalLM, sharded, "mapped"), ids), logits(model, ids))
    tagger = load(MemGPTForTokenClassification, sharded, "mapped", num_labels=7)
    assert logits(tagger, ids).shape == (2, 40, 7)
    trunk = load(MemGPTModel, sharded, "mapped")
    with torch.no_grad():
        assert torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)
    load(MemGPTForCausalLM, sharded, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    half = load(MemGPTForCausalLM, tmp_path / "half", "mapped")
    assert half.dtype == half.model.memory_table.stored.dtype == torch.bfloat16
    assert torch.equal(logits(half, ids), logits(MemGPTForCausalLM.from_pretrained(tmp_path / "half"), ids))
    assert logits(half.float(), ids).dtype == torch.float32


def test_rows_past_the_held_part_are_the_same(model, directory: Path, ids: torch.Tensor) -> None:
    """None of the file may stay; then one block of 64 KiB, which holds part of the rows."""
    for held in (0, 1 << 16):
        loaded = load(MemGPTForCausalLM, directory, "mapped", held_bytes=held)
        for _ in range(2):
            assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("memory", ["mapped", "host", "int8"])
def test_a_placed_table_goes_with_half_precision_weights(memory, directory: Path, ids: torch.Tensor) -> None:
    """Parameters may be converted one by one, as faster serving does, which leaves buffers as they are."""
    models = [load(MemGPTForCausalLM, directory), load(MemGPTForCausalLM, directory, memory)]
    for loaded in models:
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    expected, found = (logits(loaded, ids).float() for loaded in models)
    assert torch.equal(found, expected) if memory != "int8" else torch.allclose(found, expected, atol=0.1)


def test_from_one_place_to_another(model, directory: Path, ids: torch.Tensor) -> None:
    moved = load(MemGPTForCausalLM, directory, "mapped")
    for memory in ("host", "resident", "host"):
        assert torch.equal(logits(place(moved, memory), ids), logits(model, ids)), memory
    assert isinstance(moved.model.memory_table, HostTable)
    for name, value in moved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_was_fetched_ahead_is_used_only_for_its_ids(directory: Path, ids: torch.Tensor, monkeypatch) -> None:
    host = load(MemGPTForCausalLM, directory, "host")
    expected, other = logits(host, ids), logits(host, ids.flip(1))
    gathered = []
    gather = HostTable._gather
    monkeypatch.setattr(HostTable, "_gather", lambda self, rows: (gathered.append(len(rows)), gather(self, rows))[1])
    prefetch(host, ids)
    assert len(gathered) == 1
    assert torch.equal(logits(host, ids), expected)
    assert len(gathered) == 1  # nothing was fetched again
    prefetch(host, ids)
    assert torch.equal(logits(host, ids.flip(1)), other)
    assert torch.equal(logits(host, ids), expected)


@pytest.mark.parametrize("memory", ["mapped", "int8", "host"])
def test_compiled_code_reads_the_same_rows(memory, directory: Path, ids: torch.Tensor) -> None:
    loaded = load(MemGPTForCausalLM, directory, memory)
    expected = logits(loaded, ids)
    loaded.model.read_memory = torch.compile(loaded.model.read_memory, backend="eager")
    assert torch.allclose(logits(loaded, ids), expected, atol=1e-5)


@pytest.mark.parametrize("memory", ["mapped", "int8", "host"])
def test_such_a_model_does_not_learn(memory, directory: Path) -> None:
    loaded = load(MemGPTForCausalLM, directory, memory)
    with pytest.raises(ValueError, match="memory='resident'"):
        loaded.train()
    assert not any("memory_table" in name for name, _ in loaded.named_parameters())


def test_a_mapped_model_is_not_saved_without_its_tables(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mapped"):
        load(MemGPTForCausalLM, directory, "mapped").save_pretrained(tmp_path)


def changed(directory: Path, target: Path, edit) -> Path:
    """A copy with the header of the weights edited."""
    shutil.copytree(directory, target)
    file = target / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return target


@pytest.mark.parametrize("memory", ["mapped", "int8", "host"])
def test_files_that_do_not_fit_are_refused_in_one_line(memory, directory: Path, tmp_path: Path) -> None:
    name = "model.memory_table.weight"

    def refused(path: Path, words: str, **settings) -> None:
        with pytest.raises(ValueError, match=words) as error:
            load(MemGPTForCausalLM, path, memory, **settings)
        assert "\n" not in str(error.value)

    refused(directory, "shape", memory_rows=998)
    refused(tmp_path, "model.safetensors")
    refused(
        changed(directory, tmp_path / "missing", lambda header: header.update(other=header.pop(name))),
        "table is missing",
    )
    refused(changed(directory, tmp_path / "small", lambda header: header[name].update(shape=[5, 5])), "fill")
    for kept in (4, 100, -1):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(directory, cut)
        weights = (cut / "model.safetensors").read_bytes()
        (cut / "model.safetensors").write_bytes(weights[:kept])
        refused(cut, "not a whole safetensors file")
    (cut / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 100)
    refused(cut, "not a whole safetensors file")
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(cut, "gone.safetensors: No such file")
    (cut / "model.safetensors.index.json").write_text("[]")
    refused(cut, "not an index")


def test_words_that_mean_nothing_are_refused(model, directory: Path) -> None:
    with pytest.raises(ValueError, match="resident, mapped, int8, host"):
        load(MemGPTForCausalLM, directory, "disk")
    with pytest.raises(ValueError, match="save the model"):
        place(load(MemGPTForCausalLM, directory), "mapped")


def test_a_plain_model_has_nothing_to_keep(ids: torch.Tensor, tmp_path: Path) -> None:
    plain = MemGPTForCausalLM(MemGPTConfig(**{**SHAPE, "memory_layers": []})).eval()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(load(MemGPTForCausalLM, tmp_path, "mapped"), ids), logits(plain, ids))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(plain, ids))


SERVE = """
import sys, torch
from memgpt.model import MemGPTForCausalLM
from memgpt.model.residency import load

def resident():
    _, everything, of_files, *_ = (int(pages) * 4096 for pages in open("/proc/self/statm").read().split())
    return everything, of_files

directory = sys.argv[1]
model = load(MemGPTForCausalLM, directory + "-small", "mapped")
with torch.no_grad():
    model(torch.randint(3, 4000, (1, 512)))  # libraries and buffers are there before the count
    before = resident()
    model = load(MemGPTForCausalLM, directory, "mapped")
    for _ in range(16):
        model(torch.randint(3, 4000, (1, 512)))
print(*(now - then for now, then in zip(resident(), before)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts resident pages as Linux does")
def test_a_mapped_table_stays_out_of_the_process(tmp_path: Path) -> None:
    """64 MB of tables; 8,192 random tokens read 65,536 rows, on most pages of them."""
    shape = {**SHAPE, "vocab_size": 4000, "memory_dim": 32, "max_position_embeddings": 512}
    for name, rows in (("model-small", 100), ("model", 65536)):
        MemGPTForCausalLM(MemGPTConfig(**{**shape, "memory_rows": rows})).save_pretrained(tmp_path / name)
    table = 2 * 4 * 65536 * 32 * 4
    found = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    everything, of_files = (int(size) for size in found.stdout.split())
    assert of_files <= 0.1 * table
    assert everything < 0.5 * table  # nor as a copy; the allocator keeps some of its own
