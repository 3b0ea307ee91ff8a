"""`sample://newsroom?scale=1&seed=7`: the embedded, generated data, locked by a digest of the generated rows."""

import functools
import hashlib
import json
from typing import Any
from urllib.parse import parse_qsl

import pandas as pd

from memgpt.errors import UserError
from memgpt.sources import naming
from memgpt.sources.naming import Part


def resolve(name: str, uri: str) -> dict[str, Any]:
    frames = _generate(*_parse(name, uri))[name]
    files = [
        {"path": f"{name}/{role}", "role": role, "size": len(frame), "sha256": digest(frame)}
        for role, frame in sorted(frames.items())
    ]
    return {"family": "sample:newsroom", "licence": "Apache-2.0", "non_commercial": False, "files": files}


def fetch(name: str, entry: dict[str, Any]) -> list[Part]:
    frames = _generate(*_parse(name, entry["uri"]))[name]
    for file in entry["files"]:
        if file["role"] not in frames or digest(frames[file["role"]]) != file["sha256"]:
            raise UserError(f"{entry['uri']}: {file['path']} changed {naming.since(name)}")
    return [
        Part(role=file["role"], name=f"newsroom {file['path']}", frame=frames[file["role"]]) for file in entry["files"]
    ]


def digest(frame: pd.DataFrame) -> str:
    """sha256 over column names and rows as JSON; the same on every machine."""
    total = hashlib.sha256(json.dumps(list(frame.columns)).encode())
    for row in frame.itertuples(index=False, name=None):
        total.update(json.dumps([_plain(value) for value in row], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(value)
    if value is None or pd.isna(value):
        return None
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return value.item() if hasattr(value, "item") else value


def _parse(name: str, uri: str) -> tuple[float, int]:
    """(scale, seed) of the URI."""
    key = f"data.{name}.uri"
    address, _, query = uri.removeprefix("sample://").partition("?")
    if address.strip("/") != "newsroom":
        raise UserError(f"{key}: no sample {address!r}; the embedded data is sample://newsroom")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := set(options) - {"scale", "seed"}:
        raise UserError(f"{key}: unknown option {sorted(unknown)[0]!r}; sample://newsroom takes scale and seed")
    try:
        scale, seed = float(options.get("scale", 1)), int(options.get("seed", 7))
    except ValueError:
        raise UserError(f"{key}: scale must be a number and seed a whole number in {uri}") from None
    if not 0 < scale < float("inf") or seed < 0:
        raise UserError(f"{key}: scale must be above 0 and seed not negative in {uri}")
    return scale, seed


@functools.lru_cache(maxsize=1)  # the four sources of one snapshot share a world
def _generate(scale: float, seed: int) -> dict[str, dict[str, pd.DataFrame]]:
    from memgpt import newsroom

    return newsroom.generate(scale=scale, seed=seed)
