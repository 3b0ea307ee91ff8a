"""The tables of the pipeline: their columns, how a source's rows are converted, how rows without a split get one."""

import ast
import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from memgpt import config
from memgpt.errors import UserError
from memgpt.overlap import normalise
from memgpt.sources import formats, naming
from memgpt.sources.formats import Rows
from memgpt.sources.naming import WHOLE, Part

_TIME = pa.timestamp("us")  # UTC, without a zone
SCHEMAS = {
    "corpus": pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())]),
    "ner": pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.string())), ("tags", pa.list_(pa.string()))]),
    "sentiment": pa.schema(
        [("id", pa.string()), ("text", pa.string()), ("label", pa.string()), ("topic", pa.string()), ("time", _TIME)]
    ),
    "items": pa.schema(
        [("item_id", pa.string()), ("title", pa.string()), ("description", pa.string()), ("tags", pa.string())]
    ),
    "interactions": pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("timestamp", pa.int64()),
            ("event", pa.string()),
            ("rating", pa.float64()),
        ]
    ),
}
# Usual names of our columns, tried in this order where `data.<source>.columns` has none; data/README.md lists them.
USUAL = {
    "corpus": {"id": ("id", "doc_id"), "text": ("text", "content", "body", "document"), "source": ("source", "domain")},
    "ner": {"id": ("id", "sentence_id"), "tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "labels")},
    "sentiment": {
        "id": ("id", "review_id"),
        "text": ("text", "sentence", "review", "content"),
        "label": ("label", "sentiment"),
        "topic": ("topic", "aspect", "target", "category"),
        "time": ("time", "timestamp", "date", "published"),
    },
    "items": {
        "item_id": ("item_id", "itemId", "movie_id", "movieId", "product_id", "id"),
        "title": ("title", "name"),
        "description": ("description", "text", "summary", "abstract", "genres", "category"),
        "tags": ("tags", "keywords"),
    },
    "interactions": {
        "user_id": ("user_id", "userId", "user"),
        "item_id": ("item_id", "itemId", "movie_id", "movieId", "product_id", "item"),
        "timestamp": ("timestamp", "time", "date"),
        "event": ("event", "action", "type"),
        "rating": ("rating", "score", "stars"),
    },
}
REQUIRED = {
    "corpus": ("text",),
    "ner": ("tokens", "tags"),
    "sentiment": ("text", "label"),
    "items": ("item_id", "title"),
    "interactions": ("user_id", "item_id", "timestamp"),
}
_SINGLE = {"text", "label", "title", "item_id", "user_id"}  # columns whose value is never a list
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")
LICENCE_COLUMNS = ("license", "licence")
_LONGEST_NAME = 64  # characters of a column's name
MILLISECONDS = 10**11  # a numeric time above this is in milliseconds: as seconds it would be after the year 5000

_DAY = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")  # 20240531; as seconds it would be in 1970
_DAY_OR_MONTH_FIRST = re.compile(r"\d{1,2}[-/.]\d{1,2}[-/.]\d")  # 03/04/2024 is ambiguous

_LITERAL = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)  # a string in JSON or Python
_GLUED = re.compile(r'\[""(\s*"")+\s*\]')
_BIO = re.compile(r"O|[BI]-\S(?:.*\S)?")  # a type may be several words


@dataclass(frozen=True)
class Built:
    """The result for one source: table name → rows, and what the manifest records about them."""

    tables: dict[str, pa.Table]
    labels: list[str] | None
    columns: dict[str, str]
    licences: list[str]  # of the rows, where they name one


def build(name: str, parts: Iterable[Part], source: config.Source, settings: config.Ingest) -> Built:
    """The tables of one source.

    Raises:
        UserError: naming the file and row of what cannot be converted to a row of the table.
    """
    read = [formats.read(part, name) for part in parts]
    if name == "recommendation":
        return _recommendation(read, source)
    columns: dict[str, str] = {}
    splits: dict[str, list[dict[str, Any]]] = {}
    licences: set[str] = set()
    for rows in read:
        _refuse_splits(rows)
        found = _columns(name, name, rows, source.columns)
        columns.update(found)
        licences |= _licences(rows)
        splits.setdefault(rows.role, []).extend(_RECORDS[name](rows, found))
    splits = _complete(name, splits, settings)
    _identify(name, splits)
    labels = None if name == "corpus" else _labels(name, splits, source.labels)
    order = [split for split in ("train", "validation", "test") if splits.get(split)]
    tables = {split: _table(name, splits[split]) for split in order}
    return Built(tables, labels, columns, sorted(licences))


