"""Monitoring: stated rates hold, real surges and drifts are found and told once, a text is scored once."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from judged_place import Place, gold, settle
from scipy.stats import betabinom
from tokenizers import ByteLevelBPETokenizer
from typer.testing import CliRunner

from memgpt import cli, config, monitoring, newsroom, registry, scoring, tables, tracking
from memgpt.errors import UserError
from memgpt.monitoring import Counts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import monitoring as simulation

ROOT = Path(__file__).parents[1]
SETTINGS = config.load(ROOT / "params.yaml").monitor
MONDAY = date(2024, 6, 3)
REFERENCE = Path("reference")


# ---- surges, by simulation


@pytest.mark.parametrize("texts", [[5] * 7, [12] * 5 + [3] * 2, [30] * 7])
@pytest.mark.parametrize("rho", [0.0, 0.03])
def test_false_alarms_are_no_more_than_stated(texts: list[int], rho: float) -> None:
    """One per topic and year is stated; 10,500 days are judged, 29 alarms allowed."""
    share = [0.3] + [0.2] * 4 + [0.12] * 2
    assert 0.03 < simulation.rate(np.random.default_rng(1), 1500, texts, share, rho) < 1.3


def test_more_false_alarms_are_had_for_the_asking() -> None:
    negative, texts = simulation.draw(np.random.default_rng(2), 4000, 7 * 12 + 3, [30] * 7, [0.2] * 7, 0.02)
    assert 10 < 365 * simulation.alarms(negative, texts, 12, 30.0).mean() < 33


def test_a_doubled_share_is_found() -> None:
    """20 % to 40 % negative at 30 texts a day: usually by the third day, nearly always within the week."""
    found = simulation.power(np.random.default_rng(3), 1000, 30, 0.2, 0.4, 0.0)
    assert found[2] > 0.7 and found[6] > 0.93


def test_chances_are_those_of_the_beta_binomial() -> None:
    mean, spread = np.array([0.2, 0.5]), np.array([0.05, 0.3])
    chances = monitoring.survival(np.array([12, 7]), mean, spread)
    for row, n in enumerate((12, 7)):
        a, b = (part * (1 / spread[row] - 1) for part in (mean[row], 1 - mean[row]))
        np.testing.assert_allclose(chances[row, : n + 1], betabinom.sf(np.arange(n + 1) - 1, n, a, b), rtol=1e-7)


def counts(share: list[float], texts: int = 60, days: int = 7 * 12, today: float = 0.2) -> Counts:
    """Of days from a Monday on, as negative as their weekday's share; one more follows."""
    rng = np.random.default_rng(4)
    negative = [rng.binomial(texts, share[day % 7]) for day in range(days)]
    return Counts(MONDAY, np.array([*negative, round(today * texts)]), np.full(days + 1, texts))


def test_a_share_that_its_weekday_always_has_is_no_surge() -> None:
    mondays = [0.5] + [0.15] * 6
    for days, found in ((7 * 13, False), (7 * 13 + 2, True)):  # the next is a Monday, a Wednesday
        surge = monitoring.judge(
            SETTINGS, "energy", counts(mondays, days=days, today=0.5), MONDAY + timedelta(days), 1.0
        )
        assert (surge is not None) == found


def test_a_day_is_judged_again_when_more_of_it_comes_late() -> None:
    def rows(day: date, negative: int, others: int) -> list[dict]:
        labels = ["negative"] * negative + ["positive"] * others
        return [{"topic": "steel", "day": day, "label": label} for label in labels]

    last = MONDAY + timedelta(60)
    known = [row for day in range(60) for row in rows(MONDAY + timedelta(day), 6, 54)]
    state = {"looks": {}, "surges": [], "drift": {}}

    def look(today: date) -> list[str]:
        report = monitoring.Report("models:/memgpt-sentiment/1", "texts", 0, 0, None)
        frame = pd.DataFrame(known)
        return [surge.day for surge in monitoring._judge(SETTINGS, frame, today, state, report).surges]

    known += rows(last, 3, 27)
    assert not look(last)
    known += rows(last + timedelta(1), 0, 1)  # the next day has begun
    assert not look(last + timedelta(1))
    known += rows(last, 55, 5)  # and most of the one before arrives
    assert look(last + timedelta(1)) == [last.isoformat()]


def test_many_looks_at_one_day_spend_what_one_may() -> None:
    for looks in (1, 24):
        spent = 0.0
        for look in range(1, looks + 1):
            spent += monitoring.spend(spent, over=False, filled=1.5 * look / looks)  # more texts than usual
        assert spent == pytest.approx(0.5)
        spent += monitoring.spend(spent, over=True, filled=1.5)
        assert spent == pytest.approx(0.9)
        for _ in range(5):  # texts that come late
            spent += monitoring.spend(spent, over=True, filled=1.6)
        assert 0.99 < spent <= 1
    assert monitoring.alarm_level(2.0, 1.0) * len(monitoring.WINDOWS) == pytest.approx(2 / 365)


