"""The record of a model's champion, where a version came from, and the same version made again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from judged_place import Place, settle
from typer.testing import CliRunner

from memgpt import cli, doctor, history, lineage, provenance, registry, tracking
from memgpt.errors import UserError
from memgpt.registry import Change

MODEL = "sentiment"


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = settle(tmp_path / "root", database, monkeypatch)
    (place.root / "params.yaml").write_text("x: 1\n", encoding="utf-8")
    return place


def version(place: Place, errors: float, verdict: Any = "promote", **said: Any) -> str:
    """A registered version on which a decision is recorded, without the gate's processes."""
    place.model(errors=errors)
    client = tracking.client()
    number = registry.register(client, registry.candidate(MODEL))
    champion = registry.aliases(client, MODEL).get("champion")
    numbers = {"value": 1 - errors, "ci_low": 0.5, "ci_high": 1.0, "rows": 300.0}
    registry.carry_out(
        client, Change(MODEL, verdict, number, champion, ["[gate] says"], "Ada", numbers=numbers, **said)
    )
    return number


def told(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ner", ("ner", None)),
        ("ner@champion", ("ner", "champion")),
        ("ner@3", ("ner", "3")),
        ("ner/3", ("ner", "3")),
        ("memgpt-ner@champion", ("ner", "champion")),
        ("models:/memgpt-ner/3", ("ner", "3")),
        ("models:/memgpt-ner@champion", ("ner", "champion")),
    ],
)
def test_a_version_has_one_grammar(text: str, meant: tuple[str, str | None]) -> None:
    assert registry.parse(text) == meant


@pytest.mark.parametrize("text", ["news", "ner/", "models/ner", "ner@", "ner:3", "memgpt-"])
def test_what_names_no_version_is_told(text: str) -> None:
    with pytest.raises(UserError, match="no such model; one of base, ner"):
        registry.parse(text)


def test_a_name_is_resolved_to_a_number_or_told(place: Place) -> None:
    client = tracking.client()
    with pytest.raises(UserError, match=r"has no champion, .*`memgpt promote sentiment` makes one"):
        registry.resolve(client, MODEL)
    version(place, 0.1)
    assert registry.resolve(client, "memgpt-sentiment@champion") == (MODEL, "1")
    assert registry.resolve(client, "sentiment") == registry.resolve(client, "sentiment/1") == (MODEL, "1")
    with pytest.raises(UserError, match="no such version; there are 1"):
        registry.resolve(client, "sentiment/7")
    with pytest.raises(UserError, match="known aliases: champion"):
        registry.resolve(client, "sentiment@best")


def test_history_tells_every_move_and_on_request_every_decision(place: Place) -> None:
    with pytest.raises(UserError, match="no decision is recorded"):
        history.of(tracking.client(), MODEL)
    version(place, 0.2, reason="first release")
    version(place, 0.1)
    version(place, 0.4, "reject")
    registry.carry_out(tracking.client(), Change(MODEL, "rollback", "1", "2", ["from version 2"], "Bo", "complaints"))
    moves = json.loads(told("history", MODEL, "--json"))
    assert [(each["verdict"], each["before"], each["version"], each["who"], each["why"]) for each in moves] == [
        ("rollback", "2", "1", "Bo", "complaints"),
        ("promote", "1", "2", "Ada", ""),
        ("promote", None, "1", "Ada", "first release"),
    ]
    assert moves[1]["numbers"]["value"] == 0.9
    assert [each["verdict"] for each in json.loads(told("history", MODEL, "--all", "--json"))][1] == "reject"
    shown = told("history", MODEL)
    for part in ("complaints; from version 2", "first release; [gate] says", "0.800 [0.500, 1.000], 300 rows"):
        assert part in shown
    assert "reject" not in shown


def test_lineage_goes_both_ways(place: Place) -> None:
    version(place, 0.1)
    commit = place.git("rev-parse", "HEAD")
    found = json.loads(told("lineage", "memgpt-sentiment@champion", "--json"))
    assert (found["version"], found["aliases"], found["commit"]) == ("models:/memgpt-sentiment/1", ["champion"], commit)
    assert found["params"] == {"epochs": 1}
    assert found["metrics"]["value"] == 0.9
    tables = lineage.digest("data/tables/sentiment")
    assert found["sources"]["sentiment"] == {"uri": "sample://newsroom", "licence": None, "sha256": tables}
    assert found["inputs"] == {"data/tables/sentiment": tables}
    shown = told("lineage", "sentiment/1")
    for part in (commit, "epochs=1", "none, by hand", tables[:16], "memgpt reproduce sentiment/1 --data"):
        assert part in shown

    assert json.loads(told("lineage", "data/tables/sentiment", "--json")) == {"sentiment/1": ["data of sentiment"]}
    assert "sentiment/1" in told("lineage", commit[:10])
    for nothing in ("0" * 10, commit[:3], "nowhere"):
        with pytest.raises(UserError, match="neither a version"):
            told("lineage", nothing)


def test_parents_and_children_know_each_other(place: Place) -> None:
    version(place, 0.3)
    mother = registry.version_tags(tracking.client(), MODEL, "1")["weights"]
    directory = place.root / "mother"
    (place.root / "models/sentiment").rename(directory)
    place.model(errors=0.1)
    lineage.write(place.root / "models/sentiment", "finetune@sentiment", [], {}, directory, 1, {})
    registry.register(tracking.client(), registry.candidate(MODEL))
    assert provenance.of(tracking.client(), MODEL, "1")["children"] == ["sentiment/2"]
    child = provenance.of(tracking.client(), MODEL, "2")
    assert (child["parent"], child["parent_versions"]) == (mother, ["sentiment/1"])


