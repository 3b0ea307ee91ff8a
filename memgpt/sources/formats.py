"""Files → rows with their line numbers. An error about a file is one line and does not quote the file's text."""

import contextlib
import csv
import gzip
import io
import json
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from memgpt.errors import UserError
from memgpt.sources.naming import Part, data_format

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


@dataclass(frozen=True)
class Rows:
    """A part after reading: the source's own columns, and each row's position (1-based line or row number)."""

    role: str
    name: str
    unit: str
    numbers: Sequence[int]
    frame: pd.DataFrame
    token_lines: Sequence[Sequence[int]] | None = None  # each token's line, if tokens have their own
    documents: bool = False  # each row is a text without labels

    def at(self, index: int) -> str:
        """A row's position for messages, such as `train.csv line 7`."""
        return f"{self.name} {self.unit} {self.numbers[index]}"


def read(part: Part, source: str = "") -> Rows:
    """Read one part. source: its source's name, on which the format may depend (`naming.data_format`).

    Raises:
        UserError: naming the file (and line), if it is empty, truncated, not UTF-8 or not in its format.
    """
    if part.frame is not None:
        if part.frame.empty:
            raise UserError(f"{part.name}: empty")
        return Rows(part.role, part.name, "row", range(1, len(part.frame) + 1), part.frame.reset_index(drop=True))
    data = _bytes(part)
    if not data.strip():
        raise UserError(f"{part.name}: empty")
    assert part.path is not None
    kind = data_format(part.path.name, source)
    numbers: Sequence[int]
    token_lines = None
    if kind == "parquet":
        frame = _parquet(part.name, data)
        unit, numbers = "row", range(1, len(frame) + 1)
    elif kind in ("csv", "tsv"):
        text = _text(part.name, data).rstrip("\r\n")
        frame = _csv(part.name, text, tabs=kind == "tsv")
        lines = [number for number, line in _lines(text) if line.strip() or frame.shape[1] == 1][1:]
        # if a quoted field spans lines, messages count rows instead
        unit, numbers = ("line", lines) if len(lines) == len(frame) else ("row", range(1, len(frame) + 1))
    else:
        reader = {"jsonl": _jsonl, "conll": _conll, "txt": _txt}[str(kind)]
        pairs = list(reader(part.name, _text(part.name, data)))
        unit, numbers = "line", [number for number, _ in pairs]
        frame = _frame([row for _, row in pairs])
        if kind == "conll" and not frame.empty:
            token_lines = frame.pop("lines").tolist()
    if frame.empty:
        raise UserError(f"{part.name}: holds no rows")
    return Rows(part.role, part.name, unit, numbers, frame, token_lines, documents=kind == "txt")


def _bytes(part: Part) -> bytes:
    assert part.path is not None
    raw = part.path.read_bytes()
    if not part.path.name.lower().endswith(".gz"):
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError:
        raise UserError(f"{part.name}: truncated: the gzip data ends too early; copy the file again") from None
    except (gzip.BadGzipFile, zlib.error):
        reason = "empty" if not raw else "not gzip data, or damaged; copy the file again"
        raise UserError(f"{part.name}: {reason}") from None


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} line {line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line), split only at \\n: str.splitlines would also split at U+2028 and the like inside a text."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame of Python objects, so that a value missing in one row does not change the others' type."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names})


