"""rollback: an earlier version becomes champion again."""

from typing import Annotated

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from flows import in_one_line
from memgpt import config, environment, registry
from memgpt.cli import Model
from memgpt.stages import rollback as stage


@flow(name="rollback")
@in_one_line
def rollback(
    model: Annotated[Model, Field(description="Whose champion.")],
    name: Annotated[str, Field(description="Who decides: kept in the history.")],
    version: Annotated[str | None, Field(description="Such as 3. Empty: the champion before this one.")] = None,
    reason: Annotated[str, Field(description="Why: kept in the history.")] = "",
) -> State[None]:
    """Make an earlier version champion again; it must load and predict first."""
    environment.prepare()
    done = stage.run(config.load(), model, version=version, actor=name, reason=reason)
    return Completed(message=f"{registry.name(model)}: version {done.before} → {done.version}")
