"""The benchmark of the core is ready to run: its recipe is one of today's, and its comparison is fair."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import base
import cells
import core
import gpu
import gpu_cells
import peers
import peers_recommendation
import runner
import task_cells
import tasks


def test_its_recipe_and_every_change_of_it_are_valid() -> None:
    for _, spec in [*core.plan(quick=True), *core.plan(quick=False), *core.ablations()]:
        if "tokens" in spec:
            assert cells.recipe(tokens=spec["tokens"], **spec.get("recipe", {})).tokens == spec["tokens"]
    with pytest.raises(ValueError, match="no_such_key"):
        cells.recipe(no_such_key=1)


def test_every_cell_that_starts_from_another_finds_it_in_the_plan() -> None:
    for quick in (True, False):
        names = [name for name, _ in core.plan(quick)]
        assert len(names) == len(set(names))
        for place, (_, spec) in enumerate(core.plan(quick)):
            assert "start" not in spec or spec["start"] in names[:place]


@pytest.mark.parametrize("width", core.WIDTHS)
def test_equal_cost_means_no_more_multiply_adds_than_the_peer(width: int) -> None:
    ours, peer = (peers.multiply_adds(model) for model in (peers.memgpt(width, rows=64), peers.llama(width)))
    assert 0.96 * peer < ours <= peer


@pytest.mark.parametrize(
    ("peer", "settings"),
    [("item_knn", {}), ("ease", {"penalty": 1.0}), ("sasrec", {"epochs": 20, "learning_rate": 1e-2, "width": 32})],
)
def test_peers_of_recommendation_learn_which_items_go_together(peer: str, settings: dict) -> None:
    lines = [[5 * (reader % 4) + (reader + step) % 5 for step in range(4)] for reader in range(40)]
    score = getattr(peers_recommendation, peer)(lines, 20, **settings)
    for group in range(4):
        scores = score([5 * group, 5 * group + 1])
        scores[[5 * group, 5 * group + 1]] = -np.inf
        assert scores.argmax() // 5 == group


def test_ease_minimises_what_it_says() -> None:
    """Off the diagonal, the gradient of |X - XB|² + λ|B|² is zero where B's diagonal is held at zero."""
    random = np.random.default_rng(0)
    lines = [random.choice(12, 5, replace=False).tolist() for _ in range(30)]
    score = peers_recommendation.ease(lines, 12, penalty=2.0)
    weights = np.stack([score([item]) for item in range(12)])
    read = peers_recommendation._readers(lines, 12)
    gradient = read.T @ (read @ weights - read) + 2.0 * weights
    np.fill_diagonal(gradient, 0)
    assert np.abs(np.diag(weights)).max() == 0
    assert np.abs(gradient).max() < 1e-4


def test_popularity_counts() -> None:
    assert peers_recommendation.popularity([[0, 1], [1]], 3)([2]).tolist() == [1, 2, 0]


def test_tasks_are_compared_fairly_and_with_settings_that_exist() -> None:
    for mode in ("quick", "compare", "full"):
        planned = tasks.plan(mode)
        names = [name for name, _ in planned]
        assert len(names) == len(set(names))
        for place, (_, spec) in enumerate(planned):
            assert set(spec.get("after", ())) <= set(names[:place])
            for part in [spec["part"]] if "part" in spec else spec["set"].split("+"):
                task = task_cells.SETS[part][0]
                if spec.get("system") in ("memgpt", "bert"):
                    assert task_cells.settings(task, spec).seed == spec["seed"]
                if spec.get("kind") == "forgetting":
                    assert task_cells.settings(task, {**spec, "set": part}).tune == spec["changes"]["tune"]
    for task, peers_of in tasks.PEERS.items():
        for peer in peers_of:
            assert peer == "popularity" or len(tasks.TRIALS[peer]) >= len(tasks.TRIALS["memgpt"]), (task, peer)
    for name, spec in tasks.plan("compare"):  # a result tells which form of the core it was reached from
        ours = spec["system"] == "memgpt"
        assert spec.get("pretrained", {}).get("recall") == (core.AS_SHIPPED["recall"] if ours else None), name
    small = {name for name, _ in core.plan(quick=True)}
    assert all(spec["core"] in small for _, spec in tasks.plan("quick")), "it would wait for hours of pretraining"
    final = {spec["system"] for _, spec in tasks.plan("full") if spec.get("test")}
    assert final == {"memgpt", *(peer for peers_of in tasks.PEERS.values() for peer in peers_of)}


