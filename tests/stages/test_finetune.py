"""Fine-tuning on the tiny pipeline's tables: what each setting trains, keeps and resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Pipeline
from safetensors.torch import load_file

from memgpt import checkpoint, config, lineage, predict, tuning
from memgpt.config import Tuning
from memgpt.errors import UserError
from memgpt.model import MemGPTConfig, MemGPTForMultiTask, MemGPTForSequenceClassification
from memgpt.optimizers import RowAdagrad, for_tuning
from memgpt.stages import finetune
from memgpt.training import train

ROOT = Path(__file__).parents[2]
RUN = "from memgpt import config; from memgpt.stages import finetune; finetune.run(config.load(), 'sentiment')"
SETTINGS = ["finetune.sentiment.epochs=1", "finetune.sentiment.max_length=16"]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def place(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A folder with the pipeline's tables and core, in which a fine-tuning can run."""
    (tmp_path / "models").mkdir()
    (tmp_path / "data").symlink_to(pipeline.root / "data")
    (tmp_path / "models/base").symlink_to(pipeline.root / "models/base")
    write(tmp_path, [])
    return tmp_path


def write(place: Path, settings: list[str]) -> config.Config:
    document = config.override(config.read(ROOT / "params.yaml"), [*SETTINGS, *settings])
    config.write(document, place / "params.yaml")
    return config.load(place / "params.yaml")


def tuned(place: Path, *settings: str) -> Weights:
    finetune.run(write(place, [f"finetune.sentiment.{setting}" for setting in settings]), "sentiment")
    return load_file(place / "models/sentiment/model.safetensors")


def changed(place: Path, weights: Weights) -> set[str]:
    """Names of the trunk's weights that are not those of the core."""
    before = load_file(place / "models/base/model.safetensors")
    return {name for name in weights if name in before and not torch.equal(weights[name], before[name])}


def is_memory(name: str) -> bool:
    return "memory" in name


def is_table(name: str) -> bool:
    return name.endswith("memory_table.weight")


@pytest.mark.parametrize("tune", ["backbone", "memory", "head", "adapter", "prefix", "lora", "adalora"])
def test_only_what_is_tuned_changes(place: Path, monkeypatch: pytest.MonkeyPatch, tune: str) -> None:
    monkeypatch.chdir(place)
    rate = ["learning_rate=0.02"] if tune == "prefix" else []
    weights = tuned(place, f"tune={tune}", "memory_learning_rate=0.01", *rate)
    names = changed(place, weights)
    if tune == "head":
        assert not names
    elif tune == "prefix":
        assert not names, "a weight more, the others keep their bits"
        prefix = weights["model.prefix.weight"]
        assert prefix.shape[3] == config.load(place / "params.yaml").finetune.sentiment.rank
        assert prefix.std() > 0.03, "it has learnt"
    elif tune == "memory":
        assert names and all(map(is_table, names))
        before = load_file(place / "models/base/model.safetensors")
        for name in names:
            rows = (weights[name] != before[name]).any(1)
            assert rows.float().mean() < 0.9, "rows that the task's texts do not read keep their bits"
            told = json.loads((place / "models/sentiment/lineage.json").read_text())["metrics"]
            head = sum(weight.numel() for part, weight in weights.items() if part.startswith("head."))
            assert told["trainable_parameters"] == head + int(rows.sum()) * weights[name].shape[1]
    elif tune == "adapter":
        wide = {name for name in names if ".mlp." in name}
        assert names == wide, "only the feed-forward layers are wider"
        before = load_file(place / "models/base/model.safetensors")
        for name in names:
            old = before[name]
            torch.testing.assert_close(weights[name][: old.shape[0], : old.shape[1]], old, rtol=0, atol=0)
    elif tune == "backbone":
        assert names and not any(map(is_memory, names))
        assert "model.embed_tokens.weight" in names
    else:  # low rank
        assert names and all(name.endswith("_proj.weight") for name in names), names
    assert not any("lora" in name or "base_layer" in name for name in weights), "merged"
    (answer,) = predict.load("sentiment", place / "models/sentiment").predict(["Profit rose."])
    assert abs(sum(answer["scores"].values()) - 1) < 1e-4


@pytest.mark.parametrize(("split", "word"), [("train", "training"), ("validation", "validation")])
def test_a_split_without_rows_is_told_before_training(
    place: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, split: str, word: str
) -> None:
    (place / "data").unlink()
    tables = place / "data/tables/ner"
    shutil.copytree(pipeline.root / "data/tables/ner", tables)
    empty = pq.read_table(tables / f"{split}.parquet").slice(0, 0)
    (tables / f"{split}.parquet").unlink()
    pq.write_table(empty, tables / f"{split}.parquet")
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=rf"data\.ner\.uri: no {word} example"):
        finetune.run(config.load(), "ner")


