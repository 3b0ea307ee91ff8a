"""`hf://[org/]name?config=…&split=…`: a data set of the Hugging Face hub, read by `datasets`, locked by its revision.

`hf://./folder` (or an absolute path) reads a local folder in the hub's layout, such as a downloaded copy. It is locked
by a sha256 of its files. Class labels stored as numbers are replaced by their names.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from memgpt import atomic
from memgpt.errors import UserError
from memgpt.sources import files, formats, licences, naming
from memgpt.sources.naming import Part

CACHE = Path(".memgpt/sources/hf")


class Address(NamedTuple):
    path: str
    config: str | None
    split: str | None

    @property
    def local(self) -> bool:
        return self.path.startswith((".", "/"))


def resolve(name: str, uri: str) -> dict[str, Any]:
    address = _parse(name, uri)
    with _explained(name, uri):
        revision, licence, restricted = _look(address)
    family = f"hf:{address.path}" + (f"/{address.config}" if address.config else "")
    file = {"path": address.path, "config": address.config, "split": address.split, "revision": revision}
    return {"family": family, "licence": licence, "non_commercial": restricted, "files": [file]}


def fetch(name: str, entry: dict[str, Any]) -> list[Part]:
    """The locked revision. It is cached as Parquet, so that later reads do not need the hub."""
    file = entry["files"][0]
    address = Address(file["path"], file["config"], file["split"])
    identity = " ".join(str(file[key]) for key in ("path", "config", "split", "revision")) + f" {name}"
    folder = CACHE / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not folder.exists():
        with _explained(name, entry["uri"]):
            if address.local and _digest(Path(address.path)) != file["revision"]:
                raise UserError(f"{address.path}: changed {naming.since(name)}")
            if not address.local:
                HfApi().dataset_info(
                    address.path, revision=file["revision"], timeout=10
                )  # fails at once if the hub is unreachable, whereas datasets retries
            loaded = _load(name, entry["uri"], address, file["revision"])
        with atomic.replacing(folder) as aside:
            aside.mkdir()
            for role, number, table in loaded:
                pq.write_table(table, aside / f"{role}-{number}.parquet")
    paths = sorted(folder.glob("*.parquet"))
    return [Part(role=path.stem.partition("-")[0], name=f"{entry['uri']} {path.stem}", path=path) for path in paths]


def _parse(name: str, uri: str) -> Address:
    path, _, query = uri.removeprefix("hf://").partition("?")
    options = dict(parse_qsl(query))
    if unknown := set(options) - {"config", "split"}:
        raise UserError(f"data.{name}.uri: unknown option {sorted(unknown)[0]!r}; hf:// takes config and split")
    address = Address(path.rstrip("/"), options.get("config"), options.get("split"))
    if address.local and not Path(address.path).is_dir():
        raise UserError(f"data.{name}.uri: {address.path}: no such folder")
    if not address.local and not 1 <= len([part for part in address.path.split("/") if part]) <= 2:
        raise UserError(f"data.{name}.uri: {uri} names no data set; write hf://org/name")
    return address


def _look(address: Address) -> tuple[str, str | None, bool]:
    """(revision, licence, non-commercial)."""
    if address.local:
        folder = Path(address.path)
        card = DatasetCard.load(folder / "README.md").data.license if (folder / "README.md").is_file() else None
        found, restricted = files.licence({folder})
        stated = card or found
        return _digest(folder), _name(stated), restricted or licences.non_commercial(_name(stated))
    info = HfApi().dataset_info(address.path, timeout=10)
    stated = _name(info.card_data.license if info.card_data else None)
    assert info.sha is not None
    return info.sha, stated, licences.non_commercial(stated)


def _name(licence: str | list[str] | None) -> str | None:
    return "; ".join(licence) if isinstance(licence, list) else licence


def _digest(folder: Path) -> str:
    """sha256 over names and contents of all files except hidden ones."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            total.update(f"{inside.as_posix()} {files.sha256(path)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _load(name: str, uri: str, address: Address, revision: str) -> list[tuple[str, int, pa.Table]]:
    """(role, number, rows) of every requested split."""
    datasets.disable_progress_bars()
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="datasets-", dir=CACHE))  # not shared: another source may load the same set
    pinned = {} if address.local else {"revision": revision}
    options: dict[str, Any] = {"cache_dir": str(scratch), **pinned}
    try:
        if name == "recommendation" and not address.config:
            configs = datasets.get_dataset_config_names(address.path, **pinned)
            if {"items", "interactions"} <= set(configs):
                return [
                    (role, number, formats.plain(part))
                    for role in ("items", "interactions")
                    for number, part in enumerate(datasets.load_dataset(address.path, role, **options).values())
                ]
        found = datasets.load_dataset(address.path, address.config, split=address.split, **options)
        if isinstance(found, datasets.Dataset):
            return [(naming.WHOLE, 0, formats.plain(found))]
        # splits are treated as files, so that the same naming rules apply
        roles = naming.roles(name, uri, [f"{split}.parquet" for split in found], folder=True)
        return [
            (role, number, formats.plain(found[file.removesuffix(".parquet")]))
            for number, (file, role) in enumerate(sorted(roles.items()))
        ]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _explained(name: str, uri: str) -> Iterator[None]:
    """Turns exceptions of the hub's libraries that are user errors into one-line UserErrors."""
    where = f"data.{name}.uri: {uri}"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{where}: access must be asked for on the hub; then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where}: no such data set, or a private one: check the name, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"{where}: the hub refused ({type(error).__name__}); check the name and HF_TOKEN") from None
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"{where}: the hub cannot be reached ({type(error).__name__}); download the set on a machine with network, "
            f"copy it here, and set data.{name}.uri to its folder (hf://./folder)"
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: not readable by datasets: {reason}") from None