def test_settings_that_trials_choose_and_a_final_cell_had_are_not_asked_of_the_test_split_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "STATISTICS"):
        monkeypatch.setattr(task_cells, name, tmp_path)
    final = {"set": "wnut17", "system": "crf", "seed": 1, "test": True}
    asked: list[str] = []
    monkeypatch.setitem(task_cells.SYSTEMS, "crf", lambda task, spec, target: asked.append(spec["changes"]["c1"]))
    for c1, validation in ((0.1, 0.5), (0.5, 0.4)):
        tried = {"spec": {"changes": {"c1": c1}}, "validation": validation}
        (tmp_path / f"trial-{c1}.json").write_text(json.dumps(tried))
    twin = {"spec": {**final, "changes": {"c1": 0.1}}, "test": 0.3}
    (tmp_path / "wnut17-crf-1.json").write_text(json.dumps(twin))
    np.savez(tmp_path / "wnut17-crf-1.npz", np.ones(2))
    chosen = {**final, "after": ["trial-0.1", "trial-0.5"]}
    assert task_cells.compare("wnut17-crf-chosen-1", chosen, tmp_path) == {"test": 0.3}
    assert (tmp_path / "wnut17-crf-chosen-1.npz").exists() and not asked
    with pytest.raises(TypeError):  # of another seed it is asked, which here answers nothing
        task_cells.compare("wnut17-crf-chosen-2", {**chosen, "seed": 2}, tmp_path)
    assert asked == [0.1]


def test_a_verdict_needs_the_whole_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "STATISTICS", tmp_path)
    random = np.random.default_rng(0)
    ranks = {"memgpt": random.random(400), "ease": random.random(400) * 0.5, "sasrec": random.random(400)}
    done = {}
    for system, gains in ranks.items():
        np.savez(tmp_path / f"movielens-{system}-1.npz", np.stack([gains, np.ones(400)], axis=1))
        done[f"movielens-{system}-1"] = {"spec": {"set": "movielens", "system": system, "test": True}}
    table = tasks.compare(done, "movielens")
    assert (table["ease"]["verdict"], table["sasrec"]["verdict"]) == ("beats", "matches")
    assert table["ease"]["gain"] == pytest.approx(ranks["memgpt"].mean() - ranks["ease"].mean(), abs=1e-3)


def test_what_a_gpu_will_be_asked_runs_at_toy_sizes_and_makes_the_table(tmp_path: Path) -> None:
    """All but the variants that are compiled; `benchmarks/gpu.py --tiny` runs those too."""
    cells = {
        name: spec
        for name, spec in gpu.plan(tiny=True).items()
        if not spec.get("compiled")
        and spec.get("scope") != "whole"
        and not (spec["run"] == "decode" and spec["kind"] in ("memgpt", "plain"))
    }
    assert not gpu.run(cells, tmp_path, limit=-1)
    assert not list(tmp_path.iterdir())
    assert gpu.run(cells, tmp_path, limit=3000)
    assert gpu.run(cells, tmp_path, limit=-1)  # nothing is left
    told = " ".join(row[0] for row in gpu.table(cells, tmp_path))
    assert all(what in told for what in ("train tiny", "encode, against modernbert", "tables mapped"))
    planned = {spec["run"] for spec in gpu.plan(tiny=False).values()}
    assert planned == {spec["run"] for spec in cells.values()}


def test_a_cell_that_fails_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"run": "floors", "size": "tiny"}
    assert not gpu.run({"bad": {"run": "look_up", "size": "no such size"}, "floors": good}, tmp_path, limit=60)
    assert "bad: KeyError" in capsys.readouterr().err
    assert runner.done(tmp_path, "floors", good)


