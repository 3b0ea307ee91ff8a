"""The gate blocks what it must, promotes what it may, and a kill between any two steps leaves a registry that mends."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_place import Place, pack, settle

from memgpt import gate, packaging, registry, tracking
from memgpt.config import Gate
from memgpt.errors import UserError
from memgpt.stages import promote, rollback

MODEL = "sentiment"


def run(place: Place, **options: Any) -> promote.Verdict:
    return promote.run(place.config, MODEL, **options)


def tags(version: str) -> dict[str, str]:
    return registry.version_tags(tracking.client(), MODEL, version)


def aliases() -> dict[str, str]:
    return registry.aliases(tracking.client(), MODEL)


def records(**wanted: str) -> list[Any]:
    """Promotion records, the newest first."""
    found = tracking.client().search_runs([tracking.experiment(tracking.PROMOTIONS)])
    return [each for each in found if all(each.data.tags[key] == value for key, value in wanted.items())]


def rules(place: Place, **changes: Any) -> None:
    section = place.config.promote.sentiment.model_copy(update=changes)
    place.config = place.config.model_copy(
        update={"promote": place.config.promote.model_copy(update={"sentiment": section})}
    )


def test_promoted_unchanged_then_improved_and_rolled_back(place: Place) -> None:
    """The life of a champion, in one go because each version's process takes seconds."""
    place.model(errors=0.2)
    first = run(place, actor="Ada", reason="first release")
    assert (first.verdict, first.version, first.metric) == ("promote", "1", "macro_f1")
    assert aliases() == {"champion": "1"}
    written = json.loads((place.root / ".memgpt/verdicts/sentiment.json").read_text())
    assert (written["verdict"], written["version"]) == ("promote", "1")

    lineage_tags = tags("1")
    assert registry.missing_lineage(lineage_tags) == []
    assert lineage_tags["commit"] == place.git("rev-parse", "HEAD")
    assert lineage_tags["dirty"] == "false"
    assert json.loads(lineage_tags["labels"]) == ["negative", "neutral", "positive"]
    assert json.loads(lineage_tags["metrics"])["macro_f1" if "macro_f1" in lineage_tags else "value"] == 0.8
    [record] = records(state="done")
    wanted = {
        "model": MODEL,
        "verdict": "promote",
        "from": "none",
        "to": "1",
        "actor": "Ada",
        "reason": "first release",
    }
    assert wanted.items() <= record.data.tags.items()
    assert record.data.metrics["value"] == pytest.approx(0.8, abs=0.06)
    assert record.data.metrics["over_baseline_low"] > 0
    assert record.data.metrics["latency_ms"] > 0

    again = run(place)
    assert (again.verdict, again.version) == ("unchanged", "1")
    assert len(registry.versions(tracking.client(), MODEL)) == 1

    place.model(errors=0.02)
    better = run(place)
    assert (better.verdict, better.version) == ("promote", "2")
    assert aliases() == {"champion": "2"}
    assert "version 2" in tags("1")["superseded"]
    newest = records(state="done")[0].data.metrics
    assert newest["difference_low"] > 0
    assert newest["size_ratio"] == pytest.approx(1.0)
    assert newest["latency_ratio"] > 0

    place.model(errors=0.4)  # a planted regression
    worse = run(place)
    assert (worse.verdict, worse.version) == ("hold", "3")
    assert "worse than the champion" in worse.reasons[-1]
    assert aliases() == {"champion": "2", "challenger": "3"}
    assert "worse" in tags("3")["held"]

    back = rollback.run(place.config, MODEL, actor="Bo", reason="complaints")
    assert (back.before, back.version) == ("2", "1")
    assert aliases()["champion"] == "1"
    assert "superseded" not in tags("1")
    assert "by Bo" in tags("2")["rolled_back"]
    assert records(verdict="rollback")[0].data.tags["reason"] == "complaints"

    place.model(errors=0.02)  # the weights that were rolled back from come again
    held = run(place)
    assert (held.verdict, held.version) == ("hold", "2")
    assert "has the same weights and was rolled back" in held.reasons[-1]
    released = run(place, replace=True)
    assert (released.verdict, released.version) == ("promote", "2")
    assert not {"rolled_back", "held"} & tags("2").keys()


