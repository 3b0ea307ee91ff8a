"""Prefect flows, which operators run and watch. A flow only orchestrates; the work is done in `memgpt`."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from prefect.states import Failed, State

from memgpt.errors import UserError

P = ParamSpec("P")


def in_one_line(flow: Callable[P, State[Any]]) -> Callable[P, State[Any]]:
    """Wraps a flow's function: a UserError becomes a failed state with its message, not a stack trace in the logs."""

    @wraps(flow)
    def told(*arguments: P.args, **named: P.kwargs) -> State[Any]:
        try:
            return flow(*arguments, **named)
        except UserError as error:
            return Failed(message=str(error))

    return told
