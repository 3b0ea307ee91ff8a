"""`s3://bucket/prefix`: an object, the objects directly below a prefix, or a pattern (`s3://bucket/dir/*.jsonl.gz`).

The lock has each object's size, ETag and, if the bucket is versioned, its version. Endpoint, region and credentials
come from where boto3 looks for them, such as AWS_ENDPOINT_URL and ~/.aws/config, never from the URI.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from memgpt import atomic
from memgpt.errors import UserError
from memgpt.sources import licences, naming
from memgpt.sources.naming import Part

CACHE = Path(".memgpt/sources/s3")
PAGE = 1000  # keys per listing request, S3's own limit
_BLOCK = 1 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")  # the ETag of an object uploaded in one part, except where `_hidden_sum`


class _Damaged(Exception):
    """A download that ended early or does not match its checksum; it is retried."""


def resolve(name: str, uri: str) -> dict[str, Any]:
    bucket, key = parse(name, uri)
    with as_user_errors(name, uri):
        client = connect()
        folder, keys = _list(client, bucket, key)
        roles = naming.roles(name, uri, keys, folder=folder)
        licence, restricted = _licence(client, bucket, keys)
        files = [{"role": role, **_identity(client, bucket, key)} for key, role in sorted(roles.items())]
    return {
        "family": f"s3:{bucket}/{key.rstrip('/')}",
        "licence": licence,
        "non_commercial": restricted,
        "files": files,
    }


def fetch(name: str, entry: dict[str, Any], cache: Path = CACHE) -> list[Part]:
    """Download what is not in the cache yet. The cache is keyed by version, so that it never returns other content."""
    parts = []
    for file in entry["files"]:
        identity = f"{file['path']} {file['etag']} {file['version']} {file['size']}"
        base = PurePosixPath(file["path"]).name
        path = cache / hashlib.sha256(identity.encode()).hexdigest()[:16] / base
        if not path.exists():
            with as_user_errors(name, file["path"]):
                _download(name, file, path)
        parts.append(Part(role=file["role"], name=file["path"], path=path))
    return parts


def connect() -> Any:
    """A client that gives up within seconds if the endpoint does not answer."""
    settings = Config(connect_timeout=3, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
    return boto3.client("s3", config=settings)


def parse(name: str, uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise UserError(f"{naming.key(name)}: credentials do not belong in a URI; set AWS_ACCESS_KEY_ID instead")
    if not bucket:
        raise UserError(f"{naming.key(name)}: {uri} names no bucket; write s3://bucket/prefix")
    return bucket, key


def _list(client: Any, bucket: str, key: str) -> tuple[bool, list[str]]:
    """(whether it is a folder, keys). As for a local path: the object itself, or the objects directly below it."""
    if any(character in key for character in "*?["):
        parent, _, pattern = key.rpartition("/")
        below = keys_below(client, bucket, f"{parent}/" if parent else "")
        return False, [found for found in below if fnmatch.fnmatchcase(PurePosixPath(found).name, pattern)]
    if key and not key.endswith("/"):
        below = keys_below(client, bucket, f"{key}/")
        return (True, below) if below else (False, [found for found in keys_below(client, bucket, key) if found == key])
    return True, keys_below(client, bucket, key)


def keys_below(client: Any, bucket: str, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": PAGE}
    )
    return [item["Key"] for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]


def _identity(client: Any, bucket: str, key: str) -> dict[str, Any]:
    head = client.head_object(Bucket=bucket, Key=key)
    version = head.get("VersionId")
    return {
        "path": f"s3://{bucket}/{key}",
        "size": head["ContentLength"],
        "etag": head["ETag"].strip('"'),
        "version": None if version == "null" else version,
    }


def _licence(client: Any, bucket: str, keys: list[str]) -> tuple[str | None, bool]:
    for key in sorted(keys):
        base = PurePosixPath(key).name
        if base.lower().startswith(("license", "licence")):
            text = client.get_object(Bucket=bucket, Key=key)["Body"].read().decode("utf-8", errors="replace")
            return licences.from_text(text, base)
    return None, False


def _hidden_sum(answer: dict[str, Any]) -> bool:
    """Whether the ETag looks like an MD5 checksum of the content but is not one: with SSE-KMS, or SSE-C (a key of the
    client)."""
    return answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer


def _download(name: str, file: dict[str, Any], path: Path) -> None:
    """Download one locked object to `path`.

    Raises:
        UserError: if the object is missing, has changed, or arrives damaged every time.
    """
    bucket, _, key = file["path"].removeprefix("s3://").partition("/")
    # request the locked version by id; in an unversioned bucket, require the locked ETag
    locked = {"VersionId": file["version"]} if file["version"] else {"IfMatch": f'"{file["etag"]}"'}
    client = connect()

    @retry(
        retry=retry_if_exception_type(_Damaged),
        stop=stop_after_attempt(3),
        wait=wait_exponential(multiplier=0.2, max=2),
        reraise=True,
    )
    def attempt() -> None:
        answer = client.get_object(Bucket=bucket, Key=key, **locked)
        body, digest, size = answer["Body"], hashlib.md5(usedforsecurity=False), 0
        with atomic.replacing(path) as aside:
            try:
                with aside.open("wb") as stream:
                    while block := body.read(_BLOCK):
                        stream.write(block)
                        digest.update(block)
                        size += len(block)
            except exceptions.BotoCoreError as error:
                raise _Damaged from error
            summed = _MD5.fullmatch(file["etag"]) and not _hidden_sum(answer)
            if size != file["size"] or (summed and digest.hexdigest() != file["etag"]):
                raise _Damaged

    try:
        attempt()
    except _Damaged:
        raise UserError(
            f"{file['path']}: arrives damaged or truncated ({file['size']} bytes expected); "
            f"upload it again and run `memgpt snapshot`, or check the connection"
        ) from None
    except exceptions.ClientError as error:
        gone = ("PreconditionFailed", "412", "NoSuchKey", "NoSuchVersion", "404")
        if error.response.get("Error", {}).get("Code") in gone:
            raise UserError(f"{file['path']}: changed {naming.since(name)}") from None
        raise


@contextmanager
def as_user_errors(name: str, uri: str) -> Iterator[None]:
    """Turns boto3 exceptions that are user errors into one-line UserErrors."""
    where = f"{naming.key(name)}: {uri}"
    try:
        yield
    except UserError:
        raise
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise UserError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except exceptions.ProfileNotFound as error:
        raise UserError(f"{where}: no profile {error.kwargs['profile']!r} in ~/.aws; check AWS_PROFILE") from None
    except exceptions.ParamValidationError:
        raise UserError(f"{where}: not a valid bucket name or key") from None
    except exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "error")
        known = {"NoSuchBucket": "no such bucket", "404": "no such object", "NoSuchKey": "no such object"}
        raise UserError(f"{where}: {known.get(code, f'refused ({code}); check credentials and rights')}") from None
    except (exceptions.BotoCoreError, ValueError) as error:  # ValueError: the endpoint is not a URL
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        raise UserError(
            f"{where}: S3 at {endpoint} cannot be reached ({type(error).__name__}); "
            f"check AWS_ENDPOINT_URL and the network"
        ) from None
