"""What a file's name in a folder, a glob or on S3 says: its format and its role (a split, items or interactions)."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from memgpt import config
from memgpt.errors import UserError

FORMATS = ("conll", "jsonl", "csv", "tsv", "parquet", "txt")
# Further extensions that mean .conll in a NER source; the last three are those of CoNLL-2003.
_TAGGED = ("bio", "iob", "iob2", "tsv", "txt", "train", "testa", "testb")
WHOLE = "all"  # the role of rows that come without a split

_SPLIT = re.compile(
    r"(?<![a-z])(train|validation|validate|valid|val|devel|dev|eval|test)(ing|elopment|set|a|b)?(?![a-z])",
    re.IGNORECASE,
)
_TABLE = re.compile(r"(items|interactions)(?![a-z])", re.IGNORECASE)
_NOT_DATA = re.compile(r"(licen[cs]e|readme|notice|citation|copying|changelog)", re.IGNORECASE)
_NO_ROWS = re.compile(r"\.(py|ipynb|sh|md|html|pdf|png|log|md5|sha256)$", re.IGNORECASE)  # train.py is no split
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "validate": "validation",
    "devel": "validation",
    "testa": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


@dataclass(frozen=True)
class Part:
    """One fetched file or table of a source: the `path` of a local copy, or the `frame` itself.

    role: train, validation, test, all (not split), items or interactions. name: what messages call it.
    """

    role: str
    name: str
    path: Path | None = None
    frame: pd.DataFrame | None = None


def key(source: str) -> str:
    """What messages call a source: `data.ner.uri`; other inputs, such as `monitor.uri`, keep their name."""
    return f"data.{source}.uri" if source in config.SOURCES else source


def since(source: str) -> str:
    """The end of a message about changed content: since when it has changed, and how to fix it."""
    if source in config.SOURCES:
        return f"since the snapshot of {source}; run `memgpt snapshot`"
    return "meanwhile; run the command again"


def data_format(name: str, source: str = "") -> str | None:
    """The format of a file name: `train.jsonl.gz` → jsonl; None if it is not supported."""
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    if source == "ner" and suffix in _TAGGED:
        return "conll"
    return suffix if suffix in FORMATS else None


def is_data(name: str, source: str = "") -> bool:
    base = PurePosixPath(name).name
    return data_format(base, source) is not None and not base.startswith(".") and not _NOT_DATA.match(base)


def split_of(word: str) -> str | None:
    """The split in a name: train-00-of-04.jsonl.gz → train, news_dev.conll → validation, reviews.csv → None."""
    match = _SPLIT.search(word)
    if not match:
        return None
    return _SPLITS.get("".join(match.groups("")).lower()) or _SPLITS.get(match[1].lower(), "test")


def roles(source: str, uri: str, names: list[str], folder: bool) -> dict[str, str]:
    """File name → role, for one source's files. In a folder, if some files have a role, those without one are skipped,
    with a message. If a glob matches several folders, a file whose name says no split has that of its folder's name.
    Inputs outside the pipeline, such as `monitor.uri`, use all files.

    Raises:
        UserError: if there is no data file, a required file is missing (train, items, interactions), a glob mixes split
            and unsplit files, or a split has two formats or only an unsupported one.
    """
    where = key(source)
    tables = source == "recommendation"
    data = sorted(name for name in names if is_data(name, source))
    if not data:
        raise UserError(f"{where}: no data files at {uri}; formats are .{', .'.join(FORMATS)}, each also .gz")
    if source not in config.SOURCES:
        return dict.fromkeys(data, WHOLE)
    found: dict[str, str | None] = {}
    folders = {name: PurePosixPath(name).parent for name in data}
    several = len(set(folders.values())) > 1  # then a folder may be a split: train/part-0.csv
    for name in data:
        base = PurePosixPath(name).name
        table = _TABLE.match(base)
        split = split_of(base) or (split_of(folders[name].name) if several else None)
        found[name] = (table[1].lower() if table else None) if tables else split
    named = {name: role for name, role in found.items() if role}
    if tables:
        missing = {"items", "interactions"} - set(named.values())
        if missing:
            raise UserError(
                f"{where}: no {' and no '.join(sorted(missing))} file at {uri}; needed are items.* and "
                f"interactions.*, found {_some(data)}; rename the right ones"
            )
        if rest := [name for name in data if name not in named]:
            print(f"{where}: left out, neither items nor interactions: {_some(rest)}", file=sys.stderr)
    elif not named:
        named = dict.fromkeys(data, WHOLE)
    elif "train" not in named.values():
        if len(data) > 1:
            raise UserError(f"{where}: no train file at {uri}; found {_some(data)}")
        named = dict.fromkeys(data, WHOLE)
    elif rest := [name for name in data if name not in named]:
        if not folder:
            raise UserError(f"{where}: {_some(rest)} names no split while others do; narrow {uri}")
        print(f"{where}: left out, since others name a split and these do not: {_some(rest)}", file=sys.stderr)
    if not tables:
        unread = [base for name in names if not is_data(base := PurePosixPath(name).name, source)]
        for base in unread:
            beside = base.startswith(".") or _NOT_DATA.match(base) or _NO_ROWS.search(base)
            split = None if beside else split_of(base)
            if split and split not in named.values():
                raise UserError(
                    f"{where}: {base} names the split {split}, which no other file gives, but is in no format that is "
                    f"read; formats are .{', .'.join(FORMATS)}, each also .gz"
                )
    for role in set(named.values()):
        mine = [name for name, its in named.items() if its == role]
        formats = {(data_format(name, source), name.endswith(".gz")) for name in mine}
        if len(formats) > 1:
            raise UserError(f"{where}: {role} comes in more than one format at {uri}: {_some(mine)}; keep one")
    return named


def _some(names: list[str]) -> str:
    bases = [PurePosixPath(name).name for name in names]
    return ", ".join(bases[:3]) + (f" and {len(bases) - 3} more" if len(bases) > 3 else "")
