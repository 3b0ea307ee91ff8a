"""The training stages on a few rows: what they write is reproducible, and a killed run continues exactly."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from memgpt import config, lineage, training
from memgpt.errors import UserError
from memgpt.model import MemGPTForCausalLM, MemGPTTokenizer
from memgpt.stages import pretrain, tokenize

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "pretrain.sequence_length=16",
    "pretrain.batch_size=4",
    "pretrain.tokens=3840",  # 62 steps, nearly five epochs of the 50 rows below, whose last batch has 2
    "pretrain.checkpoint_steps=7",
]
RUN = "from memgpt import config; from memgpt.stages import pretrain; pretrain.run(config.load())"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tokenizer, 800 tokens of a language with a rule, and small settings."""
    random = np.random.default_rng(0)
    words = "one two three four five six seven eight nine ten".split()
    text = " ".join(words[i % 10] for i in np.cumsum(random.integers(1, 3, 800)))
    tokenizer = MemGPTTokenizer.train([text], 300)
    tokenizer.save_pretrained(tmp_path / "models/tokenizer")
    tokens = tmp_path / "data/tokens"
    tokens.mkdir(parents=True)
    ids = np.asarray(tokenizer(text)["input_ids"][:800], dtype=np.uint16)
    starts = np.arange(0, 800, 50)
    ids[starts] = tokenizer.eos_token_id
    for split in ("train", "validation"):
        np.save(tokens / f"{split}.npy", ids)
        np.save(tokens / f"{split}_starts.npy", starts)
    document = config.read(ROOT / "params.yaml")
    config.write(config.override(document, SETTINGS), tmp_path / "params.yaml")
    return tmp_path


def start(place: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN], cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_equals_undisturbed(place: Path) -> None:
    assert start(place).wait() == 0
    undisturbed = lineage.weights_digest(place / "models/base")
    assert not list((place / ".memgpt/checkpoints").glob("*")), "a finished run leaves no checkpoints"
    (place / "models/base").rename(place / "before")

    victim = start(place)
    while not list(place.glob(".memgpt/checkpoints/*/checkpoint-*/complete")):
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (place / "models/base").exists()

    again = start(place)
    _, messages = again.communicate()
    assert again.returncode == 0, messages
    assert "resuming at step" in messages
    assert lineage.weights_digest(place / "models/base") == undisturbed
    assert (place / "models/base/lineage.json").read_bytes() == (place / "before/lineage.json").read_bytes()


def test_other_parameters_do_not_resume_this_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memgpt import checkpoint

    monkeypatch.chdir(place)
    inputs = [place / "models/tokenizer"]
    assert checkpoint.directory("pretrain", {"a": 1}, inputs) == checkpoint.directory("pretrain", {"a": 1}, inputs)
    assert checkpoint.directory("pretrain", {"a": 1}, inputs) != checkpoint.directory("pretrain", {"a": 2}, inputs)


def test_a_checkpoint_cut_short_is_not_resumed(tmp_path: Path) -> None:
    from memgpt import checkpoint

    for step, whole in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / checkpoint.COMPLETE).touch()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"
    checkpoint.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}
    assert checkpoint.latest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("tokens", "batch_size", "steps", "seen"),
    [(3840, 4, 62, 3840), (3840, 64, 4, 3200), (1600, 4, 26, 1600), (1, 4, 1, 64), (1, 64, 1, 800)],
)
def test_the_tokens_of_smaller_batches_are_counted_as_they_are(
    place: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, batch_size: int, steps: int, seen: int
) -> None:
    monkeypatch.chdir(place)
    settings = [f"pretrain.tokens={tokens}", f"pretrain.batch_size={batch_size}"]
    params = config.parse(config.override(config.read(), settings)).pretrain
    assert pretrain.budget(50, params) == (steps, seen)
    batches = training._Batches(50, batch_size, 0, None)
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    assert sum(map(len, itertools.islice(epochs, steps))) * 16 == seen


def test_it_learns_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    curve: list[float] = []
    metrics = pretrain.run(config.load(), lambda numbers, step: curve.append(numbers["loss"]))
    assert curve[0] > 5.0  # near log 300
    assert metrics["validation_loss"] < 0.7 * curve[0]
    assert lineage.read("models/base")["metrics"] == metrics
    assert metrics["tokens_seen"] == 3840
    assert MemGPTForCausalLM.from_pretrained("models/base").num_parameters() == metrics["parameters"]


def test_computing_activations_again_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    losses = []
    for again in (False, True):
        document = config.read()
        config.override(document, ["pretrain.tokens=640", f"pretrain.activation_checkpointing={str(again).lower()}"])
        losses.append(pretrain.run(config.parse(document))["validation_loss"])
    assert losses[0] == losses[1]


