"""A memory table divided among two processes is the table that one process has; tests/test_distributed.py trains so."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, clean_environment

CODE = """
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from memgpt import sharding
from memgpt.optimizers import Chained, RowAdagrad, clip_gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
# Of 11 rows the second process has one fewer. In the third step nobody asks for any of them.
asked = [([[1, 9, 10], [0, 9, 9]], [[3, 3, 0]]), ([[6]], [[6, 2, 7, 8]]), ([[1]], [[2]])]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    table = torch.nn.Embedding(11, 4, padding_idx=0, sparse=True)
    table._memory_table = True
    return torch.nn.Sequential(table)


def step(model, optimizer, number, *shares):
    for share in shares:
        rows = model[0](torch.tensor(asked[number][share]))
        assert torch.equal(rows, whole[0](torch.tensor(asked[number][share]))), "rows"
        (rows.square().sum() * (share + 1)).backward()
    if len(shares) == 2:  # the average that two processes would see
        model[0].weight.grad = model[0].weight.grad / 2
    clip_gradients(model.parameters(), 0.5)
    optimizer.step()
    model.zero_grad()


@contextmanager
def alone():
    rank = os.environ.pop("LOCAL_RANK")
    yield
    os.environ["LOCAL_RANK"] = rank


def squares(optimizer, model):
    return optimizer.optimizers[0].state[model[0].weight]["square_sum"]


whole, parted = model(), model()
one, two = (Chained([RowAdagrad(each.parameters(), lr=0.1)]) for each in (whole, parted))
sharding.divide(parted)
own, count = slice(6 * rank, 6 * rank + 6), 6 - rank
assert parted[0].weight.shape == (6, 4)
for number in range(3):
    step(parted, two, number, rank)
    step(whole, one, number, 0, 1)
    torch.testing.assert_close(parted[0].weight[:count], whole[0].weight[own])
    torch.testing.assert_close(squares(two, parted)[:count], squares(one, whole)[own])
    here, there = (each.optimizers[0].state[m[0].weight]["usual"] for each, m in ((one, whole), (two, parted)))
    torch.testing.assert_close(there, here)
    parted[0].weight.data[:count] = whole[0].weight.data[own]  # the last bits
sharding._CHUNK_BYTES = 32  # two rows
of_two, of_one = Path("of two"), Path("of one")
if not rank:
    of_two.mkdir()
    of_one.mkdir()
dist.barrier()
sharding.write(parted, two, of_two)
with sharding.without_rows(parted, two):
    assert "square_sum" not in str(two.state_dict())
    assert not sharding.without_tables(parted)
assert "square_sum" in str(two.state_dict())
dist.barrier()
with alone():
    again = model()
    sharding.divide(again)
    restored = Chained([RowAdagrad(again.parameters())])
    sharding.read(again, restored, of_two)
    assert torch.equal(again[0].weight, whole[0].weight)
    torch.testing.assert_close(squares(restored, again), squares(one, whole))
    if not rank:
        sharding.write(again, restored, of_one)
dist.barrier()
kept = parted[0].weight.data.clone(), squares(two, parted).clone()
parted[0].weight.data.zero_()
sharding.read(parted, two, of_one)
assert torch.equal(parted[0].weight[:count], kept[0][:count])
assert torch.equal(squares(two, parted), kept[1])
held = {path.name: sum(t.nbytes for t in load_file(path).values()) for path in (*of_two.iterdir(), *of_one.iterdir())}
assert held["rows-00001-of-00002.safetensors"] * 11 == held["rows-00001-of-00001.safetensors"] * 6
sharding.join(parted, Path())
assert rank or torch.equal(parted[0].weight, whole[0].weight)
assert set(map(str, Path().iterdir())) == {"of two", "of one", "run.py"}, "what is joined leaves nothing behind"
print("done", rank)
dist.destroy_process_group()
"""


def test_two_processes_with_half_of_a_table_each_are_one_with_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CODE, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