def test_a_merged_adapter_computes_the_same() -> None:
    torch.manual_seed(0)
    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, memory_layers=[])
    for kind in ({}, {"gated_mlp": False, "mlp_bias": True}):
        model = MemGPTForSequenceClassification(MemGPTConfig(**shape, **kind)).eval()
        ids = torch.arange(6).view(2, 3)
        plain = model(input_ids=ids).logits
        tuning.prepare(model, config.load(ROOT / "params.yaml").finetune.ner.model_copy(update={"tune": "adapter"}), 10)
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.adapter.down_proj.weight)
        merged = tuning.whole(model)
        assert merged.config.intermediate_size == model.config.intermediate_size + 8
        changed = model(input_ids=ids).logits
        assert not torch.allclose(changed, plain)
        torch.testing.assert_close(merged(input_ids=ids).logits, changed, rtol=1e-4, atol=1e-5)


def test_a_recommender_with_merged_adapters_can_be_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head reads histories with a layer of the trunk's kind, of the width that the configuration tells."""
    monkeypatch.chdir(place)
    changes = ["tune=adapter", "epochs=1", "max_length=8", "taste_epochs=1"]
    finetune.run(write(place, [f"finetune.recommendation.{change}" for change in changes]), "recommendation")
    predictor = predict.load("recommendation", place / "models/recommendation")
    assert len(predictor.predict([{"history": [], "k": 3}])[0]) == 3