def entity_types(tags: Iterable[str]) -> set[str]:
    """{"O", "B-person", "I-person"} → {"person"}."""
    return {tag[2:] for tag in tags if tag != "O"}


def bio_error(tags: Sequence[str]) -> tuple[int, str] | None:
    """The first position where the tags are not well-formed BIO, and why; None if they are."""
    previous = "O"
    for position, tag in enumerate(tags):
        if not isinstance(tag, str) or not _BIO.fullmatch(tag):
            return position, f"tag {tag!r} is none of O, B-type, I-type"
        if tag.startswith("I-") and previous[2:] != tag[2:]:
            return position, f"{tag} follows {previous}, so that no B-{tag[2:]} begins the entity"
        previous = tag
    return None


def write(table: pa.Table, path: Path | IO[bytes]) -> None:
    """Parquet with fixed settings, so that equal rows are equal bytes."""
    pq.write_table(table, path, compression="zstd", row_group_size=1 << 16, version="2.6", write_statistics=True)


def content_hash(name: str, row: dict[str, Any]) -> str:
    """Hex sha256 of the row's normalised text, without its labels, so that copies of a text share a split."""
    text = " ".join(row["tokens"]) if name == "ner" else row["text"] or ""
    return hashlib.sha256((normalise(text) or text).encode("utf-8", "surrogatepass")).hexdigest()


def _complete(
    name: str, splits: dict[str, list[dict[str, Any]]], settings: config.Ingest
) -> dict[str, list[dict[str, Any]]]:
    """Keep the splits that the source has. Missing ones are split off by content hash, so that rows never change split
    as data grows. The corpus needs no test split."""
    rest = splits.pop(WHOLE, None) or splits.pop("train", [])
    fractions = {"test": settings.test_fraction, "validation": settings.validation_fraction}
    if name == "corpus":
        fractions = {"validation": settings.corpus_validation_fraction}
    wanted = {split: fraction for split, fraction in fractions.items() if split not in splits}
    result = {"train": [], **{split: [] for split in wanted}, **splits}
    for row in rest:
        place = int(content_hash(name, row)[:13], 16) / 16**13  # in [0, 1)
        target = "train"
        for split, fraction in wanted.items():
            if place < fraction:
                target = split
                break
            place -= fraction
        result[target].append(row)
    for split, rows in result.items():
        if not rows:
            knob = "corpus_validation" if name == "corpus" else "validation" if split == "train" else split
            raise UserError(f"data.{name}: no rows for {split}; bring more rows, or change ingest.{knob}_fraction")
    return result


