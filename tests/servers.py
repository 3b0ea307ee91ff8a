"""Servers of a test's own: PostgreSQL as Debian installs it, and S3 over HTTP; each gone with its `with`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psycopg2
import pytest
from conftest import ROOT, clean_environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def postgres(*databases: str) -> Iterator[str]:
    """`memgpt@127.0.0.1:PORT`, with empty databases. It refuses to run as root, whose place nobody takes."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    binaries = found[-1].parent if found else None
    if binaries is None:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql (Debian: postgresql)")
    folder, port = Path(tempfile.mkdtemp(prefix="pg")), free_port()  # a socket's path is short
    who = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(folder, "nobody")
    make = [binaries / "initdb", "-D", folder / "data", "-U", "memgpt", "--auth=trust", "--no-sync", "--encoding=UTF8"]
    subprocess.run(make, cwd="/", check=True, capture_output=True, **who)
    serve = [binaries / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
    running = subprocess.Popen(serve, cwd="/", stderr=subprocess.DEVNULL, **who)
    try:
        for database in databases:
            run_sql(f"memgpt@127.0.0.1:{port}/postgres", f"CREATE DATABASE {database}")
        yield f"memgpt@127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGINT)  # SIGTERM waits for clients
        running.wait(30)
        shutil.rmtree(folder)


def run_sql(where: str, sql: str, patience: float = 120) -> list[tuple]:
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = psycopg2.connect(f"postgresql://{where}")
            break
        except psycopg2.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


@contextmanager
def s3(*buckets: str) -> Iterator[dict[str, str]]:
    """The environment that leads there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
    )
    for bucket in buckets:
        client.create_bucket(Bucket=bucket)
    try:
        yield env
    finally:
        server.stop()


@contextmanager
def prefect(home: Path, **settings: str) -> Iterator[dict[str, str]]:
    """A Prefect server whose state is in `home`; the environment that leads there. Its log: home/server.log."""
    from flows import server
    from memgpt.errors import UserError

    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = {**clean_environment(), "PREFECT_HOME": str(home), "PREFECT_API_URL": url, **settings}
    env["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                server.reach(url)
                break
            except UserError:
                assert time.monotonic() < deadline, (home / "server.log").read_text()
                assert running.poll() is None, (home / "server.log").read_text()
                time.sleep(0.2)
        yield env
    finally:
        running.terminate()
        running.wait(30)


@contextmanager
def mlflow(port: int, folder: Path) -> Iterator[str]:
    """Its address, once it answers; killed at the end."""
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'served.db'}", "--artifacts-destination", str(folder)]
    with (folder / "mlflow.log").open("ab") as log:
        running = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=clean_environment(), start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                assert running.poll() is None and time.monotonic() < deadline, (folder / "mlflow.log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