def _jsonl(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            cut = "; the file seems cut off there" if not text.endswith("\n") and text.endswith(line) else ""
            raise UserError(
                f"{name} line {number}: not valid JSON ({error.msg} at column {error.colno}){cut}"
            ) from None
        except RecursionError:
            raise UserError(f"{name} line {number}: JSON that is nested too deeply") from None
        if not isinstance(row, dict):
            raise UserError(f"{name} line {number}: expected a JSON object with one key per column")
        yield number, row


def _conll(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of token … tag, split at tabs, else at spaces; only the first and last columns are used. Other white space
    is part of a token (10 000 with U+00A0). A blank line ends a sentence. `lines` has the line number of each token,
    for messages about tags.
    """
    tokens: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    counted: bool | None = None  # whether the first column of all lines so far is the number of the word
    for number, line in _lines(text + "\n"):
        if not line.strip():
            if tokens:
                yield lines[0], {"tokens": tokens, "tags": tags, "lines": lines}
                tokens, tags, lines = [], [], []
            continue
        fields = [field.strip(" ") for field in line.split("\t")] if "\t" in line else line.strip(" ").split(" ")
        if fields[0] == "-DOCSTART-":
            if tokens:
                yield lines[0], {"tokens": tokens, "tags": tags, "lines": lines}
                tokens, tags, lines = [], [], []
            continue
        if len(fields) < 2 or not fields[-1] or not fields[0]:
            raise UserError(f"{name} line {number}: expected a token and its tag, separated by a tab or a space")
        counted = counted is not False and len(fields) > 2 and fields[0] in (str(len(tokens)), str(len(tokens) + 1))
        tokens.append(fields[0])
        tags.append(fields[-1])
        lines.append(number)
    if counted:
        raise UserError(f"{name}: the first column numbers the words; leave it out: the first one must be the token")


def _txt(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each block of lines between blank lines is a document."""
    block: list[str] = []
    start = 1
    for number, line in _lines(text + "\n"):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield start, {"text": "\n".join(block)}
            block = []


def _csv(name: str, text: str, tabs: bool) -> pd.DataFrame:
    """All values as strings: an empty field is "", a field missing at the end of a line is null. Empty fields beyond
    those of the header are dropped, and blank lines, except in a single column, where they may be empty texts. In TSV,
    quotes are part of the text."""
    dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    several = ("\t" if tabs else ",") in text.lstrip().partition("\n")[0]
    try:
        with warnings.catch_warnings(record=True) as told:  # pandas drops fields without a name in the header
            warnings.simplefilter("always", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text),
                dtype=str,
                keep_default_na=False,
                index_col=False,
                skip_blank_lines=several,
                **dialect,
            )
    except pd.errors.EmptyDataError:
        raise UserError(f"{name}: empty") from None
    except pd.errors.ParserError as error:
        raise UserError(
            f"{name}: not a well-formed {'TSV' if tabs else 'CSV'} file ({str(error).strip().splitlines()[-1]})"
        ) from None
    if told:
        rows = csv.reader(io.StringIO(text), "excel-tab" if tabs else "excel", quoting=dialect.get("quoting", 0))
        known = len(next(rows))
        for row in rows:
            if any(row[known:]):
                raise UserError(
                    f"{name} line {rows.line_num}: {len(row)} fields, but the header names {known}; "
                    + ("a text holds no tab" if tabs else "put a text that holds a comma in double quotes")
                )
    if not tabs:
        _check_quotes(name, text)
    names = [str(column).strip() for column in frame.columns]  # text, label
    if len(set(names)) == len(names):
        frame.columns = pd.Index(names)
    return frame.astype(object).where(frame.notna(), None)


def _check_quotes(name: str, text: str) -> None:
    """Refuse a field that starts with a quote but does not end with one: it would swallow rows up to the next quote."""
    csv.field_size_limit(sys.maxsize)  # as in pandas, which has no limit; Python's is 131,072 characters
    rows = csv.reader(io.StringIO(text, newline=None), strict=True)
    begun = 1
    try:
        for _ in rows:
            begun = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name} line {begun}: a quoted field that does not end where its quote does ({error}); double the quotes "
            "inside of a field"
        ) from None


def _parquet(name: str, data: bytes) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"{name}: not a readable Parquet file, or truncated ({str(error).splitlines()[0][:120]})"
        ) from None
    if b"huggingface" in (table.schema.metadata or {}):  # a file of the hub: its metadata has the names of class labels
        import datasets

        table = plain(datasets.Dataset(datasets.table.InMemoryTable(table)))
    return pd.DataFrame(
        {column: pd.Series(_as_text(table.column(column)).to_pylist(), dtype=object) for column in table.column_names}
    )


def _as_text(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Decodes bytes that are text, which some writers (Spark, Hive) do not mark as such. Other bytes stay."""
    import pyarrow as pa

    lists = pa.types.is_list(column.type)
    inner = column.type.value_type if lists else column.type
    if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(pa.list_(pa.string()) if lists else pa.string())
    return column


def plain(part: "datasets.Dataset") -> "pa.Table":
    """The text, number and label columns of a table of the hub, with class labels as names. Others, such as images,
    audio and nested records, are dropped."""
    import datasets
    import pyarrow as pa

    columns = {}
    for column, feature in part.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            columns[column] = pa.array([_labelled(value, inner.names) for value in part[column]])
        elif isinstance(inner, datasets.Value):
            columns[column] = pa.array(list(part[column]))
    return pa.table(columns)


def _labelled(value: Any, names: list[str]) -> Any:
    """The name of a label number, or those of a list of them; None for −1, which marks a withheld label on the hub."""
    if isinstance(value, list):
        return [_labelled(item, names) for item in value]
    return None if value is None or value < 0 else names[value]
