"""Data sources: a URI in `params.yaml` → a lock entry (snapshot) → exactly the locked content (ingest).

Each scheme is a module with two functions. `resolve(name, uri)` inspects the source and returns its lock entry.
`fetch(name, entry)` returns the locked content as parts and fails if it has changed. Keys of a lock entry:

    uri, scheme, family   family: identifies the data set without its version; models of two families are not compared
    licence, non_commercial
    files                 what to fetch, and what identifies it: path, role, size, sha256 | etag, version | revision
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from memgpt import atomic, config
from memgpt.errors import UserError
from memgpt.sources import naming
from memgpt.sources.naming import Part

LOCK = Path("data/sources.lock.json")
SCHEMES = ("file", "hf", "s3", "sample")


def scheme(name: str, uri: str) -> str:
    """The scheme of a URI; `file` for a plain path.

    Raises:
        UserError: if the URI is empty or its scheme is unknown.
    """
    if not uri.strip():
        raise UserError(f"{naming.key(name)}: empty; write a path, s3://…, hf://… or sample://newsroom")
    found, separator, _ = uri.partition("://")
    if not separator:
        return "file"
    if found not in SCHEMES or found == "file":
        raise UserError(
            f"{naming.key(name)}: unknown scheme {found}://; "
            f"known are sample://, s3:// and hf://; a local path has none"
        )
    return found


def resolve(name: str, source: config.Source) -> dict[str, Any]:
    """The lock entry for the present content of a source."""
    kind = scheme(name, source.uri)
    return {"uri": source.uri, "scheme": kind, **_module(kind).resolve(name, source.uri)}


def fetch(name: str, source: config.Source, entry: dict[str, Any]) -> list[Part]:
    """The content that the lock entry describes.

    Raises:
        UserError: if the content is missing or has changed.
    """
    return _module(entry["scheme"]).fetch(name, entry)


def read_lock(name: str, source: config.Source, path: Path = LOCK) -> dict[str, Any]:
    """The lock entry of one source; UserError if it is missing, damaged, or for another URI than in `params.yaml`."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[name]
    except (FileNotFoundError, KeyError, TypeError):
        raise UserError(f"{path}: nothing locked for {name}; run `memgpt snapshot`") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not valid JSON; run `memgpt snapshot`") from None
    if not isinstance(entry, dict) or not {"uri", "scheme", "family", "files"} <= entry.keys():
        raise UserError(f"{path}: the entry of {name} is not complete; run `memgpt snapshot`")
    if entry["uri"] != source.uri:
        raise UserError(
            f"data.{name}.uri is {source.uri} but {path} has {entry['uri']}; run `memgpt snapshot` to lock it"
        )
    return entry


def write_lock(entries: dict[str, dict[str, Any]], path: Path = LOCK) -> bool:
    """Write the lock file with reproducible bytes, unless it has equal content. Returns whether it changed."""
    try:
        if json.loads(path.read_text(encoding="utf-8")) == entries:
            return False
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        pass
    atomic.write_json(path, entries)
    return True


def _module(kind: str) -> ModuleType:
    """The scheme's module. Only that one is imported, since boto3 and datasets import slowly."""
    if kind == "sample":
        from memgpt.sources import sample

        return sample
    if kind == "s3":
        from memgpt.sources import s3

        return s3
    if kind == "hf":
        from memgpt.sources import hub

        return hub
    from memgpt.sources import files

    return files