def test_a_first_model_below_the_floor_or_the_baseline_is_rejected(place: Place) -> None:
    place.model(errors=0.8)
    rejected = run(place)
    assert rejected.verdict == "reject"
    assert "below the floor" in rejected.reasons[0]
    assert aliases() == {}
    assert "below the floor" in tags("1")["rejected"]
    rules(place, floor=0.0)
    assert "not better than the simple baseline" in run(place).reasons[0]
    assert len(registry.versions(tracking.client(), MODEL)) == 1  # the same content is one version


def test_a_report_of_another_model_holds(place: Place) -> None:
    place.model(errors=0.2)
    place.report(value=0.99, ci_low=0.98, ci_high=1.0)
    held = run(place)
    assert held.verdict == "hold" and not aliases().get("champion")
    assert "says 0.9900, but the version scores 0." in held.reasons[0]
    assert "run `memgpt evaluate sentiment` and promote again" in held.reasons[0]


def test_a_slice_that_drops_is_rejected(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_label(rows: list[dict[str, Any]], _tables: Path) -> dict[str, np.ndarray]:
        return {"negative": np.array([row["label"] == "negative" for row in rows])}

    monkeypatch.setattr("memgpt.tasks.sentiment.slices", by_label)
    rules(place, slices={"negative": 0.05})
    place.model(errors={"negative": 0.0, "neutral": 0.4, "positive": 0.4})
    assert run(place).verdict == "promote"
    place.model(errors={"negative": 0.3, "neutral": 0.0, "positive": 0.0})
    rejected = run(place)
    assert rejected.verdict == "reject"
    assert "slice negative" in rejected.reasons[0]
    rules(place, slices={"negativ": 0.05})
    with pytest.raises(UserError, match=r"promote\.sentiment\.slices\.negativ"):
        run(place)
    assert aliases()["champion"] == "1"


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        ("load", "does not load: "),
        ("predict", "does not predict: "),
        ("die", "its process ended with 7"),
        ("format", "does not predict in the format"),
        ("short", "not one answer for each of 300 inputs"),
    ],
)
def test_a_version_that_does_not_load_or_predict_is_rejected(place: Place, breaks: str, message: str) -> None:
    place.model(breaks=breaks)
    verdict = run(place)
    assert verdict.verdict == "reject"
    assert message in verdict.reasons[0]
    assert aliases() == {}


def test_missing_lineage_registers_nothing(place: Place) -> None:
    place.model()
    path = place.root / "models/sentiment/lineage.json"
    story = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in story.items() if key != "inputs"}))
    with pytest.raises(UserError, match=r"lineage\.json: lacks inputs"):
        run(place)
    path.unlink()
    with pytest.raises(UserError, match=r"lineage\.json: missing"):
        run(place)
    place.model()
    (place.root / "reports/metrics/sentiment.json").unlink()
    with pytest.raises(UserError, match=r"sentiment\.json: missing; run `memgpt evaluate sentiment`"):
        run(place)
    place.report()
    place.lock.unlink()
    with pytest.raises(UserError, match=r"sources\.lock\.json: missing"):
        run(place)
    assert tracking.client().search_registered_models() == []


def test_a_version_without_lineage_is_no_target_and_no_measure(place: Place) -> None:
    """A version registered by hand, without tags: not rolled back to; as champion, not comparable."""
    client = tracking.client()
    place.model()
    run(place)
    made = client.create_model_version(registry.name(MODEL), client.get_model_version(registry.name(MODEL), "1").source)
    with pytest.raises(UserError, match="lacks lineage"):
        rollback.run(place.config, MODEL, version=made.version)
    client.set_registered_model_alias(registry.name(MODEL), "champion", made.version)
    place.model(errors=0.05)
    held = run(place)
    assert held.verdict == "hold"
    assert "not comparable" in held.reasons[0]