def test_watching_a_recommender_between_epochs_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learnt for the re-ranking draws numbers of its own."""
    monkeypatch.chdir(place)
    changes = ["epochs=2", "max_length=8", "taste_epochs=1"]
    params = write(place, [f"finetune.recommendation.{change}" for change in changes]).finetune.recommendation
    finetune.fit(params, "recommendation", place / "alone")
    finetune.fit(params, "recommendation", place / "watched", watch=lambda score, epoch: None)
    alone, watched = (load_file(place / name / "model.safetensors") for name in ("alone", "watched"))
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_a_low_rank_change_has_that_rank(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    weights = tuned(place, "tune=lora", "rank=2")
    before = load_file(place / "models/base/model.safetensors")
    for name in changed(place, weights):
        assert torch.linalg.matrix_rank((weights[name] - before[name]).double(), rtol=1e-3) <= 2


@pytest.mark.parametrize("tuned", ["adversarial=0.5 batch_by_length=true", "tune=prefix rank=3"])
def test_killed_and_resumed_equals_undisturbed(place: Path, tuned: str) -> None:
    """With everything switched on that keeps a state of its own."""
    settings = f"epochs=3 patience=1 ema_decay=0.9 checkpoint_steps=5 {tuned}".split()
    write(place, [f"finetune.sentiment.{setting}" for setting in settings])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", RUN], cwd=place, env=environment)

    assert start().wait() == 0
    undisturbed = lineage.weights_digest(place / "models/sentiment")
    (place / "models/sentiment").rename(place / "before")
    victim = start()
    while len(list(place.glob(".memgpt/checkpoints/*/checkpoint-*/complete"))) < 2:
        assert victim.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (place / "models/sentiment").exists()
    assert start().wait() == 0
    assert lineage.weights_digest(place / "models/sentiment") == undisturbed


def test_the_best_epoch_is_kept_and_patience_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3])
    monkeypatch.setattr(
        finetune, "save", lambda model, task, params, tokenizer, directory: save_number(directory, model)
    )
    monkeypatch.setattr(finetune, "validate", lambda task, directory: {"macro_f1": next(scores)})
    document = config.override(config.read(ROOT / "params.yaml"), ["finetune.sentiment.patience=2"])
    params = config.parse(document).finetune.sentiment
    epochs = finetune._EarlyStopping("sentiment", params, None, tmp_path / "epochs")
    assert [epochs(step, step) for step in (10, 20, 30, 40)] == [True, True, True, False]
    assert epochs.step == 20
    assert (epochs.best / "number").read_text() == "20"


def save_number(directory: Path, number: object) -> None:
    directory.mkdir()
    (directory / "number").write_text(str(number))


def test_against_the_embeddings_gradient_too(tmp_path: Path) -> None:
    """One SGD step with `adversarial` is one along g(e) + g(e + ε·g/|g|)."""
    torch.manual_seed(0)
    shape = MemGPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, memory_layers=[])
    model = MemGPTForSequenceClassification(shape)
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 2)} for i in range(4)]
    batch = torch.utils.data.default_collate(rows)
    reference = MemGPTForSequenceClassification(shape)
    reference.load_state_dict(model.state_dict())
    embeddings = reference.get_input_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        reference(**batch).loss.backward()
        before = embeddings.detach().clone()
        with torch.no_grad():
            embeddings += 0.5 * embeddings.grad / embeddings.grad.norm()
        reference(**batch).loss.backward()
    with torch.no_grad():
        embeddings.copy_(before)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    params = tuning_params(optimizer="adafactor", adversarial=0.5)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    train(
        model, rows, torch.utils.data.default_collate, params, steps=1, checkpoints=tmp_path, title="t", optimizer=step
    )
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, msg=name)


def tuning_params(**changes: object) -> Tuning:
    settings: dict[str, object] = dict.fromkeys(Tuning.model_fields, 0.0)
    settings |= dict(batch_size=4, learning_rate=0.1, memory_learning_rate=0.1, checkpoint_steps=100, seed=0)
    settings["optimizer"] = "adamw"
    return Tuning(**{**settings, **changes})


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_each_optimizer_lowers_the_loss_and_tables_have_their_own(name: str) -> None:
    torch.manual_seed(0)
    shape = MemGPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, memory_rows=50)
    model = MemGPTForSequenceClassification(shape)
    optimizer = for_tuning(model, tuning_params(learning_rate=0.02), name)
    assert isinstance(optimizer.optimizers[-1], RowAdagrad)
    ids, labels = torch.arange(12).view(4, 3), torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses


def test_settings_that_do_not_go_together_are_refused() -> None:
    document = config.read(ROOT / "params.yaml")
    with pytest.raises(UserError, match=r"finetune\.ner: adversarial=1\.0 .* tune=lora does not train"):
        config.override(document, ["finetune.ner.adversarial=1.0", "finetune.ner.tune=lora"])
    document = config.read(ROOT / "params.yaml")
    with pytest.raises(UserError, match=r"finetune\.ner: ensemble=3 and soup=2 both take several seeds"):
        config.override(document, ["finetune.ner.soup=2", "finetune.ner.ensemble=3"])
    document = config.read(ROOT / "params.yaml")
    with pytest.raises(UserError, match=r"finetune\.recommendation\.ensemble: unknown key"):
        config.override(document, ["finetune.recommendation.ensemble=2"])
    document = config.read(ROOT / "params.yaml")
    with pytest.raises(UserError, match=r"pretrain: update=memory needs pretrain\.init"):
        config.override(document, ["pretrain.update=memory"])
    assert config.override(document, ["pretrain.update=memory", "pretrain.init=models/base-2026"])


def test_tuning_a_memory_that_is_not_there_is_refused() -> None:
    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, memory_layers=[])
    model = MemGPTForSequenceClassification(MemGPTConfig(**shape))
    params = config.load(ROOT / "params.yaml").finetune.sentiment.model_copy(update={"tune": "memory"})
    with pytest.raises(UserError, match="tune=memory: the model has no memory"):
        tuning.prepare(model, params, 1)


def test_a_mean_of_weights_leaves_whole_numbers_alone() -> None:
    """The memory's owners are 16 bits wide: their sum would be another number."""
    owners = torch.tensor([20000, -1, 0], dtype=torch.int16)
    assert torch.equal(finetune._mean([owners, owners.clone()]), owners)
    assert finetune._mean([torch.tensor(1.0), torch.tensor(2.0)]) == 1.5


def test_a_pruned_trial_leaves_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "save", lambda *given: given[-1].mkdir())
    monkeypatch.setattr(finetune, "validate", lambda *_: {"macro_f1": 0.5})
    params, place = config.load(ROOT / "params.yaml").finetune.sentiment, checkpoint.directory("trial", {}, [])

    def prune(score: float, epoch: int) -> None:
        raise RuntimeError("pruned")

    with pytest.raises(RuntimeError, match="pruned"):
        finetune._EarlyStopping("sentiment", params, None, place / "epochs", prune)(None, 1)
    assert not place.exists() and place.absolute() not in checkpoint._held


