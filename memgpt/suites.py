"""The checks of each source's tables, as Great Expectations suites.

An expectation sees one table. A relation to another table (a test text that is also in train or in the corpus, a
click on an unknown item, a click out of order) is therefore a boolean column that `relate` adds beforehand.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
import pyarrow as pa
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnMapExpectation, MulticolumnMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    MulticolumnMapMetricProvider,
    column_condition_partial,
    multicolumn_condition_partial,
)

from memgpt import config, tables
from memgpt.overlap import HeldOut, normalise

ROW = "row"  # column with the 1-based number of a row in its table, by which results name it
SPLITS = ("train", "validation", "test")
MAX_SECONDS = 4_102_444_800  # the year 2100

# UTF-8 once read as Windows-1252 or Latin-1 (â€™, Ã©, Â°), U+FFFD, control characters other than tab and newlines
_GARBAGE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff]|â€|ðŸ|[ÂÃ][\u00a0-\u00bf]|Ã[€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
)


def garbage(text: str) -> bool:
    """Whether a text shows signs of a wrong encoding."""
    return bool(_GARBAGE.search(text))


class WellFormedTags(ColumnMapMetricProvider):
    condition_metric_name = "column_values.bio_well_formed"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series, **_: Any) -> pd.Series:
        return column.map(lambda tags: tables.bio_error(tags) is None)


class KnownTypes(ColumnMapMetricProvider):
    condition_metric_name = "column_values.entity_types_known"
    condition_value_keys = ("types",)

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series, types: list[str], **_: Any) -> pd.Series:
        known = set(types)
        return column.map(lambda tags: tables.entity_types(tags) <= known)


class CleanText(ColumnMapMetricProvider):
    condition_metric_name = "column_values.clean_text"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series, **_: Any) -> pd.Series:
        return ~column.map(lambda value: garbage(value if isinstance(value, str) else _text("ner", value))).astype(bool)


class EqualLengths(MulticolumnMapMetricProvider):
    condition_metric_name = "multicolumn_values.equal_lengths"
    condition_domain_keys = ("batch_id", "table", "column_list", "row_condition", "condition_parser", "ignore_row_if")
    condition_value_keys = ()

    @multicolumn_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_list: pd.DataFrame, **_: Any) -> pd.Series:
        return column_list.map(lambda value: len(_list(value))).nunique(axis=1) == 1


class ExpectWellFormedTags(ColumnMapExpectation):
    """Every I-type follows B-type or I-type of the same type."""

    map_metric = "column_values.bio_well_formed"
    success_keys = ("mostly",)


class ExpectKnownTypes(ColumnMapExpectation):
    """Entity types are those of the manifest."""

    types: list[str]
    map_metric = "column_values.entity_types_known"
    success_keys = ("types", "mostly")


class ExpectCleanText(ColumnMapExpectation):
    """No replacement characters, control characters or mojibake."""

    map_metric = "column_values.clean_text"
    success_keys = ("mostly",)


class ExpectEqualLengths(MulticolumnMapExpectation):
    """The lists of a row are equally long."""

    map_metric = "multicolumn_values.equal_lengths"
    success_keys = ("mostly",)


KNOBS = {  # check → the key of params.yaml that sets its threshold
    "minimum rows": "validate.min_rows",
    "length": "validate.max_text_chars",
    "encoding garbage": "validate.max_garbage",
    "duplicates of earlier splits": "validate.max_duplicates",
    "overlap with the corpus": "validate.max_corpus_overlap",
    "label balance in train": "validate.min_label_share",
}


FIXES = {  # check → what to do about rows that fail it
    "minimum rows": "bring more rows",
    "no nulls": "fill it in, or take the row out",
    "time in seconds since 1970": "write seconds or milliseconds since 1970, or dates such as 2024-05-31",
    "unknown items": "bring them among the items, or take the rows out",
    "duplicate item ids": "give each item its own",
    "label balance in train": "bring more rows of it, or take it out",
    "equal token and tag lengths": "give each token one tag",
}


@dataclass(frozen=True)
class Check:
    """One expectation on one table: `name` and `column` for the report, `threshold` as `params.yaml` has it."""

    table: str
    name: str
    column: str | None
    expectation: Any
    threshold: float | None = None


@dataclass(frozen=True)
class Outcome:
    check: Check
    success: bool
    checked: int
    unexpected: int
    rows: list[int]  # 1-based, the first few that fail
    observed: float | None = None


# ---- the checks


def schema_checks() -> list[Check]:
    """Checks of a frame with one row per column: its expected and its actual name and type."""
    pair = gxe.ExpectColumnPairValuesToBeEqual(column_A="expected", column_B="found", ignore_row_if="neither")
    return [Check("schema", "columns and types", None, pair)]


def checks(
    source: str, frames: dict[str, pd.DataFrame], labels: list[str] | None, settings: config.Validate
) -> list[Check]:
    """The suite of one source, for frames that `relate` has prepared."""
    if source == "recommendation":
        return list(_recommendation(frames, settings))
    found: list[Check] = []
    for split in (split for split in SPLITS if split in frames):
        found += _split_checks(source, split, labels, settings)
    if labels is not None:
        minimum = settings.min_label_share
        between = gxe.ExpectColumnValuesToBeBetween(column="share", min_value=minimum)
        found.append(Check("labels", "label balance in train", "share", between, minimum))
        if source == "sentiment":
            two = gxe.ExpectTableRowCountToBeBetween(min_value=2)
            found.append(Check("labels", "at least two labels", None, two, 2))
    return found


def _split_checks(source: str, split: str, labels: list[str] | None, settings: config.Validate) -> Iterator[Check]:
    least = settings.min_rows if source != "corpus" or split == "train" else 1
    text = "tokens" if source == "ner" else "text"
    yield Check(split, "minimum rows", None, gxe.ExpectTableRowCountToBeBetween(min_value=least), least)
    yield from _nulls(split, ("id", *tables.REQUIRED[source]))
    yield Check(split, "unique ids", "id", gxe.ExpectColumnValuesToBeUnique(column="id"))
    longest = settings.max_text_chars
    lengths = gxe.ExpectColumnValuesToBeBetween(column="characters", min_value=1, max_value=longest)
    yield Check(split, "length", text, lengths, longest)
    clean = ExpectCleanText(column=text, mostly=1 - settings.max_garbage)
    yield Check(split, "encoding garbage", text, clean, settings.max_garbage)
    if source == "ner":
        yield Check(split, "equal token and tag lengths", "tags", ExpectEqualLengths(column_list=["tokens", "tags"]))
        yield Check(split, "well-formed BIO", "tags", ExpectWellFormedTags(column="tags"))
        yield Check(split, "label set", "tags", ExpectKnownTypes(column="tags", types=labels or []))
    if source == "sentiment":
        in_set = gxe.ExpectColumnValuesToBeInSet(column="label", value_set=labels or [])
        yield Check(split, "label set", "label", in_set)
        between = gxe.ExpectColumnValuesToBeBetween(column="seconds", min_value=-2_208_988_800, max_value=MAX_SECONDS)
        yield Check(split, "time between 1900 and 2100", "time", between)
    if split != "train":
        yield _never(split, "duplicates of earlier splits", text, "in_earlier", settings.max_duplicates)
        if source != "corpus":
            yield _never(split, "overlap with the corpus", text, "in_corpus", settings.max_corpus_overlap)


def _recommendation(frames: dict[str, pd.DataFrame], settings: config.Validate) -> Iterator[Check]:
    for table in ("items", *SPLITS):
        least = settings.min_rows
        yield Check(table, "minimum rows", None, gxe.ExpectTableRowCountToBeBetween(min_value=least), least)
    yield from _nulls("items", tables.REQUIRED["items"])
    yield Check("items", "duplicate item ids", "item_id", gxe.ExpectColumnValuesToBeUnique(column="item_id"))
    longest = settings.max_text_chars
    lengths = gxe.ExpectColumnValuesToBeBetween(column="characters", min_value=1, max_value=longest)
    yield Check("items", "length", "title", lengths, longest)
    clean = ExpectCleanText(column="text", mostly=1 - settings.max_garbage)
    yield Check("items", "encoding garbage", "title, description", clean, settings.max_garbage)
    for split in SPLITS:
        yield from _nulls(split, tables.REQUIRED["interactions"])
        yield _never(split, "unknown items", "item_id", "unknown_item", 0)
        between = gxe.ExpectColumnValuesToBeBetween(column="timestamp", min_value=0, max_value=MAX_SECONDS)
        yield Check(split, "time in seconds since 1970", "timestamp", between)
        if split != "train":
            once = gxe.ExpectColumnValuesToBeUnique(column="user_id")
            yield Check(split, "one interaction per user", "user_id", once)
            yield _never(split, "time order", "timestamp", "out_of_order", 0)
            yield _never(split, "duplicates of earlier splits", "item_id", "in_earlier", settings.max_duplicates)


def _nulls(table: str, columns: tuple[str, ...]) -> Iterator[Check]:
    for column in columns:
        yield Check(table, "no nulls", column, gxe.ExpectColumnValuesToNotBeNull(column=column))


def _never(table: str, name: str, column: str, flag: str, most: float) -> Check:
    """At most the share `most` of rows has the flag that `relate` computed."""
    return Check(
        table, name, column, gxe.ExpectColumnValuesToBeInSet(column=flag, value_set=[False], mostly=1 - most), most
    )


# ---- the frames that the checks look at


def schema_frame(source: str, read: dict[str, pa.Table]) -> pd.DataFrame:
    """One row per column of every table: `expected` and `found` as "train.text: string"."""
    rows = []
    for name, table in read.items():
        schema = tables.SCHEMAS[_kind(source, name)]
        for field in schema:
            found = table.schema.field(field.name).type if field.name in table.column_names else "missing"
            found = field.type if found == field.type else found  # equal types may name a list's items differently
            rows.append((f"{name}.{field.name}: {field.type}", f"{name}.{field.name}: {found}"))
        rows += [("", f"{name}.{column}: unexpected") for column in table.column_names if column not in schema.names]
    return _numbered(pd.DataFrame(rows, columns=["expected", "found"]))


def frames(read: dict[str, pa.Table]) -> dict[str, pd.DataFrame]:
    """The tables as frames of Python objects, rows numbered."""
    return {
        name: _numbered(
            pd.DataFrame(
                {field: pd.Series(table.column(field).to_pylist(), dtype=object) for field in table.column_names}
            )
        )
        for name, table in read.items()
    }


def relate(
    source: str, found: dict[str, pd.DataFrame], labels: list[str] | None, corpus: list[str] | None
) -> dict[str, pd.DataFrame]:
    """Add the columns that relate the tables to one another, and a table of the labels with their share of train."""
    if source == "recommendation":
        return _relate_interactions(found)
    related = {}
    seen: set[str] = set()
    for split in (split for split in SPLITS if split in found):
        frame = found[split].copy()
        texts = [_text(source, row) for row in frame["tokens" if source == "ner" else "text"]]
        keys = [normalise(text) or text for text in texts]
        frame["characters"] = [len(text.strip()) for text in texts]
        frame["in_earlier"] = [key in seen for key in keys]
        frame["in_corpus"] = False
        if source == "sentiment":
            frame["seconds"] = [None if pd.isna(time) else pd.Timestamp(time).timestamp() for time in frame["time"]]
        seen.update(keys)
        related[split] = frame
    if corpus is not None:
        _mark_corpus(source, related, corpus)
    if labels is not None:
        counts = label_counts(source, found["train"])
        total = max(sum(counts.values()), 1)
        shares = [counts.get(label, 0) / total for label in labels]
        related["labels"] = _numbered(pd.DataFrame({"label": labels, "share": shares}))
    return related


def label_counts(source: str, frame: pd.DataFrame) -> dict[str, int]:
    """Rows per label; for ner entities per type."""
    if source == "ner":
        return Counter(
            tag[2:] for tags in frame["tags"] for tag in _list(tags) if isinstance(tag, str) and tag.startswith("B-")
        )
    return Counter(label for label in frame["label"] if isinstance(label, str))


def _mark_corpus(source: str, related: dict[str, pd.DataFrame], corpus: list[str]) -> None:
    column = "tokens" if source == "ner" else "text"
    texts = [
        (split, _text(source, value)) for split in SPLITS[1:] if split in related for value in related[split][column]
    ]
    held_out = HeldOut(text for _, text in texts)
    hits: set[int] = set()
    for document in corpus:
        hits |= held_out.hits(document).texts
    flags = [index in hits for index in range(len(texts))]
    for split in SPLITS[1:]:
        if split in related:
            related[split]["in_corpus"] = [
                flag for flag, (where, _) in zip(flags, texts, strict=True) if where == split
            ]


def _relate_interactions(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    items = found["items"].copy()
    items["text"] = items["title"].fillna("") + " " + items["description"].fillna("")
    items["characters"] = [len(title.strip()) if isinstance(title, str) else 0 for title in items["title"]]
    known = set(items["item_id"])
    related = {"items": items}
    latest: dict[Any, int] = {}
    seen: set[tuple[Any, ...]] = set()
    for split in SPLITS:
        frame = found[split].copy()
        keys = list(zip(frame["user_id"], frame["item_id"], frame["timestamp"], strict=True))
        frame["unknown_item"] = [item not in known for item in frame["item_id"]]
        frame["in_earlier"] = [key in seen for key in keys]
        frame["out_of_order"] = [time is not None and time < latest.get(user, time) for user, _, time in keys]
        for user, _, time in keys:
            if time is not None:
                latest[user] = max(time, latest.get(user, time))
        seen.update(keys)
        related[split] = frame
    return related


def _kind(source: str, name: str) -> str:
    if source != "recommendation":
        return source
    return "items" if name == "items" else "interactions"


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    frame[ROW] = range(1, len(frame) + 1)
    return frame


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(source: str, value: Any) -> str:
    if source == "ner":
        return " ".join(token for token in _list(value) if isinstance(token, str))
    return value if isinstance(value, str) else ""


# ---- running them


def run(found: dict[str, pd.DataFrame], suite: list[Check]) -> list[Outcome]:
    """Validate every table against its checks, in the suite's order."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("tables")
    outcomes: dict[int, Outcome] = {}
    for table in dict.fromkeys(check.table for check in suite):
        batch = (
            source.add_dataframe_asset(table)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": found[table]})
        )
        wanted = gx.ExpectationSuite(name=table)
        for number, check in enumerate(suite):
            if check.table == table:
                check.expectation.meta = {"check": number}
                wanted.add_expectation(check.expectation)
        options = {"result_format": "SUMMARY", "partial_unexpected_count": 20, "unexpected_index_column_names": [ROW]}
        for result in batch.validate(wanted, result_format=options).results:
            assert result.expectation_config is not None and result.expectation_config.meta is not None
            number = result.expectation_config.meta["check"]
            outcomes[number] = _outcome(suite[number], result, len(found[table]))
    return [outcomes[number] for number in range(len(suite))]


def _outcome(check: Check, result: Any, rows: int) -> Outcome:
    detail = result.result or {}
    raised = next((info for info in _exceptions(result.exception_info) if info.get("raised_exception")), None)
    if raised:
        raise RuntimeError(f"{check.table}: {check.name} could not be computed: {raised.get('exception_message')}")
    indices = detail.get("partial_unexpected_index_list") or []
    observed = detail.get("observed_value")
    return Outcome(
        check,
        bool(result.success),
        int(detail.get("element_count", rows)),
        int(detail.get("unexpected_count", 0)),
        [int(index[ROW]) for index in indices],
        float(observed) if isinstance(observed, int | float) else None,
    )


def _exceptions(info: Any) -> list[dict[str, Any]]:
    """`info` is one dict, or a dict of one per metric."""
    if not isinstance(info, dict):
        return []
    return [info] if "raised_exception" in info else [value for value in info.values() if isinstance(value, dict)]
