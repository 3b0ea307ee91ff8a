"""A memory table divided among two processes is the table that one process has; tests/test_distributed.py trains so."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, clean_environment

CODE = """
import torch
import torch.distributed as dist
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


whole, parted = model(), model()
one, two = (Chained([RowAdagrad(each.parameters(), lr=0.1)]) for each in (whole, parted))
sharding.divide(parted)
assert parted[0].weight.shape == (6, 4)
for number in range(3):
    step(parted, two, number, rank)
    step(whole, one, number, 0, 1)
    with sharding.whole(parted, two):
        if not rank:
            torch.testing.assert_close(parted[0].weight, whole[0].weight)
            here, there = (each.optimizers[0].state[m[0].weight] for each, m in ((one, whole), (two, parted)))
            torch.testing.assert_close(there["square_sum"], here["square_sum"])
            torch.testing.assert_close(there["usual"], here["usual"])
    parted.load_state_dict(whole.state_dict())  # the last bits
assert torch.equal(parted[0].weight[:5], whole[0].weight[6 * rank :][:5])
two.load_state_dict(one.state_dict())  # as a checkpoint of one process
sharding.keep_own(parted, two)
squares = one.optimizers[0].state[whole[0].weight]["square_sum"]
assert torch.equal(two.optimizers[0].state[parted[0].weight]["square_sum"][:5], squares[6 * rank :][:5])
sharding.join(parted)
assert rank or torch.equal(parted[0].weight, whole[0].weight)
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