def test_a_topic_with_too_little_past_is_not_judged() -> None:
    short = counts([0.1] * 7, days=SETTINGS.least_days - 1, today=1.0)
    assert monitoring.judge(SETTINGS, "new", short, MONDAY + timedelta(SETTINGS.least_days - 1), 1.0) is None
    enough = counts([0.1] * 7, days=SETTINGS.least_days, today=1.0)
    surge = monitoring.judge(SETTINGS, "new", enough, MONDAY + timedelta(SETTINGS.least_days), 1.0)
    assert surge is not None and surge.negative == 60
    assert surge.summary.startswith("new: 60 of 60 texts negative on 2024-06-17, ")


# ---- a place where texts arrive


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Place]:
    """A checkout with a champion that answers `gold`, the newsroom's tables, and a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        made = settle(tmp_path_factory.mktemp("monitoring") / "root", database, patch)
        made.model(errors=0.0)
        version = registry.register(tracking.client(), registry.candidate("sentiment"))
        change = registry.Change("sentiment", "promote", version, None, ["by a test"], "test")
        registry.carry_out(tracking.client(), change)
        train = newsroom.generate(scale=0.5)["sentiment"]["train"]
        rows = pa.Table.from_pandas(train, schema=tables.SCHEMAS["sentiment"], preserve_index=False)
        tables.write(rows, monitoring.TRAIN)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(train["text"], vocab_size=600, show_progress=False)
        monitoring.TOKENIZER.parent.mkdir(parents=True)
        tokenizer.save(str(monitoring.TOKENIZER))
        monitoring.keep_reference(REFERENCE, "1")
        shutil.copy(ROOT / "params.yaml", made.root)
        yield made


@pytest.fixture(scope="module")
def ask(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The champion's process, one for all tests: starting it takes seconds."""
    with scoring.asking(place.config, "sentiment", "1", tmp_path_factory.mktemp("version")) as made:
        yield made


