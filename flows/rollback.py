"""rollback: make an earlier version champion again."""

from prefect import flow
from prefect.states import Completed, State

from flows import in_one_line
from memgpt import config, environment, registry
from memgpt.cli import Model
from memgpt.stages import rollback as stage


@flow(name="rollback")
@in_one_line
def rollback(model: Model, name: str, version: str | None = None, reason: str = "") -> State[None]:
    """Make an earlier version champion again; it must load and predict first.

    Args:
        model: The model to roll back.
        name: Who decides; stored in the history.
        version: Its number, such as 3; if empty, the previous champion.
        reason: Why; stored in the history.
    """
    environment.prepare()
    done = stage.run(config.load(), model, version=version, actor=name, reason=reason)
    return Completed(message=f"{registry.name(model)}: version {done.before} → {done.version}")
