"""Local sources: a file, a glob or a folder, locked by size and sha256."""

import glob
import hashlib
from pathlib import Path
from typing import Any

from memgpt.errors import UserError
from memgpt.sources import licences, naming
from memgpt.sources.naming import Part


def resolve(name: str, uri: str) -> dict[str, Any]:
    folder, paths = _expand(name, uri)
    roles = naming.roles(name, uri, [path.as_posix() for path in paths], folder=folder)
    found, restricted = licence({Path(path).parent for path in roles})
    return {
        "family": f"file:{uri.rstrip('/')}",
        "licence": found,
        "non_commercial": restricted,
        "files": [{"path": path, "role": role, **_identity(Path(path))} for path, role in sorted(roles.items())],
    }


def fetch(name: str, entry: dict[str, Any]) -> list[Part]:
    parts = []
    for file in entry["files"]:
        path = Path(file["path"])
        try:
            same = path.stat().st_size == file["size"] and sha256(path) == file["sha256"]
        except FileNotFoundError:
            raise UserError(f"{path}: gone {naming.since(name)}") from None
        if not same:
            raise UserError(f"{path}: changed {naming.since(name)}")
        parts.append(Part(role=file["role"], name=str(path), path=path))
    return parts


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _expand(name: str, uri: str) -> tuple[bool, list[Path]]:
    """(whether it is a folder, its files). A glob does not recurse: `**` means `*`; matching folders are skipped."""
    path = Path(uri).expanduser()
    if path.is_dir():
        inside = [child for child in path.iterdir() if not child.name.startswith(".")]
        if any(child.is_dir() for child in inside) and not any(naming.is_data(child.name, name) for child in inside):
            raise UserError(f"{naming.key(name)}: {uri} holds folders but no data files; write {uri.rstrip('/')}/*/*")
        return True, [child for child in inside if child.is_file()]
    if path.is_file():
        if not naming.data_format(path.name, name):
            formats = ", .".join(naming.FORMATS)
            key = naming.key(name)
            raise UserError(f"{key}: {uri}: not a format that is read; formats are .{formats}, each also .gz")
        return False, [path]
    if any(character in uri for character in "*?["):
        matches = map(Path, glob.glob(str(path)))  # noqa: PTH207 (Path.glob would descend at **)
        return False, [match for match in matches if match.is_file()]
    raise UserError(f"{naming.key(name)}: {uri}: no such file or folder")


def licence(folders: set[Path]) -> tuple[str | None, bool]:
    """(licence, non-commercial), read from the first LICENSE* or LICENCE* file in the folders."""
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.lower().startswith(("license", "licence")):
                return licences.from_text(path.read_text(encoding="utf-8", errors="replace"), path.name)
    return None, False