def test_starting_from_a_model_keeps_what_it_knows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    first = pretrain.run(config.load())
    (place / "models/base").rename(place / "start")
    document = config.override(config.read(), ["pretrain.init=start", "pretrain.tokens=64"])  # one step
    config.write(document)
    second = pretrain.run(config.load())
    assert second["validation_loss"] < first["validation_loss"] + 0.3
    assert lineage.read("models/base")["parent"] == lineage.weights_digest("start")


def test_the_memory_has_as_many_rows_as_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    pretrain.run(config.parse(config.override(config.read(), ["pretrain.memory_rows=50", "pretrain.tokens=64"])))
    made = MemGPTForCausalLM.from_pretrained("models/base")
    assert made.config.memory_rows == 50 and made.model.memory_table.weight.shape[0] == 1 + 6 * 50
    with pytest.raises(ValueError, match=r"memory_rows is of a model that is made anew"):
        config.parse(config.override(config.read(), ["pretrain.memory_rows=50", "pretrain.init=start"]))


def test_its_own_output_is_no_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC would have deleted it before it is read."""
    monkeypatch.chdir(place)
    for path in ("models/base", "./models/base/", "models/../models/base", place / "models/base"):
        with pytest.raises(UserError, match=r"pretrain: init=.* copy it to another name first"):
            config.override(config.read(), [f"pretrain.init={path}"])
    for name in ("models/base-2026", "someone/base"):
        assert config.override(config.read(), [f"pretrain.init={name}"])


def test_an_update_of_the_memory_changes_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    pretrain.run(config.load())
    (place / "models/base").rename(place / "start")
    words = " ".join(["ten nine eight seven six five four three two one"] * 80)  # the old words, the other way round
    ids = np.asarray(MemGPTTokenizer.from_pretrained("models/tokenizer")(words)["input_ids"][:800], dtype=np.uint16)
    np.save(place / "data/tokens/train.npy", ids)
    np.save(place / "data/tokens/train_starts.npy", np.asarray([0]))
    settings = ["pretrain.init=start", "pretrain.update=memory", "pretrain.update_share=0.5"]
    config.write(config.override(config.read(), settings))
    pretrain.run(config.load())
    before, after = (MemGPTForCausalLM.from_pretrained(name).state_dict() for name in ("start", "models/base"))
    for name, weight in before.items():
        if name == "model.memory_table.weight":
            changed = (weight != after[name]).any(dim=1)
            assert 0 < changed.sum() < 600, "a few of the rows of 800 tokens"
        elif name == "model.ngram_hash.owners":
            taken = weight > 0
            assert weight[taken].equal(after[name][taken]), "what is known keeps its row"
            assert (after[name][~taken] > 0).any(), "new n-grams get free ones"
        else:
            assert weight.equal(after[name]), name
    (place / "start/memory_usage.safetensors").unlink()
    with pytest.raises(ValueError, match="pretrain it again"):
        pretrain.run(config.load())


def test_another_architecture_is_no_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config

    monkeypatch.chdir(place)
    GPT2Config().save_pretrained("other")
    config.write(config.override(config.read(), ["pretrain.init=other"]))
    with pytest.raises(ValueError, match="a gpt2 model"):
        pretrain.run(config.load())


def test_a_tokenizer_without_an_end_token_is_no_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    tokenizer = MemGPTTokenizer.from_pretrained("models/tokenizer")
    tokenizer.eos_token = None
    tokenizer.save_pretrained("other")
    settings = config.parse(config.override(config.read(ROOT / "params.yaml"), ["pretrain.init=other"]))
    with pytest.raises(UserError, match="its tokenizer has no end token, which stands"):
        tokenize._tokenizer(settings, [])


def test_of_more_documents_than_it_may_read_the_tokenizer_sees_a_sample() -> None:
    """Of all, since a corpus may come in an order; the same one whatever the order."""
    texts = [f"{'early' if n < 50 else 'later'} words number {n}" for n in range(100)]
    settings = config.parse(config.override(config.read(ROOT / "params.yaml"), ["tokenize.max_documents=50"]))
    tokenizer = tokenize._tokenizer(settings, texts)
    assert [len(tokenizer(word)["input_ids"]) for word in ("early", "later")] == [1, 1]
    assert tokenize._tokenizer(settings, texts[::-1]).get_vocab() == tokenizer.get_vocab()


def test_packed_rows_count_positions_from_each_document(place: Path) -> None:
    rows = pretrain.PackedTokens(place / "data/tokens", "train", 16)
    positions = rows[3]["position_ids"].tolist()  # tokens 48 … 63; a document starts at 50
    assert positions == [0, 1, *range(14)]


def test_a_corpus_too_small_is_refused_with_the_fix(place: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length"):
        pretrain.PackedTokens(place / "data/tokens", "train", 801)
