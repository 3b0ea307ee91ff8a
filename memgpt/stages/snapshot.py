"""Snapshot: record the present content of every source in `data/sources.lock.json`; ingest fetches exactly that."""

import json
from typing import Any

from memgpt import config, sources


def run(settings: config.Config) -> dict[str, float]:
    """Resolve all sources and write the lock file, unless nothing has changed. If a source fails, the lock stays."""
    entries = _resolve(settings)
    sources.write_lock(entries)
    return {f"{name}_files": float(len(entry["files"])) for name, entry in entries.items()}


def difference(settings: config.Config) -> list[str]:
    """What a snapshot would change in the lock, one line each: `sentiment: added src/may.jsonl (31,000 bytes)`."""
    known = _locked()
    lines = []
    for name, entry in _resolve(settings).items():
        before = known.get(name, {"uri": None, "files": []})
        if before["uri"] != entry["uri"]:
            lines.append(f"{name}: source {before['uri'] or 'none'} → {entry['uri']}")
        old, new = ({file["path"]: file for file in each["files"]} for each in (before, entry))
        for path in sorted(old.keys() | new.keys()):
            if old.get(path) == new.get(path):
                continue
            word = "added" if path not in old else "removed" if path not in new else "changed"
            unit = "rows" if entry["scheme"] == "sample" else "bytes"
            size = new.get(path, old.get(path, {})).get("size")
            lines.append(f"{name}: {word} {path}" + (f" ({size:,} {unit})" if size is not None else ""))
    return lines


def _resolve(settings: config.Config) -> dict[str, dict[str, Any]]:
    return {name: sources.resolve(name, getattr(settings.data, name)) for name in config.SOURCES}


def _locked() -> dict[str, Any]:
    try:
        return json.loads(sources.LOCK.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a snapshot rewrites it
        return {}