def _identify(name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Give every row a unique id: the source's, else 16 digits of the content hash; a repeated one gets -2, -3, …"""
    counts: dict[str, int] = {}
    taken: set[str] = set()
    for split in ("train", "validation", "test"):
        for row in splits.get(split, []):
            base = row["id"] or content_hash(name, row)[:16]
            identity = base
            while identity in taken:
                counts[base] = counts.get(base, 1) + 1
                identity = f"{base}-{counts[base]}"
            taken.add(identity)
            row["id"] = identity


def _labels(name: str, splits: dict[str, list[dict[str, Any]]], pinned: list[str] | None) -> list[str]:
    """The label set: pinned, else that of train; a label outside it is an error."""

    def of(row: dict[str, Any]) -> set[str]:
        return entity_types(row["tags"]) if name == "ner" else {row["label"]} - {None}

    known = set(pinned) if pinned is not None else {label for row in splits["train"] for label in of(row)}
    word = "entity type" if name == "ner" else "label"
    if not known:
        raise UserError(f"data.{name}: train has no {word}")
    if pinned is None:
        spelled: dict[str, str] = {}
        for label in sorted(known):
            other = spelled.setdefault(label.casefold().removesuffix(".0"), label)
            if other != label:
                at = next(row["at"] for row in splits["train"] if label in of(row))
                raise UserError(
                    f"{at}: {word} {label!r}, elsewhere {other!r}; spell it one way, or pin both in data.{name}.labels"
                )
    for split, rows in splits.items():
        for row in rows:
            if extra := of(row) - known:
                label = sorted(extra)[0]
                if pinned is not None:
                    raise UserError(
                        f"{row['at']}: {word} {label!r} is not among data.{name}.labels; mend the row or add the label"
                    )
                raise UserError(
                    f"{row['at']}: {word} {label!r} of {split} is not in train; mend the row or pin data.{name}.labels"
                )
    return sorted(known)


def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = SCHEMAS[name]
    return pa.table([pa.array([row[field.name] for row in rows], type=field.type) for field in schema], schema=schema)


# ---- columns


def _columns(name: str, table: str, rows: Rows, mapping: Mapping[str, str | None]) -> dict[str, str]:
    """Our column → the source's, for the columns that the rows have."""
    has = [str(column) for column in rows.frame.columns]
    taken = {mapping[column] for column in USUAL[table] if column in mapping}  # not for other columns
    found: dict[str, str] = {}
    for column, usual in USUAL[table].items():
        asked = mapping.get(column)
        if column in mapping and asked is None:
            continue
        candidates = [other for other in usual if other not in taken]
        if asked:  # of two tables, the other one's id may have a usual name
            candidates = [asked, *(candidates if table != name else ())]
        match = next((candidate for candidate in candidates if candidate in has), None)
        if match is not None:
            found[column] = match
        elif asked and table == name:
            raise UserError(f"{rows.name}: no column {asked!r} (data.{name}.columns.{column}); it has {_listed(has)}")
    if unknown := set(mapping) - {column for known in _own_tables(name) for column in USUAL[known]}:
        raise UserError(f"data.{name}.columns.{sorted(unknown)[0]}: not a column of {' or '.join(_own_tables(name))}")
    missing = [column for column in REQUIRED[table] if column not in found]
    if missing and rows.documents:
        raise UserError(
            f"{rows.name}: a .txt file holds texts without a {missing[0]}; bring .csv, .tsv, .jsonl or .parquet"
        )
    if missing and len(has) == 1 and re.search(r"[;,|\t]", has[0]):
        raise UserError(
            f"{rows.name}: a single column, {_listed(has)}; commas separate the fields of a .csv, tabs those of a .tsv"
        )
    if name == "ner" and missing == ["tokens", "tags"] and "text" in has:
        raise UserError(
            f"{rows.name}: a text with spans is not read; it has {_listed(has)}; bring its words as 'tokens' and a "
            "tag for each as 'tags'"
        )
    if missing and (asked := mapping.get(missing[0])):
        raise UserError(
            f"{rows.name}: no column {asked!r} (data.{name}.columns.{missing[0]}), nor one of a usual name, such as "
            f"{USUAL[table][missing[0]][0]!r}; it has {_listed(has)}; rename the right one"
        )
    if missing:
        raise UserError(
            f"{rows.name}: no column {missing[0]!r}; it has {_listed(has)}; "
            f"name the right one with data.{name}.columns.{missing[0]}"
        )
    return found


def _listed(columns: list[str]) -> str:
    """The columns of a file, for an error message. Without a header line they are private text, which is not shown."""
    if any(len(column) > _LONGEST_NAME for column in columns):
        return "a first line that does not look like names of columns; a file begins with such a line"
    return ", ".join(columns)


def _refuse_splits(rows: Rows) -> None:
    """Raise UserError for a column that names each row's split: it is not read, so test rows would be trained on."""
    for column in rows.frame.columns if rows.role == WHOLE else ():
        if str(column).strip().lower() in _SPLIT_COLUMNS:
            splits = {naming.split_of(value) for value in map(str, rows.frame[column])}
            if None not in splits and len(splits) > 1:
                raise UserError(
                    f"{rows.name}: column {str(column)!r} names splits, and is not read; write a file for each "
                    "(train.csv, …), or take the column out"
                )


def _own_tables(name: str) -> tuple[str, ...]:
    return ("items", "interactions") if name == "recommendation" else (name,)


def _licences(rows: Rows) -> set[str]:
    column = next((column for column in LICENCE_COLUMNS if column in rows.frame.columns), None)
    return {str(value) for value in rows.frame[column] if _present(value)} if column else set()


def _values(rows: Rows, found: dict[str, str], column: str) -> list[Any]:
    """The values of one of our columns, None where the source has none.

    Raises:
        UserError: for a list or a record where one value is meant: as text it would be its brackets and quotes too.
    """
    if column not in found:
        return [None] * len(rows.frame)
    values = rows.frame[found[column]].tolist()
    if column in _SINGLE:
        for index, value in enumerate(values):
            if isinstance(value, list | tuple | dict | bytes):
                raise UserError(
                    f"{rows.at(index)}: column {found[column]!r} is not one value; write a text or a number"
                )
    return values


def _present(value: Any) -> bool:
    """Neither null nor NaN nor the empty string."""
    if value is None or value is pd.NaT or (isinstance(value, str) and not value):
        return False
    return not (isinstance(value, float) and math.isnan(value))


def _string(value: Any) -> str | None:
    """As text: 3 and 3.0 become "3", a missing value None. Lone surrogates, which JSON allows, become U+FFFD."""
    if not _present(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (
        str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace") if isinstance(value, str) else str(value)
    )


# ---- rows of each source


def _corpus_records(rows: Rows, found: dict[str, str]) -> Iterable[dict[str, Any]]:
    sources = _values(rows, found, "source")
    fallback = Path(rows.name).name if rows.unit == "line" else None
    for index, (identity, text) in enumerate(
        zip(_values(rows, found, "id"), _values(rows, found, "text"), strict=True)
    ):
        source = _string(sources[index]) or fallback
        yield {"id": _string(identity), "text": _string(text), "source": source, "at": rows.at(index)}


def _sentiment_records(rows: Rows, found: dict[str, str]) -> Iterable[dict[str, Any]]:
    values = {column: _values(rows, found, column) for column in USUAL["sentiment"]}
    for index in range(len(rows.frame)):
        row: dict[str, Any] = {column: _string(values[column][index]) for column in ("id", "text", "label", "topic")}
        row["label"] = (row["label"] or "").strip() or None
        time = values["time"][index]
        row["time"] = None
        if _present(time):
            row["time"] = _moment(time, rows, index, found["time"], _left_out("sentiment", "time")).to_pydatetime()
        yield {**row, "at": rows.at(index)}


def _ner_records(rows: Rows, found: dict[str, str]) -> Iterable[dict[str, Any]]:
    lines = rows.token_lines
    tokens_of, tags_of = (
        [_sequence(value, rows, index, found[column]) for index, value in enumerate(_values(rows, found, column))]
        for column in ("tokens", "tags")
    )
    if len(tokens_of) > 1 and not lines and all(map(_is_word, _values(rows, found, "tokens"))):
        raise UserError(
            f"{rows.name}: every row holds one word; a row is a sentence, or bring a .conll file, with a word and its "
            "tag on a line and a blank line after each sentence"
        )
    tags_of = _as_bio(tags_of)
    identities = _values(rows, found, "id")
    for index, (identity, tokens, tags) in enumerate(zip(identities, tokens_of, tags_of, strict=True)):
        if len(tokens) != len(tags):
            raise UserError(f"{rows.at(index)}: {len(tokens)} tokens but {len(tags)} tags; give each token one tag")
        if broken := bio_error(tags):
            position, reason = broken
            where = f"{rows.name} line {lines[index][position]}" if lines else f"{rows.at(index)}, tag {position + 1}"
            known = _BIO.fullmatch(tags[position])
            fix = "begin every entity with B-" if known else "BIO, IOB1, BIOES and BILOU are read"
            raise UserError(f"{where}: broken BIO: {reason}; {fix}")
        yield {"id": _string(identity), "tokens": tokens, "tags": tags, "at": rows.at(index)}


def _is_word(value: Any) -> bool:
    """Whether a cell is a single word, not a list."""
    return isinstance(value, str) and not value.startswith("[") and len(value.split()) == 1


_ENDS = {"E": "I", "L": "I", "S": "B", "U": "B"}  # marks of BIOES and BILOU → BIO


def _as_bio(sentences: list[list[str]]) -> list[list[str]]:
    """The tags of a file, converted to BIO from the equivalent schemes BIOES, BILOU and IOB1, where entities begin with
    I-, and with B- only right after another of their type. Other tags are kept: `bio_error` says what is wrong."""
    if any(tag[1:2] == "-" and tag[0] in _ENDS for tags in sentences for tag in tags):
        return [[_ENDS.get(tag[0], tag[0]) + tag[1:] if tag[1:2] == "-" else tag for tag in tags] for tags in sentences]
    starts = [[tag[:2] for before, tag in pairwise(["O", *tags]) if _starts(before, tag)] for tags in sentences]
    if {start for row in starts for start in row} != {"I-"}:
        return sentences
    return [
        ["B" + tag[1:] if _starts(before, tag) else tag for before, tag in pairwise(["O", *tags])] for tags in sentences
    ]


def _starts(before: str, tag: str) -> bool:
    """Whether an entity begins at `tag` because the tag before it has no type or another one."""
    return tag[:2] in ("B-", "I-") and before[2:] != tag[2:]


def _sequence(value: Any, rows: Rows, index: int, column: str) -> list[str]:
    """A list of strings. A text cell is parsed as a JSON or Python list, else split at white space."""
    if isinstance(value, str) and value.startswith("["):
        if _GLUED.fullmatch(_LITERAL.sub('""', value)):  # Python would read 'a' 'b' as 'ab'
            raise UserError(
                f"{rows.at(index)}: column {column!r} has lists without commas, as NumPy prints them; write JSON"
            )
        for parse in (json.loads, ast.literal_eval):  # as Python and pandas write lists
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = parse(value)
                break
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list | tuple) and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        numbers = isinstance(value, list | tuple) and any(isinstance(item, int) for item in value)
        hint = "; numbers stand for names that the file does not have: write these" if numbers else ""
        raise UserError(f"{rows.at(index)}: column {column!r} is not a list of strings{hint}")
    return [_string(item) or "" for item in value]


def _left_out(name: str, column: str) -> str:
    """The end of a message about an optional column: how to leave it out."""
    return f", or leave the column out with data.{name}.columns.{column}=null"


def _moment(value: Any, rows: Rows, index: int, column: str, otherwise: str = "") -> pd.Timestamp:
    """A time as UTC without a zone, from a date in ISO form, or seconds or milliseconds since 1970. otherwise: the end
    of the error message."""
    try:
        if isinstance(value, int) and _DAY.fullmatch(str(value)):
            value = str(value)
        if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()) and len(value.strip()) > 8:
            value = float(value)
        if isinstance(value, str) and _DAY_OR_MONTH_FIRST.match(value.strip()):
            raise ValueError
        if isinstance(value, int | float) and not isinstance(value, bool):
            moment = pd.Timestamp(value, unit="ms" if abs(value) > MILLISECONDS else "s")
        else:
            moment = pd.Timestamp(value)
        moment = moment.tz_convert("UTC").tz_localize(None) if moment.tzinfo else moment
        if moment is pd.NaT:
            raise ValueError
        return moment.floor("us")
    except (ValueError, TypeError, OverflowError):
        raise UserError(
            f"{rows.at(index)}: column {column!r} is not a time; write 2024-05-31T12:00:00 or seconds since 1970"
            + otherwise
        ) from None


