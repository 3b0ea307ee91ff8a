"""Snapshot: what every source holds now → `data/sources.lock.json`, which ingest then fetches, and nothing else."""

from memgpt import config, sources


def run(settings: config.Config) -> dict[str, float]:
    """Resolve all sources; the lock is written only if one of them changed. The lock stays if a source fails."""
    entries = {name: sources.resolve(name, getattr(settings.data, name)) for name in config.SOURCES}
    sources.write_lock(entries)
    return {f"{name}_files": float(len(entry["files"])) for name, entry in entries.items()}
