"""Arriving texts: the share of negative ones by topic and day, surges of it, and drift from the training tables.

A surge is judged against the topic's own past weeks. Texts of one day share its news, so counts vary more than binomial
ones: X negative texts of n are beta-binomial with an intraclass correlation rho (Skellam 1948), estimated from
Pearson's statistic (Williams 1982) around the weekdays' means. A weekday's mean is shrunk towards that of the others,
depending on how much weekdays are seen to differ (random effects: DerSimonian & Laird 1986). Its uncertainty widens the
prediction. docs/monitoring.md has the measured rate of false alarms and the power.

State is in one folder: `texts.parquet`, a row per scored text, and `state.json`, what was judged and announced. Each is
replaced whole, the texts first, so that an interrupted run can be repeated without scoring a text twice.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from scipy.special import betaln, gammaln
from tokenizers import Tokenizer

from memgpt import atomic, config, pictures, registry, scoring, tables, tracking
from memgpt.errors import UserError

FOLDER = Path(".memgpt/monitor")
TRAIN, TOKENIZER = config.TABLES / "sentiment/train.parquet", Path("models/tokenizer/tokenizer.json")
REFERENCE = "reference"  # folder with a copy of both
WINDOWS = (1, 3)  # days: one day shows a sharp surge, the sum of three a lasting one
LATE = 3  # days: texts that arrive later are counted, but their day is not judged again
LAST_LOOK = 0.8  # share of a day's remaining false alarms that a look after its end may spend
RHO = 0.02  # prior of the intraclass correlation of a day's texts
SHOWN = 56  # days in a picture
_NAMED = 30  # characters of a topic in picture titles and file names, which file systems limit in bytes
_SAVE = 60.0  # seconds between saves while texts are scored
_REFERENCE = 5000  # training rows that the latest texts are compared with, at most
_RESAMPLES = 500
_BINS = {"length": 10, "tokens": 20}
_TEXTS = pa.schema(
    [
        ("key", pa.string()),  # of id and text
        ("day", pa.date32()),
        ("topic", pa.string()),
        ("label", pa.string()),
        ("text", pa.string()),  # null once it is too old for the comparison with the training tables
    ]
)


@dataclass(frozen=True)
class Surge:
    """In the `days` that end on `day`, `negative` of a topic's `texts` were negative. limit: the largest number that is
    not a surge; probability: of at least `negative`."""

    topic: str
    day: str
    days: int
    texts: int
    negative: int
    expected: float
    limit: int
    probability: float

    @property
    def summary(self) -> str:
        when = self.day if self.days == 1 else f"the {self.days} days to {self.day}"
        return (
            f"{self.topic}: {self.negative} of {self.texts} texts negative on {when}, "
            f"{self.expected:.1f} expected, at most {self.limit}"
        )


@dataclass(frozen=True)
class Drift:
    """psi: population stability index of `what` (length, tokens, topic, label) between training and arrived texts."""

    what: str
    psi: float
    limit: float
    texts: int

    @property
    def summary(self) -> str:
        return f"{self.what} drifts: stability index {self.psi:.3f} over {self.texts} texts, limit {self.limit:.3f}"


@dataclass(frozen=True)
class Report:
    """What a run found. surges, drifts: those not announced yet (`announce`); drifting: all current drifts. trends: a
    row for each topic with texts on the latest day."""

    version: str
    source: str
    new: int
    blank: int
    day: str | None
    surges: list[Surge] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    drifting: list[Drift] = field(default_factory=list)
    trends: list[dict[str, Any]] = field(default_factory=list)

    @property
    def summary(self) -> str:
        told = [surge.summary for surge in self.surges] + [drift.summary for drift in self.drifts]
        return "; ".join([f"{self.new} new texts", *(told or ["nothing unusual"])])


def run(
    settings: config.Config,
    folder: Path = FOLDER,
    *,
    uri: str | None = None,
    now: datetime | None = None,
    progress: Callable[[int, int], None] = lambda done, texts: None,
) -> Report:
    """Score the new texts at `monitor.uri` (or `uri`), judge the days they belong to, and draw the trends.

    now: the time in UTC; its day is that of rows without a time or with a time in the future. progress: called with
    the number of scored texts and of all new texts.

    Raises:
        UserError: for texts that cannot be read, naming file and row; for a folder with another source's texts.
    """
    monitor = settings.monitor
    uri = uri or monitor.uri
    if not uri:
        raise UserError("monitor.uri: null; set it to where texts arrive: a file, glob, folder or s3://bucket/prefix")
    with tracking.locked(folder / "lock"):
        state = _state(folder, uri)
        tracking.use()
        model, number = registry.resolve(tracking.client(), monitor.model)
        if model != "sentiment":
            raise UserError(f"monitor.model: {monitor.model} gives no sentiment; name a version of sentiment")
        labels = scoring.labels(tracking.client(), model, number)
        if monitor.negative not in labels:
            raise UserError(
                f"monitor.negative: {monitor.negative!r} is no label of {registry.uri(model, number)}; "
                f"name one of {', '.join(labels)}"
            )
        today = (now or datetime.now(UTC)).date()
        seen = pq.read_table(folder / "texts.parquet").to_pandas() if (folder / "texts.parquet").exists() else _none()
        files = {file["path"]: file for file in scoring.find("monitor.uri", uri)}
        digests = {path: scoring.digest(file) for path, file in files.items()}
        changed = [file for path, file in files.items() if state["files"].get(path) != digests[path]]
        with scoring.downloads(changed) as cache:
            rows, blank = _new(changed, monitor.text, set(seen["key"]), today, cache)
        if rows:
            with scoring.asking(settings, model, number, folder / "version") as ask:
                seen = _score(rows, ask, seen, folder, progress)
        report = Report(registry.uri(model, number), uri, len(rows), blank, None)
        if len(seen):
            keep_reference(folder / REFERENCE, report.version)
            drifting = drifts(monitor, seen, folder / REFERENCE)
            report = _judge(monitor, seen, today, state, dataclasses.replace(report, drifting=drifting))
            _forget(seen, folder, today - timedelta(days=monitor.drift_days))
            _draw(monitor, seen, folder)
        state["files"] = digests
        atomic.write_json(folder / "state.json", state)
    return report


def announce(report: Report, folder: Path = FOLDER) -> None:
    """Record that the surges and drifts of a report have been announced. Each is announced once; a drift again only
    after it had ended."""
    with tracking.locked(folder / "lock"):
        state = _state(folder, report.source)
        told = {(surge.topic, surge.day) for surge in report.surges}
        for surge in state["surges"]:
            surge["announced"] |= (surge["topic"], surge["day"]) in told
        for drift in report.drifts:
            state["drift"][drift.what] = True
        atomic.write_json(folder / "state.json", state)


def last_retraining(report: Report, folder: Path = FOLDER) -> datetime | None:
    when = _state(folder, report.source)["retrained"]
    return datetime.fromisoformat(when) if when else None


def retraining_is_due(monitor: config.Monitor, report: Report, last: datetime | None, now: datetime) -> bool:
    """On a new surge or any drift, unless the last retraining is too recent."""
    waited = last is None or now - last >= timedelta(days=monitor.cooldown_days)
    return monitor.retrain and waited and bool(report.surges or report.drifting)


def note_retraining(report: Report, now: datetime, folder: Path = FOLDER) -> None:
    with tracking.locked(folder / "lock"):
        atomic.write_json(folder / "state.json", {**_state(folder, report.source), "retrained": now.isoformat()})


# ---- texts


def _state(folder: Path, uri: str) -> dict[str, Any]:
    """files: path → digest of files already read. looks: day → topic → [share of the day's false alarms already spent,
    texts at the last look, whether the day was over by then]. drift: what drifts → whether that was announced."""
    empty: dict[str, Any] = {"uri": uri, "files": {}, "looks": {}, "surges": [], "drift": {}, "retrained": None}
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    if state["uri"] != uri:
        raise UserError(f"{folder}: has the texts of {state['uri']}, not of {uri}; name another folder with --dir")
    return state


def _none() -> pd.DataFrame:
    return _TEXTS.empty_table().to_pandas()


def _new(
    files: list[dict[str, Any]], column: str | None, known: set[str], today: date, cache: Path | None
) -> tuple[list[scoring.Row], int]:
    """The rows that were never scored, each once, with key and day; and the number of rows without text."""
    rows, blank = [], 0
    for file in files:
        for row in scoring.read(file, column, cache=cache):
            if not (row["text"] or "").strip():
                blank += 1
                continue
            key = hashlib.sha256(f"{row['id'] or ''}\0{row['text']}".encode()).hexdigest()[:32]
            if key not in known:
                known.add(key)
                rows.append({**row, "key": key, "day": min(row["time"].date(), today) if row["time"] else today})
    return rows, blank


def _score(
    rows: list[scoring.Row],
    ask: Callable[[list[scoring.Row]], list[Any]],
    seen: pd.DataFrame,
    folder: Path,
    progress: Callable[[int, int], None],
) -> pd.DataFrame:
    """Add the rows with their predicted labels to `seen`, save the result and return it."""
    waiting, scored, saved = iter(rows), [], time.monotonic()
    while chunk := list(islice(waiting, scoring.CHUNK)):
        for row, answer in zip(chunk, ask(chunk), strict=True):
            topic = row["topic"] or answer.get("predicted_topic") or "all"
            scored.append({**row, "topic": topic, "label": answer["label"]})
        progress(len(scored), len(rows))
        if time.monotonic() - saved > _SAVE or len(scored) == len(rows):
            both = pd.concat([seen, pa.Table.from_pylist(scored, schema=_TEXTS).to_pandas()], ignore_index=True)
            _save(both, folder)
            saved = time.monotonic()
    return both


def _save(texts: pd.DataFrame, folder: Path) -> None:
    with atomic.replacing(folder / "texts.parquet") as aside:
        tables.write(pa.Table.from_pandas(texts, schema=_TEXTS, preserve_index=False), aside)


def _forget(texts: pd.DataFrame, folder: Path, last: date) -> None:
    """Delete the texts that are no longer needed: those of day `last` and before."""
    old = (texts["day"] <= last) & texts["text"].notna()
    if old.any():
        _save(texts.assign(text=texts["text"].mask(old, None)), folder)


# ---- surges


def _judge(monitor: config.Monitor, texts: pd.DataFrame, today: date, state: dict[str, Any], report: Report) -> Report:
    """The report with what is unusual added; the looks are recorded in `state`."""
    counts = _counts(texts, monitor.negative)
    last: date = texts["day"].max()
    # the first run judges the last day only, a later one every day from LATE days before the last judged one
    looked = [date.fromisoformat(day) for day in state["looks"]] or [last]
    first = max(min(looked), max(looked) - timedelta(days=LATE))
    known = {(surge["topic"], surge["day"]) for surge in state["surges"]}
    looks: dict[str, dict[str, Any]] = {}
    for day in sorted(set(texts["day"][texts["day"] >= first])):
        looks[day.isoformat()] = before = state["looks"].get(day.isoformat(), {})
        for topic, count in counts.items():
            _, all_texts = count.until(day, 7 * monitor.history_weeks + 1)
            now, usual = int(all_texts[-1]), all_texts[:-1:7].mean()  # usual: mean of this weekday
            spent, then, was_over = before.get(topic, (0.0, 0, False))
            over = day < today
            if not now or (now == then and over == was_over):
                continue
            share = spend(spent, over, now / usual if usual else 1.0)
            before[topic] = [spent + share, now, over]
            surge = judge(monitor, topic, count, day, share)
            if surge and (topic, surge.day) not in known:
                state["surges"].append({**dataclasses.asdict(surge), "announced": False})
    state["looks"] = looks
    state["surges"] = state["surges"][-1000:]
    state["drift"] = {drift.what: state["drift"].get(drift.what, False) for drift in report.drifting}
    fresh = [
        Surge(**{key: value for key, value in surge.items() if key != "announced"})
        for surge in state["surges"]
        if not surge["announced"]
    ]
    return dataclasses.replace(
        report,
        day=last.isoformat(),
        surges=fresh,
        drifts=[drift for drift in report.drifting if not state["drift"][drift.what]],
        trends=[row for topic, count in counts.items() if (row := _trend(monitor, topic, count, last))],
    )


@dataclass(frozen=True)
class Counts:
    """Daily numbers of a topic's texts, and of the negative ones, from `start` on."""

    start: date
    negative: np.ndarray
    texts: np.ndarray

    def until(self, day: date, days: int) -> tuple[np.ndarray, np.ndarray]:
        """(negative, texts) of the `days` days that end with `day`; zero outside the data."""
        end = (day - self.start).days + 1
        places = np.arange(end - days, end)
        held = (places >= 0) & (places < len(self.texts))
        where = np.where(held, places, 0)
        return self.negative[where] * held, self.texts[where] * held