@pytest.mark.parametrize("change", [{"labels": ["negative", "other", "positive"]}, {"family": "file:reviews"}])
def test_another_label_set_or_source_family_is_held(place: Place, change: dict[str, Any]) -> None:
    place.model(errors=0.1)
    run(place)
    place.manifest(MODEL, **change)
    place.model(errors=0.0)
    held = run(place)
    assert held.verdict == "hold"
    assert held.reasons[0].startswith("not comparable: other ")
    assert aliases() == {"champion": "1", "challenger": "2"}
    released = run(place, replace=True, actor="Ada", reason="new labels agreed")
    assert (released.verdict, released.version) == ("promote", "2")
    assert records(verdict="promote")[0].data.tags["reason"] == "new labels agreed"


def test_each_version_predicts_with_its_own_code(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule, but the second version's packaged code marks its answers: neither reads the other's, nor ours."""
    place.model(errors=0.2)
    run(place)
    monkeypatch.setattr(packaging, "CODE", pack(place.root / "code2" / "memgpt", extra='{"made_by": "second"}'))
    place.model(errors=0.02)
    assert run(place).verdict == "promote"
    made_by = []
    for number in ("1", "2"):
        with gate.Version(registry.uri(MODEL, number), place.root / "asked", 1) as version:
            version.ask(["test number 1"])
            made_by.append(version.answer()[0].get("made_by"))
    assert made_by == [None, "second"]
    assert tags("1")["code"] != tags("2")["code"]


def test_a_version_that_brings_no_code_is_rejected(place: Place) -> None:
    """Without its own code it would silently predict with whatever memgpt is installed."""
    import mlflow
    from mlflow.models import Model

    place.model()
    original = packaging.save

    def without_code(model: str, directory: Path, card: str, target: Path, run_id: str) -> None:
        original(model, directory, card, target, run_id)
        saved = Model.load(str(target))
        del saved.flavors["python_function"]["code"]
        saved.save(str(target / "MLmodel"))

    assert mlflow.__version__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaging, "save", without_code)
        verdict = run(place)
    assert verdict.verdict == "reject"
    assert "does not load" in verdict.reasons[0]


def test_a_champion_that_is_gone_is_replaced_on_request_only(place: Place) -> None:
    import shutil

    place.model(errors=0.2)
    run(place)
    shutil.rmtree(place.root / "mlartifacts")
    held = run(place)  # the same weights, but nobody can load the champion: not "unchanged"
    assert (held.verdict, held.version) == ("hold", "2")
    assert "version" in held.reasons[0] or "does not load" in held.reasons[0]
    assert run(place, replace=True).verdict == "promote"


def test_the_commit_is_dirty_by_what_people_change(place: Place) -> None:
    assert registry.commit_at_start(place.root)[1] is False
    (place.root / "dvc.lock").write_text("stages: {}\n")
    place.model()  # models/ and reports/ are the pipeline's own work
    assert registry.commit_at_start(place.root)[1] is False
    (place.root / "code.py").write_text("one = 2\n")
    assert registry.commit_at_start(place.root)[1] is True


def test_a_flows_commit_and_run_are_taken_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMGPT_COMMIT", "abc123-dirty")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "11111111-2222")
    place.model()
    candidate = registry.candidate(MODEL)
    assert (candidate.tags["commit"], candidate.tags["dirty"]) == ("abc123", "true")
    assert candidate.tags["flow_run"] == "11111111-2222"
    assert registry.actor() == "flow run 11111111-2222"


WRITES = (
    "create_registered_model",
    "create_run",
    "log_batch",
    "log_artifacts",
    "create_model_version",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "delete_model_version_tag",
    "set_tag",
    "set_terminated",
)


def dies_at(step: int) -> Callable[[], None]:
    """Count the writing calls to MLflow from now on and die before number `step`, as by kill -9."""
    from mlflow import MlflowClient

    count = iter(range(1, 1_000_000))

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            if next(count) == step:
                os._exit(99)
            return call(*arguments, **options)

        return instead

    for name in WRITES:
        setattr(MlflowClient, name, watched(getattr(MlflowClient, name)))
    return lambda: None


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The verdict without the versions' processes: here only the steps around it count."""

    def verdict(_config: Any, client: Any, candidate: Any, version: str, *_: Any) -> gate.Decision:
        registry.challenge(client, candidate.model, version)
        return gate.Decision("promote", ["better"], {"value": 0.9})

    monkeypatch.setattr(promote, "_judge", verdict)
    yield


def test_killed_between_any_two_steps_the_registry_mends(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch, quick_judge: None
) -> None:
    step = died = 0
    while True:
        step += 1
        with pytest.MonkeyPatch.context() as patch:
            place = settle(tmp_path / f"at{step}", database, patch)
            place.model(errors=0.2)
            assert run(place).version == "1"
            place.model(errors=0.1)

            def killed(place: Place = place, step: int = step) -> None:
                dies_at(step)
                run(place)

            status = in_child(killed)
            assert status in (0, 99)
            found = registry.versions(tracking.client(), MODEL)
            assert aliases()["champion"] in ("1", "2")
            assert all(not registry.missing_lineage(version.tags) for version in found)

            verdict = run(place)
            assert verdict.verdict in ("promote", "unchanged")
            assert aliases() == {"champion": "2"}
            assert len(registry.versions(tracking.client(), MODEL)) == 2
            assert "superseded" in tags("1")
            assert "promoted" in tags("2")
            assert len(records(state="done", verdict="promote", to="2")) == 1
            assert records(state="intent") == []
            stages = tracking.client().search_runs([tracking.experiment(tracking.STAGES)], "status = 'RUNNING'")
            assert stages == []
        if status == 0:
            break
        died += 1
    assert died >= 10


def test_an_unfinished_rollback_is_settled(place: Place, quick_judge: None) -> None:
    """Killed before the alias moves: abandoned. Killed after it: finished."""
    for errors in (0.2, 0.1):
        place.model(errors=errors)
        run(place)
    client = tracking.client()
    change = registry.Change(MODEL, "rollback", "1", "2", ["from version 2"], "Bo")

    def killed(before: str) -> None:
        from mlflow import MlflowClient

        setattr(MlflowClient, before, lambda *_, **__: os._exit(99))
        registry.carry_out(tracking.client(), change)

    assert in_child(lambda: killed("set_registered_model_alias")) == 99
    assert registry.reconcile(client, MODEL) == ["sentiment: abandoned an unfinished rollback of version 1"]
    assert aliases() == {"champion": "2"}
    assert in_child(lambda: killed("set_model_version_tag")) == 99
    assert registry.reconcile(client, MODEL) == ["sentiment: finished an unfinished rollback of version 1"]
    assert aliases() == {"champion": "1"}
    assert "rolled_back" in tags("2")
    assert [each.data.tags["state"] for each in records(verdict="rollback")] == ["done", "abandoned"]
    assert registry.reconcile(client, MODEL) == []


def test_rollback_refuses_what_cannot_serve(place: Place, quick_judge: None) -> None:
    with pytest.raises(UserError, match="has no champion"):
        rollback.run(place.config, MODEL)
    place.model(errors=0.2, breaks="load")
    run(place)
    with pytest.raises(UserError, match="no version was champion before 1"):
        rollback.run(place.config, MODEL)
    place.model(errors=0.1)
    run(place)
    with pytest.raises(UserError, match=r"does not load.*the champion stays 2"):
        rollback.run(place.config, MODEL)
    with pytest.raises(UserError, match="no such version"):
        rollback.run(place.config, MODEL, version=9)
    with pytest.raises(UserError, match="is the champion already"):
        rollback.run(place.config, MODEL, version=2)
    assert aliases()["champion"] == "2"


def test_params_have_rules_for_every_model(place: Place) -> None:
    for model in ("base", "ner", "sentiment", "recommendation"):
        assert isinstance(getattr(place.config.promote, model), Gate)
