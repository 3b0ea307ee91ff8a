"""Two processes with gloo train what one does with the same batches, and only the first of them tells and writes."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import clean_environment
from safetensors.torch import load_file
from transformers import TrainerState

from memgpt import cli, config, distributed, tracking, training
from memgpt.errors import UserError
from memgpt.model import MemGPTTokenizer
from memgpt.stages import pretrain
from memgpt.stages.multitask import Mixture

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "pretrain.sequence_length=16",
    "pretrain.batch_size=4",
    "pretrain.tokens=1536",  # 24 steps, nearly two epochs of the 49 rows below, of which the last is alone in its batch
    "pretrain.masked_share_start=0.5",
    "pretrain.masked_share_end=0.5",
    "pretrain.checkpoint_steps=7",
]
# In 32 bits: in 16, rounding would hide what an error in a few rows does.
PLAIN = "from memgpt import config, training\ntraining._device = lambda title: (True, False)\n"
UNDISTURBED = """
import json
from memgpt import distributed
from memgpt.stages import pretrain
curve = {}
if pretrain.run(config.load(), lambda numbers, step: curve.update({step: numbers["loss"]})):
    json.dump(curve, open("curve.json", "w"))
distributed.leave()
"""
KILLED = """
import os
import time
from memgpt import sharding
from memgpt.distributed import rank
from memgpt.stages import pretrain
write = sharding.write
def killed(model, optimizer, directory):
    if rank() and directory.name == "checkpoint-14":
        until = time.monotonic() + 60  # torchrun ends the other with it
        while not (directory / "rows-00001-of-00002.safetensors").exists() and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(9)
    write(model, optimizer, directory)
sharding.write = killed
pretrain.run(config.load())
"""


@dataclass(frozen=True)
class Learned:
    """What one process makes of the data in `place`: its model, and its losses by step."""

    place: Path
    model: Path
    curve: dict[int, float]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A tokenizer, 784 tokens of a language with a rule, small settings, and what one process learns."""
    place = tmp_path_factory.mktemp("distributed")
    random = np.random.default_rng(0)
    words = "one two three four five six seven eight nine ten".split()
    text = " ".join(words[i % 10] for i in np.cumsum(random.integers(1, 3, 800)))
    tokenizer = MemGPTTokenizer.train([text], 300)
    tokenizer.save_pretrained(place / "models/tokenizer")
    tokens = place / "data/tokens"
    tokens.mkdir(parents=True)
    for split in ("train", "validation"):
        np.save(tokens / f"{split}.npy", np.asarray(tokenizer(text)["input_ids"][:784], dtype=np.uint16))
        np.save(tokens / f"{split}_starts.npy", np.arange(0, 784, 50))
    config.write(config.override(config.read(ROOT / "params.yaml"), SETTINGS), place / "params.yaml")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        curve = one_process(monkeypatch)
    return Learned(place, (place / "models/base").rename(place / "one"), curve)