@pytest.fixture
def asked(place: Place, ask: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that the champion is asked."""
    texts: list[str] = []

    def answer(rows: list[scoring.Row]) -> list[Any]:
        texts.extend(row["text"] for row in rows)
        return ask(rows)

    monkeypatch.chdir(place.root)
    monkeypatch.setattr(scoring, "asking", lambda *arguments: nullcontext(answer))
    yield texts
    for path in ("arriving", str(monitoring.FOLDER)):
        shutil.rmtree(path, ignore_errors=True)


def arrive(name: str, rows: list[dict[str, Any]]) -> None:
    Path("arriving").mkdir(exist_ok=True)
    (Path("arriving") / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def day(when: date, negative: int, others: int, topic: str = "energy") -> list[dict[str, Any]]:
    """A day's rows, so many of them negative to the champion."""
    rows: list[dict[str, Any]] = []
    left, number = {True: negative, False: others}, 0
    while any(left.values()):
        text = f"{topic} {when} {number}"
        if left[gold(text) == "negative"]:
            left[gold(text) == "negative"] -= 1
            rows.append({"id": text, "text": text, "topic": topic, "time": f"{when}T08:00:00"})
        number += 1
    return rows


def past(days: int = 30, topic: str = "energy") -> list[dict[str, Any]]:
    return [row for d in range(days) for row in day(MONDAY + timedelta(d), 1 + d % 3, 8, topic)]


def run(place: Place, now: date = MONDAY + timedelta(90), **changes: Any) -> monitoring.Report:
    section = place.config.monitor.model_copy(update={"uri": "arriving", "drift_texts": 10**6, **changes})
    settings = place.config.model_copy(update={"monitor": section})
    return monitoring.run(settings, now=datetime(now.year, now.month, now.day, 12, tzinfo=UTC))


def test_a_surge_is_found_told_once_and_drawn(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", past() + past(topic="retail/food"))
    calm = run(place)
    assert (calm.new, calm.surges, calm.day) == (600, [], "2024-07-02")
    assert calm.summary == "600 new texts; nothing unusual"
    arrive("b.jsonl", day(MONDAY + timedelta(30), 12, 3) + day(MONDAY + timedelta(30), 2, 8, "retail/food"))
    [surge] = run(place).surges
    assert (surge.topic, surge.day, surge.negative, surge.texts) == ("energy", "2024-07-03", 12, 15)
    assert surge.limit < 12 and 1 < surge.expected < 5
    again = run(place)
    assert again.surges == [surge]  # until it is told
    monitoring.announce(again)
    assert run(place).surges == []
    arrive("c.jsonl", day(MONDAY + timedelta(30), 16, 3)[-4:])  # more of the same day
    assert run(place).surges == []
    for topic in ("energy", "retail/food"):
        assert monitoring.picture(monitoring.FOLDER, topic).read_bytes().startswith(b"\x89PNG")


def test_a_topic_that_fell_silent_long_ago_is_drawn_too(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", day(MONDAY, 1, 2, "old") + day(MONDAY + timedelta(80), 1, 2))
    run(place)
    for topic in ("old", "energy"):
        assert monitoring.picture(monitoring.FOLDER, topic).exists()


def test_each_topic_has_a_picture_of_its_own() -> None:
    names = {monitoring.picture(Path(), topic).name for topic in ("R-D", "R&D", "R/D", "r-d")}
    assert len(names) == 4
    assert "R-D.png" in names


def test_a_topic_may_be_long_or_look_like_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    topics = ["energy", "prices of energy " * 20, "\N{CYRILLIC CAPITAL LETTER ZHE}" * 200, r"$\frac{$"]
    rows = [{"topic": topic, "day": MONDAY, "label": "negative"} for topic in topics]
    drawn: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", drawn.append)
        monitoring._draw(SETTINGS, pd.DataFrame(rows), tmp_path)
    for figure in drawn:
        title = figure.axes[0].title.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= figure.bbox.width
        plt.close(figure)
    assert all(monitoring.picture(tmp_path, topic).exists() for topic in topics)


def test_a_text_is_scored_once(place: Place, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = past(3)
    arrive("a.jsonl", [*rows, rows[0], {"text": "  "}, {"id": "none"}])
    first = run(place)
    assert (first.new, first.blank, len(asked)) == (len(rows), 2, len(rows))
    arrive("a.jsonl", [*rows, {"text": "one more", "topic": "energy"}])  # the file grows
    arrive("b.jsonl", rows)  # and is sent again
    assert run(place, now=MONDAY).new == 1
    assert asked[len(rows) :] == ["one more"]
    kept = pq.read_table(monitoring.FOLDER / "texts.parquet").to_pandas()
    assert kept["day"].iloc[-1] == MONDAY  # a row without a time is of today

    # cut short between the texts and what was judged
    arrive("c.jsonl", day(MONDAY + timedelta(3), 5, 5))
    with monkeypatch.context() as patch:
        patch.setattr(monitoring, "_judge", None)
        with pytest.raises(TypeError):
            run(place)
    assert run(place).new == 0
    assert len(asked) == len(set(asked)) == len(rows) + 11


def test_texts_in_a_bucket_leave_no_copy(
    place: Place, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with servers.s3("news") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        body = "".join(json.dumps(row) + "\n" for row in day(MONDAY, 1, 1))
        boto3.client("s3").put_object(Bucket="news", Key="a.jsonl", Body=body.encode())
        assert run(place, uri="s3://news/").new == len(asked) == 2
    assert not list(tmp_path.iterdir()) and not list(place.root.rglob("a.jsonl"))


def test_a_day_in_the_future_counts_as_today(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", [{"text": "from the future", "time": "2099-01-01"}])
    report = run(place, now=MONDAY)
    assert report.day == MONDAY.isoformat()
    assert report.trends[0]["topic"] == "all"  # neither row nor version names one


def test_texts_are_kept_only_as_long_as_they_are_compared(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", past(20))
    for today, first in ((19, 13), (25, 19), (40, 20)):  # also where no more arrive
        run(place, now=MONDAY + timedelta(today))
        kept = pq.read_table(monitoring.FOLDER / "texts.parquet").to_pandas()
        assert set(kept["day"][kept["text"].notna()]) == {MONDAY + timedelta(d) for d in range(first, 20)}
    assert not list(monitoring.FOLDER.glob("version/*.json")), "what a version was asked goes too"


def test_mistakes_are_told_in_one_line(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", [{"text": "one"}])
    for changes, told in (
        ({"uri": None}, "monitor.uri: null; set it to where texts arrive"),
        ({"uri": "nowhere"}, "monitor.uri: nowhere: no such file or folder"),
        ({"model": "ner"}, "ner@champion: memgpt-ner has no champion"),
        ({"negative": "bad"}, r"monitor.negative: 'bad' is no label of models:/memgpt-sentiment/1; name "),
    ):
        with pytest.raises(UserError, match=told) as caught:
            run(place, **changes)
        assert "\n" not in str(caught.value)
    run(place)
    arrive("b.jsonl", [{"body": "one"}])
    with pytest.raises(UserError, match=r"arriving/b.jsonl: no column 'text'"):
        run(place)
    with pytest.raises(UserError, match=r"has the texts of arriving, not of arriving/a.jsonl; .* --dir"):
        run(place, uri="arriving/a.jsonl")


# ---- drift


def held_out() -> pd.DataFrame:
    sentiment = newsroom.generate(scale=0.5)["sentiment"]
    return pd.concat([sentiment["validation"], sentiment["test"]], ignore_index=True)


def as_seen(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[["text", "topic", "label"]].assign(day=MONDAY)


def test_held_out_rows_have_not_drifted(place: Place, asked: list[str]) -> None:
    settings = SETTINGS.model_copy(update={"drift_texts": 100})
    rows = held_out()
    for seed in range(10):
        assert monitoring.drifts(settings, as_seen(rows.sample(150, random_state=seed)), REFERENCE) == []
    assert monitoring.drifts(settings.model_copy(update={"drift_texts": 151}), as_seen(rows[:150]), REFERENCE) == []


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("length", lambda rows: rows.assign(text=[" ".join(text.split()[:6]) for text in rows["text"]])),
        ("tokens", lambda rows: rows.assign(text=[text.upper() for text in rows["text"]])),
        ("topic", lambda rows: rows.assign(topic=["mining" if n % 3 else "energy" for n in range(len(rows))])),
        ("label", lambda rows: rows.assign(label=["negative" if n % 4 else "neutral" for n in range(len(rows))])),
    ],
)
def test_what_has_drifted_is_named(place: Place, asked: list[str], what: str, change: Any) -> None:
    found = {drift.what: drift for drift in monitoring.drifts(SETTINGS, as_seen(change(held_out())), REFERENCE)}
    assert what in found
    assert found[what].psi > found[what].limit >= getattr(SETTINGS.max_psi, what)


def test_the_newsroom_arrives(place: Place, asked: list[str]) -> None:
    """Held-out texts of the newsroom, by day; the last days speak of nothing else but one topic."""
    rows = held_out().astype({"time": str})[["id", "text", "topic", "time"]]
    arrive("a.jsonl", rows.to_dict("records"))
    changes = {"drift_days": 400, "drift_texts": 200}
    report = run(place, **changes)
    assert report.new == len(rows) and report.drifting == []
    strange = [{"text": f"{n} ΑΒΓΔΕ ζηθικ λμνξο πρστυ", "topic": "energy", "time": "2024-12-31"} for n in range(300)]
    arrive("b.jsonl", strange)
    moved = monitoring.TRAIN.rename("elsewhere.parquet")  # as a retraining does while it runs
    report = run(place, **changes)
    moved.rename(monitoring.TRAIN)
    assert {"tokens", "topic"} <= {drift.what for drift in report.drifts}
    monitoring.announce(report)
    report = run(place, **changes)
    assert report.drifts == [] and {"tokens", "topic"} <= {drift.what for drift in report.drifting}


def test_what_texts_are_compared_with_must_be_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(monitoring, "TOKENIZER", Path("nowhere/tokenizer.json"))
    monitoring.keep_reference(Path("other"), "1")
    with pytest.raises(UserError, match=r"nowhere/tokenizer.json: .*`dvc checkout` restores what is missing"):
        monitoring.drifts(SETTINGS, as_seen(held_out()), Path("other"))


# ---- retraining, and the command


def test_retraining_waits_for_its_cool_down() -> None:
    drift = monitoring.Drift("label", 0.5, 0.2, 300)
    quiet = monitoring.Report("v", "arriving", 0, 0, None)
    found = monitoring.Report("v", "arriving", 0, 0, None, drifting=[drift])
    allowed, now = SETTINGS.model_copy(update={"retrain": True}), datetime(2024, 6, 10, tzinfo=UTC)
    assert not monitoring.retraining_is_due(SETTINGS, found, None, now)
    assert not monitoring.retraining_is_due(allowed, quiet, None, now)
    assert monitoring.retraining_is_due(allowed, found, None, now)
    assert not monitoring.retraining_is_due(allowed, found, now - timedelta(days=6.9), now)
    assert monitoring.retraining_is_due(allowed, found, now - timedelta(days=7), now)


def test_the_command_shows_the_topics_and_what_is_unusual(place: Place, asked: list[str]) -> None:
    arrive("a.jsonl", [*past(), {"text": ""}])
    told = CliRunner().invoke(cli.app, ["monitor", "--uri", "arriving"])
    assert told.exit_code == 0, told.output
    assert "monitor: 300 new texts by models:/memgpt-sentiment/1" in told.output
    assert "1 rows without text left out" in told.output
    arrive("b.jsonl", day(MONDAY + timedelta(30), 12, 3))
    told = CliRunner().invoke(cli.app, ["monitor", "--uri", "arriving"])
    assert "energy: 12 of 15 texts negative on 2024-07-03" in told.output
    row = next(line.split() for line in told.output.splitlines() if line.startswith("energy  "))
    assert row[:3] == ["energy", "15", "12"]
    as_json = json.loads(CliRunner().invoke(cli.app, ["monitor", "--uri", "arriving", "--json"]).output)
    assert as_json["surges"][0]["topic"] == "energy"