def test_adalora_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, memory_layers=[])
    rows = [torch.randint(20, (6,), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    changes = dict(tune="adalora", rank=4, batch_size=4, checkpoint_steps=5, dropout=0.0, learning_rate=0.02)
    params = config.load(ROOT / "params.yaml").finetune.sentiment.model_copy(update=changes)

    def collate(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack(batch), "labels": torch.stack(batch)[:, 0] % 2}

    def run(folder: Path, stop: int = 0) -> Weights:
        torch.manual_seed(0)
        model = tuning.prepare(MemGPTForSequenceClassification(MemGPTConfig(**shape)), params, 40)
        ended = train(
            *(model, rows, collate, params),
            steps=40,
            checkpoints=folder,
            title="tune",
            epoch_steps=5,
            after_epoch=lambda model, step: step != stop,
        )
        return tuning.whole(ended).state_dict()

    wanted = run(tmp_path / "whole")
    for stop in (15, 30):  # while ranks are given away, and after
        run(tmp_path / str(stop), stop)
        found = run(tmp_path / str(stop))
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_a_soup_is_no_worse_than_its_best_member(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    single = [
        finetune.fit(seeded(place, seed), "sentiment", place / f"models/{seed}", head_seed=1)["validation_macro_f1"]
        for seed in (1, 2)
    ]
    metrics = finetune.run(write(place, ["finetune.sentiment.soup=2"]), "sentiment")
    assert metrics["validation_macro_f1"] >= max(single)
    assert metrics["members"] in (1, 2)
    assert not list(place.glob(".memgpt/checkpoints/*"))
    first, second, soup = (
        load_file(place / f"models/{name}/model.safetensors")["head.score.weight"] for name in ("1", "2", "sentiment")
    )
    if metrics["members"] == 2:
        torch.testing.assert_close(soup, (first + second) / 2)


def test_an_ensemble_is_its_members_in_one_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    settings = write(place, ["finetune.sentiment.ensemble=2"])
    whole, seeds = finetune.fit, []

    def stopped_once(params: config.Finetune, *args: object, **kwargs: object) -> dict[str, float]:
        seeds.append(params.seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return whole(params, *args, **kwargs)

    monkeypatch.setattr(finetune, "fit", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        whole(settings.finetune.sentiment, "sentiment", place / "models/sentiment")
    metrics = whole(settings.finetune.sentiment, "sentiment", place / "models/sentiment")
    assert seeds == [1, 2, 2], "the first is not trained again"
    assert metrics["members"] == 2
    monkeypatch.setattr(finetune, "fit", whole)
    members = [place / "models/sentiment", place / "models/sentiment/member-2"]
    for seed, member in enumerate(members, start=1):
        finetune.fit(seeded(place, seed), "sentiment", place / f"models/{seed}")
        for file in ("model.safetensors", "config.json"):
            assert (member / file).read_bytes() == (place / f"models/{seed}" / file).read_bytes()
    assert lineage.read(members[0])["params"]["ensemble"] == 2
    assert not list(place.glob(".memgpt/checkpoints/*"))
    (answer,) = predict.load("sentiment", place / "models/sentiment").predict(["Profit rose."])
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def seeded(place: Path, seed: int) -> config.Finetune:
    return write(place, [f"finetune.sentiment.seed={seed}"]).finetune.sentiment


def test_an_uncertain_task_counts_less() -> None:
    shape = MemGPTConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, memory_layers=[], task_balancing=True
    )
    model = MemGPTForMultiTask(shape).train()
    batch = {"task": "sentiment", "input_ids": torch.arange(6).view(2, 3), "labels": torch.zeros(2, dtype=torch.long)}
    plain = model.eval()(**batch).loss
    with torch.no_grad():
        model.log_variance.fill_(1.0)
    assert model(**batch).loss == plain, "what is reported is the loss itself"
    weighted = model.train()(**batch).loss
    torch.testing.assert_close(weighted, plain * torch.exp(torch.tensor(-1.0)) + 0.5)
    weighted.backward()
    assert model.log_variance.grad.count_nonzero() == 1


@pytest.mark.parametrize("stage", ["finetune ner", "multitask", "pretrain", "tokenize", "evaluate ner"])
def test_what_comes_before_is_missed_in_one_line(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not looked for on the hub, where a folder's name could be somebody's repository."""
    monkeypatch.chdir(tmp_path)
    verb, _, item = stage.partition(" ")
    run = import_module(f"memgpt.stages.{verb}").run
    with pytest.raises(UserError, match=r"^(models|data)/\S+: not found; run `dvc repro`"):
        run(config.load(ROOT / "params.yaml"), *([item] if item else []))