def one_process(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Its losses by step."""
    monkeypatch.setattr(training, "_device", lambda title: (True, False))
    curve: dict[int, float] = {}
    pretrain.run(config.load(), lambda numbers, step: curve.update({step: numbers["loss"]}))
    return curve


def two_processes(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    (place / "run.py").write_text(PLAIN + code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*torchrun, "run.py", "pretrain"], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


def assert_same_weights(one: Path, two: Path) -> None:
    """Sums of another order differ in their last bits, which Muon's orthogonalisation in bf16 makes larger."""
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, weight in weights.items():
        assert (weight.float() - others[name].float()).abs().max() < 5e-3, name


def test_two_processes_learn_what_one_does(one: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(one.place)
    done = two_processes(one.place, UNDISTURBED)
    assert done.returncode == 0, done.stderr
    told = json.loads(Path("curve.json").read_text(encoding="utf-8"))
    losses = {int(step): loss for step, loss in told.items()}
    assert losses == pytest.approx(one.curve, abs=1e-2)
    assert losses[1] == pytest.approx(one.curve[1], abs=1e-5)
    assert_same_weights(one.model, one.place / "models/base")
    assert not list(Path(".memgpt/checkpoints").glob("*"))
    assert done.stderr.count("active parameters") == 1


def test_what_two_processes_began_one_finishes(one: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two is killed before it has written its part of a checkpoint, so that the one before counts."""
    monkeypatch.chdir(one.place)
    shutil.rmtree("models/base", ignore_errors=True)
    assert two_processes(one.place, KILLED).returncode
    assert not Path("models/base").exists()
    (broken,) = Path(".memgpt/checkpoints").glob("*/checkpoint-14")
    assert [path.name for path in broken.glob("rows-*")] == ["rows-00001-of-00002.safetensors"]
    assert len(list(broken.parent.glob("checkpoint-7/rows-*-of-00002.safetensors"))) == 2
    assert min(one_process(monkeypatch)) == 8, "it went on from the checkpoint"
    assert_same_weights(one.model, one.place / "models/base")


def test_what_one_process_began_two_finish(one: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(one.place)

    def killed(self: object, args: object, state: TrainerState, *rest: object, **more: object) -> None:
        if state.global_step == 9:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training._StopOnNaN, "on_log", killed)
        one_process(patch)
    done = two_processes(one.place, UNDISTURBED)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 7 of 24" in done.stderr
    assert_same_weights(one.model, one.place / "models/base")


def test_two_processes_update_the_rows_that_one_does(one: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bits, since row-wise Adagrad alone is at work. Each process reads half of the text, backwards."""
    monkeypatch.chdir(one.place)
    train = Path("data/tokens/train.npy")
    np.save(train, np.load(train)[255::-1])
    settings = [f"pretrain.init={one.model}", "pretrain.update=memory", "pretrain.tokens=256"]
    config.write(config.override(config.read(), settings))
    one_process(monkeypatch)
    alone = Path("models/base").rename("alone")
    assert not two_processes(one.place, UNDISTURBED).returncode
    before, weights, others = (
        load_file(model / "model.safetensors") for model in (one.model, alone, Path("models/base"))
    )
    changed = {name for name, weight in weights.items() if not weight.equal(before[name])}
    assert changed == {"model.memory_table.weight", "model.ngram_hash.owners"}  # new n-grams get rows that are free
    for name, weight in weights.items():
        assert (weight.float() - others[name].float()).abs().max() < 1e-6, name


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    for name, value in (("LOCAL_RANK", rank), ("RANK", rank), ("WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(value))


def test_only_the_first_process_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    ran = []
    monkeypatch.setattr(pretrain, "run", lambda config: ran.append(config) or {})
    monkeypatch.setattr(tracking, "stage_run", lambda *_: pytest.fail("tracked"))
    pretend(monkeypatch, 1, 2)
    cli.stages._tracked("pretrain", log=True)
    assert ran
    assert not capsys.readouterr().out


def test_a_batch_is_divided_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(training._Batches(10, 4, 1, None))
    shares = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        shares.append(list(training._Batches(10, 4, 1, None)))
    assert [sorted(own + other) for own, other in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
    pretend(monkeypatch, 2, 3)
    assert distributed.share([7, 8]) == [7, 8], "with fewer rows than processes, everyone takes them all"


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, 3)
    distributed.divides(6, "pretrain.batch_size")
    with pytest.raises(UserError, match=r"pretrain.batch_size=16: does not divide among 3 processes"):
        distributed.divides(16, "pretrain.batch_size")


class _Rows(list):
    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(rows)}


def test_processes_work_on_the_same_task_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = config.load(ROOT / "params.yaml").multitask
    mixture = Mixture({task: _Rows(range(100)) for task in config.TASKS}, params)
    for step in range(20):
        whole, shares = mixture[step], []
        for rank in range(2):
            pretend(monkeypatch, rank, 2)
            shares.append(mixture[step])
        monkeypatch.undo()
        assert {share["task"] for share in shares} == {whole["task"]}
        divided = whole["task"] != "recommendation"
        seen = torch.cat([share["input_ids"] for share in shares]) if divided else shares[1]["input_ids"]
        assert sorted(seen.tolist()) == sorted(whole["input_ids"].tolist())