def test_a_version_that_something_else_registered_is_told(place: Place) -> None:
    client = tracking.client()
    client.create_registered_model("memgpt-sentiment")
    client.create_model_version("memgpt-sentiment", (place.root / "elsewhere").as_uri())
    shutil.copy(ROOT / "params.yaml", place.root)
    for command in (["lineage", "sentiment/1"], ["reproduce", "sentiment/1"], ["score", "sentiment/1", "in", "out"]):
        with pytest.raises(UserError, match=r"sentiment/1: lacks lineage \(.*labels.*\); choose another"):
            told(*command)


def test_a_store_of_artifacts_that_is_away_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = tracking.client()
    run = client.create_run(client.create_experiment("remote", "s3://bucket/remote")).info
    client.create_registered_model("memgpt-sentiment")
    tags = {**dict.fromkeys(registry.REQUIRED, "x"), "mlflow_run": run.run_id}
    client.create_model_version("memgpt-sentiment", f"{run.artifact_uri}/model", run.run_id, tags=tags)
    client.set_registered_model_alias("memgpt-sentiment", "champion", "1")
    for command in (["lineage", "sentiment"], ["reproduce", "sentiment"]):
        monkeypatch.setattr("sys.argv", ["memgpt", *command])
        with pytest.raises(SystemExit, match=r"error: the artifact store: .*127\.0\.0\.1:9.*; check AWS_ENDPOINT_URL"):
            cli.main()
    assert "broken  registry       the artifact store: Could not connect" in "\n".join(doctor.lines(doctor.examine()))


STAGES = """
stages:
  ingest:
    foreach: [corpus, sentiment]
    do:
      cmd: mkdir -p data/tables/${item} && cp params.yaml data/tables/${item}/rows
      deps: [params.yaml]
      outs:
        - data/tables/${item}
  evaluate:
    foreach: [sentiment]
    do:
      cmd: python make.py
      deps: [data/tables/sentiment, make.py]
      outs:
        - models/sentiment
        - reports/metrics/sentiment.json: {cache: false}
"""
MAKE = """
import json, os, pathlib
from safetensors.numpy import save_file
import numpy as np
value = float(pathlib.Path("data/tables/sentiment/rows").read_text().partition(": ")[2])
assert os.environ.get("MEMGPT_SLOTS") == "2"
pathlib.Path("models/sentiment").mkdir(parents=True, exist_ok=True)
pathlib.Path("reports/metrics").mkdir(parents=True, exist_ok=True)
save_file({"w": np.array([value])}, "models/sentiment/model.safetensors")
report = {"primary": "f1", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 9, "baseline": 0.1}
pathlib.Path("reports/metrics/sentiment.json").write_text(json.dumps(report))
"""


def test_a_version_is_made_again_with_the_params_it_was_made_with(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMGPT_SLOTS", "2")  # the machine's limit holds there too
    for folder in ("data/tables/sentiment", "data/tables/corpus"):
        place.git("rm", "-rq", "--cached", folder)
    (place.root / ".gitignore").write_text(
        ".memgpt/\nmlflow.db\nmlartifacts/\ncode/\n/models\n/reports\n/data/tables\n", encoding="utf-8"
    )
    (place.root / "dvc.yaml").write_text(STAGES, encoding="utf-8")
    (place.root / "make.py").write_text(MAKE, encoding="utf-8")
    (place.root / "params.yaml").write_text("x: 0.5\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    place.git("add", ".")
    place.git("commit", "-qm", "pipeline")
    (place.root / "params.yaml").write_text("x: 0.75\n", encoding="utf-8")  # as `memgpt retrain --set` leaves it
    manifests = {name: (place.root / f"data/tables/{name}/manifest.json").read_text() for name in ("corpus", MODEL)}
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], env=here, check=True)
    for name, text in manifests.items():
        (place.root / f"data/tables/{name}/manifest.json").write_text(text, encoding="utf-8")
    lineage.write(place.root / "models/sentiment", "finetune@sentiment", [], {}, None, 1, {})
    client = tracking.client()
    registry.register(client, registry.candidate(MODEL))
    (place.root / "params.yaml").write_text("x: 0.1\n", encoding="utf-8")

    said: list[str] = []
    made = provenance.reproduce(client, MODEL, "1", said.append)
    assert made.match == "identical"
    assert made.metrics["value"] == (0.75, 0.75)
    assert any("uncommitted changes" in note for note in made.notes)
    assert any("Running stage" in line for line in said)
    assert "sentiment/1: identical" in told("reproduce", "sentiment/1")
    assert not (place.root / ".memgpt/worktrees/sentiment-1").exists()
    told("reproduce", "sentiment/1", "--data")
    assert (place.root / ".memgpt/worktrees/sentiment-1/data/tables/corpus/rows").read_text() == "x: 0.75\n"

    before = json.loads(registry.version_tags(client, MODEL, "1")["metrics"])
    for value, match in ((0.8, "within the interval"), (0.9, "differs")):  # as if it had scored otherwise then
        shifted = {**before, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        client.set_model_version_tag("memgpt-sentiment", "1", "metrics", json.dumps(shifted))
        assert provenance.reproduce(client, MODEL, "1", said.append).match == match
    client.set_model_version_tag("memgpt-sentiment", "1", "commit", "0" * 40)
    with pytest.raises(UserError, match="commit 000"):
        provenance.reproduce(client, MODEL, "1", said.append)