def _counts(texts: pd.DataFrame, negative: str) -> dict[str, Counts]:
    found = {}
    for topic, rows in texts.groupby("topic"):
        start = rows["day"].min()
        places = np.array([(day - start).days for day in rows["day"]])
        is_negative = (rows["label"] == negative).to_numpy()
        found[str(topic)] = Counts(start, np.bincount(places, is_negative).astype(int), np.bincount(places))
    return found


def judge(monitor: config.Monitor, topic: str, count: Counts, day: date, share: float) -> Surge | None:
    """The surge in the days that end with `day`, over one day or over three; None if there is none. share: the part of
    the day's false alarms that this look may spend."""
    level = alarm_level(monitor.false_alarms, share)
    found = []
    for days in WINDOWS:
        negative, texts = count.until(day, 7 * monitor.history_weeks + days)
        if np.count_nonzero(texts[:-days]) < monitor.least_days:
            continue
        seen, whole = int(negative[-days:].sum()), int(texts[-days:].sum())
        mean, spread = predict(negative[:-days], texts[:-days], texts[-days:])
        chances = survival(whole, mean, spread)
        if chances[seen] <= level:
            limit = int(np.argmax(chances <= level)) - 1
            summed = (float(mean * whole), limit, float(chances[seen]))
            found.append(Surge(topic, day.isoformat(), days, whole, seen, *summed))
    return min(found, key=lambda surge: surge.probability, default=None)