_RECORDS: dict[str, Callable[[Rows, dict[str, str]], Iterable[dict[str, Any]]]] = {
    "corpus": _corpus_records,
    "ner": _ner_records,
    "sentiment": _sentiment_records,
}


# ---- recommendation


def _recommendation(read: list[Rows], source: config.Source) -> Built:
    records: dict[str, list[dict[str, Any]]] = {"items": [], "interactions": []}
    columns: dict[str, str] = {}
    licences: set[str] = set()
    mapped: set[str] = set()
    for rows in read:
        found = _columns("recommendation", rows.role, rows, source.columns)
        columns.update({f"{rows.role}.{ours}": theirs for ours, theirs in found.items()})
        mapped |= {ours for ours, theirs in source.columns.items() if found.get(ours) == theirs}
        licences |= _licences(rows)
        records[rows.role].extend((_items if rows.role == "items" else _interactions)(rows, found))
    if lost := sorted(set(source.columns) - mapped):
        raise UserError(
            f"data.recommendation.columns.{lost[0]}: no column {source.columns[lost[0]]!r} in items or interactions"
        )
    splits = leave_last_out(records["interactions"])
    if again := len(records["interactions"]) - sum(map(len, splits.values())):
        print(
            f"data.recommendation.uri: left out, with items that the user had interacted with before: {again} of "
            f"{len(records['interactions'])} interactions",
            file=sys.stderr,
        )
    tables = {"items": _table("items", records["items"])}
    tables |= {split: _table("interactions", rows) for split, rows in splits.items()}
    return Built(tables, None, columns, sorted(licences))


