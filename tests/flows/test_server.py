"""A configured Prefect server that does not answer is told in one line, before a run starts."""

import socket

import pytest

from flows import server
from memgpt.errors import UserError


def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        with pytest.raises(UserError, match=f"PREFECT_API_URL={url}: no Prefect server answers"):
            server.reach(url)


def test_a_password_in_the_address_is_told_where_it_belongs_and_not_shown() -> None:
    with pytest.raises(UserError, match="belong in PREFECT_API_AUTH_STRING") as refused:
        server.reach("http://ada:secret@localhost:4200/api")
    assert "secret" not in str(refused.value)