def test_a_cell_is_run_again_when_its_spec_has_changed(tmp_path: Path) -> None:
    script, results = tmp_path / "cell.py", tmp_path / "results"
    results.mkdir()
    script.write_text(
        "import json, pathlib, sys\n"
        f"folder = pathlib.Path({str(results)!r})\n"
        "name, spec = sys.argv[1], json.loads(sys.argv[2])\n"
        "old = sorted(path.name for path in folder.iterdir())\n"
        "(folder / f'{name}.json').write_text(json.dumps({'spec': spec, 'there': old}))\n"
    )
    (results / "first.json").write_text('{"spec": {"rows": 1}}')
    (results / "kept.json").write_text('{"spec": {"rows": 2}, "there": "before"}')
    cells = [("second", {"start": "first"}), ("first", {"rows": 2}), ("kept", {"rows": 2})]
    runner.run(cells, 2, script, results, tmp_path / "logs")
    assert runner.done(results, "first", {"rows": 2})
    assert "second.json" not in runner.done(results, "first", {"rows": 2})["there"], "it waited for the new one"
    assert runner.done(results, "second", {"start": "first"})
    assert runner.done(results, "kept", {"rows": 2})["there"] == "before"
    runner.run(cells, 2, script, results, tmp_path / "logs", again={"kept"})
    assert runner.done(results, "kept", {"rows": 2})["there"] != "before"


def test_starts_are_pretrained_again_where_their_weights_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone there are results of all that was pretrained, and weights of none."""
    asked: list[set[str]] = []
    monkeypatch.setattr(core, "WORK", tmp_path / "work")
    monkeypatch.setattr(core, "CELLS", tmp_path)
    monkeypatch.setattr(core, "prepare", lambda source: None)
    monkeypatch.setattr(runner, "run", lambda cells, jobs, script, results, logs, again: asked.append(set(again)))
    starts = [core.pretraining("llama", 64, 1, 1), core.pretraining("memgpt", 64, 1, 1)]
    tuned = [core.tuning(start, "ner", 1) for start in starts]
    (tmp_path / f"{tuned[0][0]}.json").write_text(json.dumps({"spec": tuned[0][1]}))  # it needs its start no more
    core.run([*starts, *tuned], jobs=1)
    core.weights(starts[1][0]).mkdir(parents=True)
    core.run([*starts, *tuned], jobs=1)
    assert asked == [{starts[1][0]}, set()]
    planned = dict(core.plan(quick=False))
    lacking, there = "llama-128-4M-1", "memgpt-128-4M-1"
    core.weights(there).mkdir(parents=True)
    core.provide({lacking, there}, jobs=1)
    assert lacking in planned and asked[2] == {lacking, there}
    core.provide({there}, jobs=1)
    assert len(asked) == 3


def test_peers_without_pretraining_wait_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    (tmp_path / "ner").mkdir()
    monkeypatch.setenv("MEMGPT_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(tasks, "prepare", lambda name, source: None)
    monkeypatch.setattr(tasks, "start", lambda name: None)
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)
    monkeypatch.setattr(core, "provide", lambda names, jobs: asked.append(names))
    monkeypatch.setattr(runner, "run", lambda *arguments: None)
    for system in ("crf", "bert", "memgpt"):
        tasks.run([("cell", {"set": "wikigold", "system": system, "seed": 1})], jobs=1)
    assert asked == [set(), {"bert-128-4M-1"}, {"memgpt-128-4M-1"}]


def test_flops_count_every_matrix_and_what_attention_sees() -> None:
    model = gpu_cells.llama("tiny")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    width, layers, head = 128, 4, 512 * 128  # the output matrix is tied to the embeddings
    seen = sum(range(1, 33)) / 32
    assert gpu_cells.flops_per_token(model, 32) == 6 * (matrices + head + layers * 2 * width * seen)


def test_without_its_memory_the_base_costs_the_same() -> None:
    with torch.device("meta"):
        ours, peer = (peers.preset("base", memory) for memory in (True, False))
    assert 0.99 * peers.multiply_adds(ours) < peers.multiply_adds(peer) <= peers.multiply_adds(ours)
    active = sum(p.numel() for name, p in ours.named_parameters() if "memory_table" not in name)
    assert 30e6 < active < 60e6
    assert peer.config.memory_layers == []


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up text and tables below tmp_path, where the benchmarks work."""
    for module in (cells, task_cells):
        monkeypatch.setattr(module, "WORK", tmp_path)  # which toy() changes, for one test alone
    for module in (task_cells, tasks):
        monkeypatch.setattr(module, "STATISTICS", tmp_path)
    monkeypatch.setattr(peers, "VOCABULARY", 512)
    base.toy(tmp_path)


