"""A Prefect server for one run, if none is configured and `make up` has started none. Its state is in .prefect.

Prefect's own temporary server would keep running after a kill -9 of the flow. This one ends with its flow, and the run
can be watched in its UI.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from memgpt import housekeeping, processes, tracking
from memgpt.errors import UserError

PATIENCE = 180.0  # seconds; the first start creates the database


@contextmanager
def running() -> Iterator[str]:
    """Yield the API's URL: of the configured server, of that of `make up`, or of one that ends with this process."""
    found = PREFECT_API_URL.value() or _up()
    if found:
        reach(found)
        with temporary_settings({PREFECT_API_URL: found}):
            yield found
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    log = Path(get_current_settings().home) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        # the UI reads the API's port from this variable, not from --port
        server = processes.start(command, {**os.environ, "PREFECT_SERVER_API_PORT": str(port)}, output)
    with temporary_settings({PREFECT_API_URL: url}):
        _wait(url, server, log)
        yield url
    # The server is not ended here: Prefect sends its last events when this process exits, which also ends the server.


def _up() -> str | None:
    """The URL of the server that `make up` started here, if it runs."""
    noted = housekeeping.UP / "api"
    return noted.read_text(encoding="utf-8") if noted.exists() and housekeeping.service("prefect") else None


def reach(url: str) -> None:
    """Raise UserError if no Prefect server answers there, or the URL has a password, which Prefect would not send."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise UserError(
            f"PREFECT_API_URL={tracking.shown(url)}: name and password belong in PREFECT_API_AUTH_STRING=name:password"
        )
    if why := tracking.no_server(url):
        url = tracking.shown(url)
        raise UserError(f"PREFECT_API_URL={url}: no Prefect server answers ({why}); start it, or unset the variable")


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        if tracking.no_server(url, 5) is None:
            return
        time.sleep(0.1)
    processes.end(server)
    raise UserError(f"the Prefect server did not start; see {log}, or name a running one in PREFECT_API_URL")