def read_texts(part: Part, column: str | None = None, history: bool = False) -> list[dict[str, Any]]:
    """Rows {id, text, topic, time, at} of a file without labels; at: file and row. What is missing is None.

    column: the text column, if it has none of the usual names. history: rows have `history`, lists of strings, instead.

    Raises:
        UserError: naming the file or row that cannot be read.
    """
    rows = formats.read(part)
    main = "history" if history else "text"
    usual = {name: USUAL["sentiment"][name] for name in ("id", "text", "topic", "time")}
    usual[main] = (column,) if column else usual["text"] if main == "text" else (main,)
    found = {ours: name for ours, names in usual.items() for name in reversed(names) if name in rows.frame.columns}
    if main not in found:
        has = ", ".join(str(name) for name in rows.frame.columns)
        raise UserError(f"{rows.name}: no column {' or '.join(map(repr, usual[main]))}; it has {has}")
    values = {ours: _values(rows, found, ours) for ours in usual}
    read = []
    for index in range(len(rows.frame)):
        row: dict[str, Any] = {name: _string(values[name][index]) for name in ("id", "topic")}
        value, time = values[main][index], values["time"][index]
        if not history:
            row["text"] = _string(value)
        else:
            row["history"] = _sequence(value, rows, index, found[main]) if _present(value) else None
        row["time"] = _moment(time, rows, index, found["time"]).to_pydatetime() if _present(time) else None
        read.append({**row, "at": rows.at(index)})
    return read