def spend(spent: float, over: bool, filled: float) -> float:
    """What the next look at a day may spend, as a share of the day's false alarms, of which `spent` is used up.

    While the day grows, half of them are spent as its texts come in (filled: their number relative to the usual one;
    linear spending function, Lan & DeMets 1983). The first look after the day is `over` may spend four fifths of the
    rest; each later one, at late texts, four fifths of what is then left.
    """
    return LAST_LOOK * (1 - spent) if over else max(0.0, 0.5 * min(1.0, filled) - spent)


def alarm_level(false_alarms: float, share: float = LAST_LOOK) -> float:
    """Probability at or below which a window is a surge, if the look may spend `share` of a day's part of the yearly
    `false_alarms`. Default: the only look at a day, after its end."""
    return false_alarms / 365 * share / len(WINDOWS)


def predict(negative: np.ndarray, texts: np.ndarray, ahead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The beta-binomial distribution of the number of negative texts in the days right after a history.

    negative, texts: [..., 7 W], daily counts of W weeks. ahead: [..., d], texts on the d <= 7 days after them.
    Returns mean share and intraclass correlation [...] of the sum over these days.
    """
    x, n = (counts.reshape(*counts.shape[:-1], -1, 7).astype(float) for counts in (negative, texts))
    held = n > 0
    total, all_texts = x.sum(-2), n.sum(-2)  # by weekday
    overall = (total.sum(-1, keepdims=True) + 0.5) / (all_texts.sum(-1, keepdims=True) + 1)
    share = np.where(all_texts > 0, total / np.maximum(all_texts, 1), overall)
    smooth = ((total + 2 * overall) / (all_texts + 2))[..., None, :]
    # how much more than binomial a day's count varies around its weekday's mean
    pearson = (held * (x - n * share[..., None, :]) ** 2 / np.maximum(n * smooth * (1 - smooth), 1e-9)).sum((-1, -2))
    freedom = held.sum((-1, -2)) - (all_texts > 0).sum(-1)
    weight = (held * (n - 1) * (1 - n / np.maximum(all_texts, 1)[..., None, :])).sum((-1, -2))
    caution = np.sqrt(2 * np.maximum(freedom, 1))  # one standard error, since too small a rho causes false alarms
    # few texts a day cannot determine rho: a prior worth 100 texts is added
    rho = np.clip((pearson - freedom + caution + 100 * RHO) / (weight + 100), 0, 0.5)[..., None]
    # tau: how much weekdays differ; worth: how many independent texts a weekday's texts are worth
    worth = (n / np.maximum(1 + (n - 1) * rho[..., None], 1)).sum(-2)
    whole = worth.sum(-1, keepdims=True)
    between = (worth * (share - overall) ** 2).sum(-1, keepdims=True) / (overall * (1 - overall))
    chance = (all_texts > 0).sum(-1, keepdims=True) - 1
    room = np.maximum(whole - (worth**2).sum(-1, keepdims=True) / np.maximum(whole, 1e-9), 1e-9)
    tau = np.clip((between - chance) / room, 0, 0.5)
    # each weekday's mean, shrunk towards the others'; known: the number of texts that this estimate is worth
    rest = whole - worth
    others = ((worth * share).sum(-1, keepdims=True) - worth * share + 0.5) / (rest + 1)
    prior = 1 / (tau + 1 / (rest + 1))
    known = worth + prior
    mean = (worth * share + prior * others) / known
    spread = rho + (1 - rho) / (known + 1)
    days = ahead.shape[-1]
    parts = ahead / np.maximum(ahead.sum(-1, keepdims=True), 1)
    return (parts * mean[..., :days]).sum(-1), (parts**2 * spread[..., :days]).sum(-1)


def survival(texts: np.ndarray | int, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Probability of k or more, for k from 0 to K, the largest of `texts`: [..., K + 1]; beta-binomial, vectorised."""
    n = np.asarray(texts, float)[..., None]
    mean, spread = (np.clip(value, 1e-9, 1 - 1e-9) for value in (mean, spread))  # both 0 where there are no texts
    a, b = ((part * (1 / spread - 1))[..., None] for part in (mean, 1 - mean))
    k = np.arange(int(n.max()) + 1.0)
    inside = np.minimum(k, n)
    ways = gammaln(n + 1) - gammaln(inside + 1) - gammaln(n - inside + 1)
    chances = np.where(k <= n, np.exp(ways + betaln(inside + a, n - inside + b) - betaln(a, b)), 0)
    return chances[..., ::-1].cumsum(-1)[..., ::-1]


# ---- drift


def drifts(monitor: config.Monitor, texts: pd.DataFrame, reference: Path) -> list[Drift]:
    """In what the latest texts have drifted from the training table of sentiment. reference: the folder that
    `keep_reference` wrote.

    A drift's population stability index (Lewis 1994; Siddiqi 2006) exceeds `monitor.max_psi`, and what chance gives for
    so few texts: the largest of 500 samples of as many training rows. Empty if the latest days have too few texts.
    """
    latest = texts[(texts["day"] > texts["day"].max() - timedelta(days=monitor.drift_days)) & texts["text"].notna()]
    if len(latest) < monitor.drift_texts:
        return []
    if not reference.exists():
        raise UserError(f"{TRAIN}, {TOKENIZER}: texts are compared with both; `dvc checkout` restores what is missing")
    train = _training_rows(reference / TRAIN.name)
    read = {"length": lambda text: [len(text)], "tokens": _tokenizer(reference / TOKENIZER.name)}
    found = []
    for what, limit in monitor.max_psi.model_dump().items():
        if what in read:
            old, new = ([read[what](text) for text in frame["text"]] for frame in (train, latest))
            edges = np.unique(np.quantile(np.concatenate(old), np.arange(1, _BINS[what]) / _BINS[what]))
            before, after = (_shares(values, edges) for values in (old, new))
        elif train[what].notna().all():  # topics may be missing
            before, after = _one_hot(train[what], latest[what])
        else:
            continue
        psi = float(stability(before.mean(0), after.mean(0), len(before), len(after)))
        limit = max(limit, _by_chance(before, len(after)))
        if psi > limit:
            found.append(Drift(what, round(psi, 4), round(limit, 4), len(latest)))
    return found


def stability(before: np.ndarray, after: np.ndarray, rows: int, others: int) -> np.ndarray:
    """Population stability index of distributions [..., B] over `rows` and `others` rows, half a row added per bin."""
    bins = before.shape[-1]
    p, q = ((share * n + 0.5) / (n + 0.5 * bins) for share, n in ((before, rows), (after, others)))
    return ((p - q) * np.log(p / q)).sum(-1)


def _by_chance(rows: np.ndarray, count: int) -> float:
    """The largest index between rows [N, B] and samples of `count` of them."""
    draws = np.random.default_rng(0).multinomial(count, np.full(len(rows), 1 / len(rows)), _RESAMPLES)
    return float(stability(rows.mean(0), draws @ rows / count, len(rows), count).max())


def keep_reference(target: Path, version: str) -> None:
    """Copy the training table and the tokenizer to a folder, once per version: they are missing while a retraining
    rebuilds them."""
    note = target / "version"
    if note.exists() and note.read_text(encoding="utf-8") == version:
        return
    with suppress(FileNotFoundError), atomic.replacing(target) as aside:
        aside.mkdir()
        shutil.copy(TRAIN, aside)
        shutil.copy(TOKENIZER, aside)
        (aside / "version").write_text(version, encoding="utf-8")


def _training_rows(path: Path) -> pd.DataFrame:
    rows = pq.read_table(path, columns=["text", "topic", "label"])
    chosen = np.random.default_rng(0).permutation(rows.num_rows)[:_REFERENCE]
    return rows.take(np.sort(chosen)).to_pandas()


def _tokenizer(path: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _shares(values: list[list[int]], edges: np.ndarray) -> np.ndarray:
    """[texts, bins]: the share of each text's values (its length, or its tokens) in each bin."""
    bins = len(edges) + 1
    return np.stack([np.bincount(np.searchsorted(edges, one), minlength=bins) / max(1, len(one)) for one in values])


def _one_hot(before: pd.Series, after: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    names = np.array(sorted(set(before) | set(after)), object)
    return (before.to_numpy(object)[:, None] == names) * 1.0, (after.to_numpy(object)[:, None] == names) * 1.0


# ---- what people see


def table(report: Report) -> Table:
    """The topics on the latest day."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column(f"{report.day or 'no texts yet'}")
    for name in ("texts", "negative", "expected", "at most"):
        drawn.add_column(name, justify="right")
    unusual = {surge.topic for surge in report.surges}
    for row in report.trends:
        drawn.add_row(
            *(cell.replace("[", r"\[") for cell in row.values()), style="red" if row["topic"] in unusual else ""
        )
    return drawn


def _trend(monitor: config.Monitor, topic: str, count: Counts, day: date) -> dict[str, Any] | None:
    """A topic's latest day as text. limit: the largest number of negative texts that is usual; "" if not judged."""
    negative, texts = count.until(day, 1)
    if not texts[0]:
        return None
    row = {"topic": topic, "texts": str(texts[0]), "negative": str(negative[0]), "expected": "", "limit": ""}
    before, all_texts = count.until(day, 7 * monitor.history_weeks + 1)
    if np.count_nonzero(all_texts[:-1]) >= monitor.least_days:
        mean, spread = predict(before[:-1], all_texts[:-1], all_texts[-1:])
        _, high = band(texts[0], mean, spread, monitor.false_alarms)
        row |= {"expected": f"{mean * texts[0]:.1f}", "limit": str(high)}
    return row


def band(texts: int, mean: np.ndarray, spread: np.ndarray, false_alarms: float) -> tuple[int, int]:
    """The smallest and the largest usual number of negative texts, for a single day that is judged once."""
    level = alarm_level(false_alarms)
    chances = survival(texts, mean, spread)
    low = np.flatnonzero(chances >= 1 - level).max()
    beyond = np.flatnonzero(chances <= level)
    return int(low), int(beyond.min()) - 1 if len(beyond) else int(texts)


def _draw(monitor: config.Monitor, texts: pd.DataFrame, folder: Path) -> None:
    """A picture for each topic: `picture(folder, topic)`."""
    last: date = texts["day"].max()
    for topic, count in _counts(texts, monitor.negative).items():
        rows = []
        for back in reversed(range(SHOWN)):
            day = last - timedelta(days=back)
            negative, all_texts = count.until(day, 7 * monitor.history_weeks + 1)
            row = {
                "day": day,
                "texts": all_texts[-1],
                "share": np.nan,
                "expected": np.nan,
                "low": np.nan,
                "high": np.nan,
            }
            if all_texts[-1]:
                row["share"] = negative[-1] / all_texts[-1]
                if np.count_nonzero(all_texts[:-1]) >= monitor.least_days:
                    mean, spread = predict(negative[:-1], all_texts[:-1], all_texts[-1:])
                    low, high = band(all_texts[-1], mean, spread, monitor.false_alarms)
                    row |= {"expected": mean, "low": low / all_texts[-1], "high": high / all_texts[-1]}
            rows.append(row)
        table = pd.DataFrame(rows).astype({"day": "datetime64[ns]"})  # a topic may have no texts on these days
        shown = " ".join(topic.split())
        shown = shown if len(shown) <= _NAMED else f"{shown[: _NAMED - 1]}…"
        pictures.draw_trend(picture(folder, topic), f"{shown}: share of {monitor.negative} texts", table)


def picture(folder: Path, topic: str) -> Path:
    """Named after the topic, with a hash where the topic is no file name, since several topics might share the name."""
    name = re.sub(r"[^\w-]+", "-", topic)[:_NAMED]
    mark = "" if name == topic else "-" + hashlib.sha256(topic.encode()).hexdigest()[:8]
    return folder / f"{name}{mark}.png"