@pytest.mark.usefixtures("toy")
def test_a_base_is_pretrained_in_pieces_tuned_and_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "SHARD", 500_000)
    planned, results = base.plan(tiny=True), tmp_path / "results"
    del planned["base-wikigold-plain"], planned["base-movielens-memgpt"], planned["base-movielens-plain"]
    cells.prepare(tmp_path)
    with pytest.raises(TimeoutError, match="step 4 of 12"):
        base.measure("base-memgpt", planned["base-memgpt"], tmp_path, deadline=0)
    assert not base.run(planned, tmp_path, results, seconds=-1)
    assert not results.exists()
    capsys.readouterr()
    assert base.run(planned, tmp_path, results, seconds=3000)
    told = capsys.readouterr()
    assert "resuming at step 4 of 12" in told.err
    assert "6 of 6 cells are done" in told.out and "financial_phrasebank   plain" in told.out
    summary = base.summarise(planned, results)
    assert summary["pretrained"].keys() == {"base-memgpt", "base-plain"}
    assert summary["tasks"]["wikigold"]["memgpt"]["ci_low"] <= summary["tasks"]["wikigold"]["memgpt"]["score"]
    stored = summary["shards"]
    assert stored["files"] >= stored["total_bytes"] / 600_000 and stored["largest_bytes"] < 600_000


@pytest.mark.usefixtures("toy")
def test_what_a_way_to_tune_forgets_is_told_for_the_other_tasks_and_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_cells, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(task_cells, "SETTINGS", {name: {"epochs": 1} for name in tasks.TRIO.split("+")})
    monkeypatch.setattr(cells, "VALIDATION_ROWS", 32)
    cells.prepare(tmp_path)
    peers.preset("tiny").save_pretrained(cells.WORK / "cells/toy/model")
    task_cells.prepare(tasks.TRIO, tmp_path)
    shared = {"set": tasks.TRIO, "seed": 1, "core": "toy"}
    task_cells.run("joint", {**shared, "kind": "joint", "changes": {"steps": 4}})
    joint = json.loads((tmp_path / "results/joint.json").read_text())
    assert joint["text_loss"] != joint["text_loss_base"]
    assert {f"{task}_{stage}" for task in tasks.PEERS for stage in ("joint", "joint_then_tuned")} <= joint.keys()
    spec = {**shared, "kind": "forgetting", "part": "financial_phrasebank", "after": ["joint"]}
    found = {}
    for tune in ("prefix", "adapter"):
        found[tune] = task_cells.measure(tune, {**spec, "changes": {"tune": tune, "learning_rate": 0.01}})
        assert found[tune]["ner_before"] == joint["ner_trunk"]
        assert found[tune]["recommendation_before"] == joint["recommendation_trunk"]
    kept = found["prefix"]  # the trunk is as it was, so all else is
    assert kept["text_loss_after"] == joint["text_loss"]
    assert (kept["ner_after"], kept["recommendation_after"]) == (joint["ner_trunk"], joint["recommendation_trunk"])
    assert found["adapter"]["text_loss_after"] != joint["text_loss"]  # it was merged
    told = tasks.tuned({tune: {"spec": {**spec, "changes": {"tune": tune}}, **found[tune]} for tune in found})
    assert told["financial_phrasebank, prefix"].items() >= {"text": 0, "ner": 0, "recommendation": 0}.items()
    assert told["financial_phrasebank, adapter"]["text"] == round(
        joint["text_loss"] - found["adapter"]["text_loss_after"], 4
    )
    alone = {"wikigold-as_it_is-2": {"validation": 0.5}, "wikigold-as_it_is-3": {"validation": 0.6}}
    row = tasks.joint({**alone, "joint-plain-1": joint})["wikigold"]
    assert (row["single"], row["seeds (single)"], row["seeds (plain)"]) == (0.55, 2, 1)
    assert row["joint_then_tuned (plain)"] == joint["ner_joint_then_tuned"]


def test_shards_that_answer_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "VOCABULARY", 512)
    peers.preset("tiny").save_pretrained(tmp_path / "core/model")
    losses = iter([1.0, 1.02, 1.0, 1.005])
    monkeypatch.setattr(cells, "held_out", lambda *arguments: next(losses))
    with pytest.raises(ValueError, match=r"loss 1\.0200 and not 1\.0000"):
        base.shards(tmp_path / "core", tmp_path / "shards")
    assert base.shards(tmp_path / "core", tmp_path / "shards")["fits_into_git"] == ["embeddings", "blocks", "tables"]
