"""What the gate holds becomes champion on a person's word, and only what that person saw."""

import shutil
from functools import partial

import pytest
from conftest import ROOT
from judged_place import Place
from typer.testing import CliRunner

from memgpt import cli, registry, tracking
from memgpt.errors import UserError
from memgpt.stages import approve, promote, rollback

MODEL = "sentiment"


def aliases() -> dict[str, str]:
    return registry.aliases(tracking.client(), MODEL)


def test_asked_for_a_first_champion_waits_and_is_approved(place: Place) -> None:
    place.model(errors=0.2)
    verdict = promote.run(place.config, MODEL, ask=True)
    assert (verdict.verdict, verdict.version, verdict.champion) == ("hold", "1", None)
    assert verdict.reasons[0].startswith("waits for approval: first champion")
    assert aliases() == {"challenger": "1"}

    waiting = approve.held(tracking.client(), MODEL)
    assert (waiting.version, waiting.champion) == ("1", None)
    assert waiting.numbers["value"] > 0.7
    with pytest.raises(UserError, match="superseded, version 1 is the challenger"):
        approve.run(place.config, MODEL, approve=True, version="7")

    approve.run(place.config, MODEL, approve=True, version="1", actor="Ada", reason="read the mistakes")
    assert aliases() == {"champion": "1"}
    newest = registry.records(tracking.client(), MODEL)[0]
    assert (newest.data.tags["actor"], newest.data.tags["reason"]) == ("Ada", "read the mistakes")
    assert newest.data.metrics["value"] == waiting.numbers["value"]
    with pytest.raises(UserError, match="no version is held"):
        approve.run(place.config, MODEL, approve=True)


def test_rejected_it_leaves_the_champion(place: Place) -> None:
    place.model(errors=0.2)
    promote.run(place.config, MODEL)
    place.model(errors=0.1)
    assert promote.run(place.config, MODEL, ask=True).verdict == "hold"
    shutil.copy(ROOT / "params.yaml", place.root)
    decide = partial(CliRunner().invoke, cli.app, env={"MEMGPT_ACTOR": "Ben"})
    wrong = decide(["approve", MODEL, "--reject", "--version", "ner/2"])
    assert "ner/2: no such version" in str(wrong.exception)
    assert decide(["approve", MODEL, "--reject", "--version", "sentiment/2"]).exit_code == 0
    assert aliases() == {"champion": "1"}
    tags = registry.version_tags(tracking.client(), MODEL, "2")
    assert "by Ben" in tags["rejected"]
    assert "held" not in tags


def test_what_was_compared_with_another_champion_is_judged_anew(place: Place) -> None:
    for errors, ask in ((0.3, False), (0.2, False), (0.1, True)):
        place.model(errors=errors)
        promote.run(place.config, MODEL, ask=ask)
    assert aliases() == {"champion": "2", "challenger": "3"}
    rollback.run(place.config, MODEL)
    with pytest.raises(UserError, match="was compared with champion 2, and it is 1 now"):
        approve.run(place.config, MODEL, approve=True)
    assert aliases()["champion"] == "1"


def test_what_was_judged_otherwise_is_not_held(place: Place) -> None:
    place.model(errors=0.2)
    promote.run(place.config, MODEL)
    place.model(errors=0.1)
    promote.run(place.config, MODEL)
    tracking.client().set_registered_model_alias(registry.name(MODEL), "challenger", "1")
    with pytest.raises(UserError, match="is not held"):
        approve.held(tracking.client(), MODEL)


def test_a_version_that_does_not_load_stays_held(place: Place) -> None:
    place.model(errors=0.2)
    promote.run(place.config, MODEL, ask=True)
    weights = next((place.root / "mlartifacts").rglob("config.json"))
    weights.write_text('{"errors": {}, "breaks": "load"}', encoding="utf-8")
    with pytest.raises(UserError, match="it stays held"):
        approve.run(place.config, MODEL, approve=True)
    assert aliases() == {"challenger": "1"}
