"""Ingest: the locked content of one source → its tables and manifest in `data/tables/<source>/`."""

from typing import Any

import pyarrow as pa

from memgpt import atomic, config, sources, tables
from memgpt.sources import licences


def run(settings: config.Config, source: str) -> dict[str, float]:
    """Fetch exactly the locked content, normalise it, split what has no split, and write the folder atomically."""
    where: config.Source = getattr(settings.data, source)
    entry = sources.read_lock(source, where)
    built = tables.build(source, sources.fetch(source, where, entry), where, settings.ingest)
    with atomic.replacing(config.TABLES / source) as folder:
        folder.mkdir()
        for name, table in built.tables.items():
            tables.write(table, folder / f"{name}.parquet")
        atomic.write_json(folder / "manifest.json", _manifest(where, entry, built))
    return {f"{name}_rows": float(table.num_rows) for name, table in built.tables.items()}


def _manifest(where: config.Source, entry: dict[str, Any], built: tables.Built) -> dict[str, Any]:
    licence, restricted = _licence(where, entry, built.licences)
    return {
        "source": where.uri,
        "family": entry["family"],
        "licence": licence,
        "non_commercial": restricted,
        "labels": built.labels,
        "files": {file["path"]: file.get("size") for file in entry["files"]},
        "rows": _rows(built.tables),
        "columns": built.columns,
    }


def _rows(built: dict[str, pa.Table]) -> dict[str, int]:
    return {name: table.num_rows for name, table in built.items()}


def _licence(where: config.Source, entry: dict[str, Any], of_rows: list[str]) -> tuple[str | None, bool]:
    """(licence, non-commercial): from `data.<source>.licence`, else from beside the files, else from the rows."""
    if where.licence:
        return where.licence, licences.non_commercial(where.licence)
    if entry.get("licence"):
        return entry["licence"], bool(entry.get("non_commercial"))
    if of_rows:
        more = f"; and {len(of_rows) - 10} more" if len(of_rows) > 10 else ""
        return "; ".join(of_rows[:10]) + more, any(map(licences.non_commercial, of_rows))
    return None, False