def read_items(path: Path, columns: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Rows of the items table from a file in any of the formats. columns: ours → the file's, as in
    data.recommendation.columns; those of interactions are ignored.

    Raises:
        UserError: naming the file and row of an item without id or title, or with the id of another item.
    """
    if not path.is_file() or not naming.data_format(path.name):
        raise UserError(f"{path}: no such file, or not one of .{', .'.join(naming.FORMATS)}, each also .gz")
    rows = formats.read(Part("items", str(path), path))
    found = _columns("recommendation", "items", rows, columns)
    items = list(_items(rows, found))
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        for column in REQUIRED["items"]:
            if not (item[column] or "").strip():
                raise UserError(f"{rows.at(index)}: column {found[column]!r} is empty; give every item one")
        if (other := first.setdefault(item["item_id"], index)) != index:
            raise UserError(
                f"{rows.at(index)}: item id {item['item_id']!r} is also that of {rows.at(other)}; each needs its own"
            )
    return items


def _items(rows: Rows, found: dict[str, str]) -> Iterable[dict[str, Any]]:
    values = {column: _values(rows, found, column) for column in USUAL["items"]}
    for index in range(len(rows.frame)):
        yield {
            "item_id": _string(values["item_id"][index]),
            "title": _string(values["title"][index]),
            "description": _joined(values["description"][index], ", "),
            "tags": _joined(values["tags"][index], "|"),
        }


def _joined(value: Any, separator: str) -> str:
    """A|B, or a list, as one string with `separator`."""
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        return separator.join(filter(None, map(_string, value)))
    text = _string(value) or ""
    # prose may contain a |, but with spaces around it; a joined list has none
    return separator.join(text.split("|")) if "|" in text and " | " not in text else text


def _interactions(rows: Rows, found: dict[str, str]) -> Iterable[dict[str, Any]]:
    users, items, times, events, ratings = (_values(rows, found, column) for column in USUAL["interactions"])
    for index in range(len(rows.frame)):
        row: dict[str, Any] = {"user_id": _string(users[index]), "item_id": _string(items[index])}
        for column in ("user_id", "item_id"):
            if row[column] is None:
                raise UserError(f"{rows.at(index)}: column {found[column]!r} is empty")
        row["timestamp"] = _seconds(times[index], rows, index, found["timestamp"])
        row["event"] = _string(events[index])
        row["rating"] = None
        if _present(ratings[index]):
            try:
                row["rating"] = float(ratings[index])
            except (TypeError, ValueError):
                raise UserError(
                    f"{rows.at(index)}: column {found['rating']!r} is not a number; write 4.5"
                    + _left_out("recommendation", "rating")
                ) from None
        yield row


def _seconds(value: Any, rows: Rows, index: int, column: str) -> int:
    """Whole seconds since 1970, UTC."""
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is not None and not _DAY.fullmatch(str(value)):
        return number // 1000 if abs(number) > MILLISECONDS else number
    return int(_moment(value, rows, index, column).timestamp() // 1)


def leave_last_out(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each user's last interaction → test, the one before → validation, the rest → train; ties are broken by item id.
    A user with fewer than three stays in train. Sorted by user, time and item.

    Of a user's interactions with one item only the first counts. Items already read are not offered again, so a next
    item that had been read before could never be found.
    """
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["user_id"], row["timestamp"], row["item_id"])):
        first.setdefault((row["user_id"], row["item_id"]), row)
    ordered = list(first.values())
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    counts: dict[str, int] = {}
    for row in ordered:
        counts[row["user_id"]] = counts.get(row["user_id"], 0) + 1
    left = dict(counts)
    for row in ordered:
        user = row["user_id"]
        left[user] -= 1
        held_out = counts[user] >= 3 and left[user] < 2
        splits[("test", "validation")[left[user]] if held_out else "train"].append(row)
    return splits
