"""promote: wait until a person approves or rejects a version that the gate holds, in the UI.

While it waits, the run is suspended and has no process, so it holds no locks and survives a restart of the machine.
When resumed, the run starts from the beginning and finds the answer.
"""

from contextlib import suppress
from typing import Annotated, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed, State
from pydantic import Field

from flows import in_one_line
from memgpt import config, environment, registry, tracking
from memgpt.cli import Model
from memgpt.stages import approve as stage

DAY = 86400


class Answer(RunInput):
    """The form in the UI."""

    decision: Annotated[Literal["approve", "reject"], Field(description="Shall it become champion?")]
    name: Annotated[str, Field(min_length=1, description="Who decides: kept in the history.")]
    comment: Annotated[str, Field(description="Why: kept in the history.")] = ""
    version: Annotated[str, Field(description="The version that was shown. Leave it as it is.")]


@flow(name="promote", flow_run_name="promote {model}")
@in_one_line
def promote(model: Model, version: str | None = None, days: Annotated[float, Field(gt=0)] = 7.0) -> State[None]:
    """Show the gate's measurements, wait for a person's decision, and carry it out.

    Args:
        model: The model whose version is held.
        version: Its number, such as 4; if empty, the version that is held now.
        days: If nobody decides within so many days, the version stays held.
    """
    environment.prepare()
    tracking.use()
    waiting = stage.held(tracking.client(), model, version)
    shown = described(waiting)
    _supersede(model)
    create_markdown_artifact(shown, key=f"approve-{model}", description=f"{model} version {waiting.version}")
    form = Answer.with_initial_data(description=shown, version=waiting.version)
    answer = suspend_flow_run(wait_for_input=form, timeout=round(days * DAY), key="approval")
    done = stage.run(
        config.load(),
        model,
        approve=answer.decision == "approve",
        version=answer.version,
        actor=answer.name,
        reason=answer.comment,
    )
    word = "Approved" if answer.decision == "approve" else "Rejected"
    return Completed(name=word, message=f"{registry.name(model)} version {done.version}, by {answer.name}")


def described(waiting: stage.Held) -> str:
    """The gate's comparison as markdown."""
    title = f"**{registry.name(waiting.model)} version {waiting.version}** is held: {waiting.reasons}."
    against = f"Champion: version {waiting.champion}." if waiting.champion else "There is no champion yet."
    rows = [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in sorted(waiting.numbers.items())]
    where = f"`memgpt compare {waiting.model}@champion {waiting.model}/{waiting.version}` shows changed answers."
    return "\n".join([f"{title} {against}", "", "| measured by the gate | |", "|---|---|", *rows, "", where])


def _supersede(model: str) -> None:
    """End other runs that wait for an answer about this model, because they show an older candidate."""
    with get_client(sync_client=True) as client:
        waiting = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": ["promote"]}),
            flow_run_filter=FlowRunFilter(state={"type": {"any_": ["PAUSED"]}}),
            sort=FlowRunSort.START_TIME_DESC,
        )
        for other in waiting:
            if other.parameters.get("model") == model and str(other.id) != flow_run.id:
                ended = Completed(name="Superseded", message=f"by {flow_run.name} ({flow_run.id})")
                client.set_flow_run_state(other.id, ended, force=True)


def request(model: str, version: str) -> None:
    """Start a run that asks for approval, if `make up` has deployed the flow."""
    with suppress(ObjectNotFound):
        run_deployment("promote/promote", parameters={"model": model, "version": version}, timeout=0, as_subflow=False)
