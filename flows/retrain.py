"""retrain: snapshot the sources, run the stages of dvc.yaml that changed, promote what the gate accepts.

Each task runs one stage with `dvc repro --single-item`, so that operators and data scientists share one cache.

A manual run (`memgpt retrain`) works in the checkout. A deployed run (`make up`) works in a worktree, which it resets
first. It ends at once if nothing has changed, replaces late scheduled runs, and asks for approval of held versions.
"""

import argparse
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.events import emit_event
from prefect.futures import PrefectFuture, wait
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows import in_one_line, promote, server, workspace
from flows.crew import Crew, Order, Step, steps
from memgpt import atomic, config, console, environment, tracking
from memgpt.cli import Model, Task
from memgpt.errors import UserError
from memgpt.processes import Stopped
from memgpt.registry import commit_at_start

ALL: list[Task] = ["ner", "sentiment", "recommendation"]


@task(cache_policy=NO_CACHE)  # DVC is the only cache
def run_step(step: Step, crew: Crew) -> State[Any]:
    try:
        return crew.run(step)
    except Stopped:
        return Failed(message=f"{step.name}: stopped with the flow")
    except Exception as error:  # e.g. no memory for a process; without this the step would count as done
        return crew.fail(step, f"{type(error).__name__}: {error}")


@flow(name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=64))
@in_one_line
def retrain(
    tasks: list[Task] = ALL,
    overrides: list[Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)+=")]] = [],  # noqa: B006
    force: bool = False,
    approval: Literal["auto", "manual"] = "auto",
    replace: list[Model] = [],  # noqa: B006
) -> State[Any]:
    """Update every model to its present sources, and promote what the gate accepts.

    Args:
        tasks: The tasks to train and judge, beside the core.
        overrides: Changes of params.yaml for this run only, such as finetune.ner.epochs=2.
        force: Run all stages, even unchanged ones.
        approval: With auto, only versions that the gate holds wait for a person's approval; with manual, all do.
        replace: Models to promote even if they are not comparable, their gain is not certain, or they were rolled back;
            rejected ones are never promoted.
    """
    environment.prepare()
    order = Order(tuple(tasks), force, tuple(replace), approval == "manual")
    with workspace.occupied(str(flow_run.id)) as last:
        workspace.mark_crashed(last)
        deployed = os.environ.get("MEMGPT_DEPLOYED")  # the worker sets it
        if deployed:
            _stand_for_late_runs()
            workspace.reset(Path(), deployed)
        elif overrides:
            raise UserError("overrides: only in a deployed run; here, change params.yaml or use `memgpt retrain --set`")
        params = Path("params.yaml").read_text(encoding="utf-8")
        try:
            if overrides:
                config.write(config.override(config.read(), overrides, "overrides"))
            return _run(order, only_if_changed=bool(deployed) and not force and not replace)
        finally:
            if overrides:  # they are for this run only
                atomic.write_text("params.yaml", params)


def _run(order: Order, only_if_changed: bool) -> State[Any]:
    settings = config.load()
    _note_commit()
    shutil.rmtree(console.VERDICTS, ignore_errors=True)  # so that all verdicts at the end are of this run
    with console.Board() as board:
        tokens = {"pretrain": settings.pretrain.batch_size * settings.pretrain.sequence_length}
        crew = Crew(board, environment.threads(settings.runtime.threads), order, tokens)
        plan = {step.name: step for step in steps(settings, order.tasks)}
        futures: dict[str, PrefectFuture[Any]] = {}

        def submit(step: Step) -> PrefectFuture[Any]:
            named = run_step.with_options(name=step.verb, task_run_name=step.name)
            return named.submit(step, crew, wait_for=[futures[name] for name in step.after], return_state=False)

        try:
            first = futures["snapshot"] = submit(plan.pop("snapshot"))
            first.wait()
            stages = [name for name in plan if not name.startswith("promote@")]
            if only_if_changed and not crew.failures and workspace.settled(order.tasks, stages):
                return Completed(name="Nothing to do", message="data, params, code and registry are as they were")
            _reach_registry(board)
            with tracking.flow_run("retrain", settings.model_dump(by_alias=True)) as run:
                for step in plan.values():
                    futures[step.name] = submit(step)
                wait(list(futures.values()))
                pages = _keep_pages(run)
        except tracking.Unreachable:
            if not crew.failures:
                raise
            pages = ""  # the failed stages' messages say why
        finally:
            crew.children.stop()
    return _conclude(crew.failures, order, pages)


def _reach_registry(board: console.Board) -> None:
    """Connect to the registry; UserError if it does not answer for two minutes."""
    for pause in (*tracking.PAUSES, None):
        try:
            tracking.use()
            return
        except UserError as error:
            if pause is None:
                raise
            board.say(f"{error}; trying again in {pause} s")
            time.sleep(pause)


def _keep_pages(run: tracking.Run) -> str:
    """Log the pages and pictures of this run's reports to its MLflow run; returns the run's address in the UI."""
    for folder in ("validation", "plots"):
        if (found := Path("reports") / folder).is_dir():
            tracking.patiently(run.client.log_artifacts, run.id, str(found), folder)
    return f"{_mlflow()}/#/experiments/{tracking.experiment(tracking.STAGES)}/runs/{run.id}"


def _conclude(failures: list[str], order: Order, page: str) -> State[Any]:
    """Show the verdicts in the UI and request the approvals; the flow fails with the messages of the failed stages."""
    found = console.verdicts()
    if found:
        _publish(found, page)
    for verdict in found:
        if verdict["verdict"] == "reject":
            told = {"summary": f"memgpt-{verdict['model']} version {verdict['version']} is rejected"}
            emit_event(
                "memgpt.gate.rejected",
                resource={"prefect.resource.id": f"memgpt.model.{verdict['model']}"},
                payload={**told, "version": verdict["version"], "reasons": "; ".join(verdict["reasons"])},
            )
        elif verdict["verdict"] == "hold" and deployment.id:
            promote.request(verdict["model"], verdict["version"])
    if failures:
        return Failed(message="\n".join(failures))
    workspace.settle(order.tasks)
    return Completed(message=", ".join(f"{verdict['model']} {verdict['verdict']}" for verdict in found))


def _publish(found: list[dict[str, Any]], page: str) -> None:
    table = console.rows(found)
    create_table_artifact(table=table, key="retrain-metrics", description="Test metrics, baselines and verdicts")
    lines = [
        "| model | verdict | version | metric | value | champion | baseline |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['task']} | **{row['verdict']}** | {row['version']} | {row['metric']} | {row['value']} "
            f"({row['95 % interval']}) | {row['champion']} | {row['baseline']} |"
            for row in table
        ),
        "",
        *(f"- {verdict['model']}: {'; '.join(verdict['reasons'])}" for verdict in found),
        "",
        f"In MLflow: [training curves]({page}), [checks of the data and pictures]({page}/artifacts).",
    ]
    create_markdown_artifact("\n".join(lines), key="retrain-summary", description="The gate's verdicts")
    create_link_artifact(page, key="retrain-mlflow", link_text="the run in MLflow")
    create_link_artifact(f"{page}/artifacts", key="retrain-pages", link_text="checks of the data, pictures")
    for verdict in found:
        name = f"memgpt-{verdict['model']}"
        create_link_artifact(f"{_mlflow()}/#/models/{name}", key=name, link_text=f"{name} in the MLflow registry")


def _mlflow() -> str:
    uri = console.tracking_uri()
    return uri if uri.startswith("http") else os.environ.get("MEMGPT_MLFLOW_UI", "http://127.0.0.1:5000")


def _stand_for_late_runs() -> None:
    """Cancel late scheduled runs (this one waited, or the machine was off), which would do the same as this one."""
    with get_client(sync_client=True) as client:
        late = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time={"before_": datetime.now(UTC)}
            ),
            deployment_filter=DeploymentFilter(id={"any_": [deployment.id]}),
        )
        for other in late:
            if other.auto_scheduled and str(other.id) != flow_run.id:
                ended = Cancelled(message=f"{flow_run.name} ({flow_run.id}) stands for it")
                client.set_flow_run_state(other.id, ended, force=True)


def _note_commit() -> None:
    """Record the present commit for the lineage, because HEAD may move during the run."""
    sha, dirty = commit_at_start(Path())
    os.environ["MEMGPT_COMMIT"] = f"{sha}-dirty" if dirty else sha


def main() -> int:
    """`python -m flows.retrain`, which `memgpt retrain` executes. Returns 0 if it completed without a rejection."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="What `memgpt retrain` runs.")
    parser.add_argument("--force", action="store_true", help="run unchanged stages too")
    parser.add_argument("--replace", action="append", default=[], choices=config.MODELS)
    parser.add_argument("--ask", action="store_true", help="hold what the gate would promote")
    options = parser.parse_args()
    environment.prepare()
    with workspace.occupied(None):  # fails here if another retrain runs; the flow takes the lock again
        pass
    out = console.Board()
    out.say("starting the flow's server")
    with server.running() as url:
        out.say(f"retrain: watch it at {url.removesuffix('/api')}")
        state = retrain(
            force=options.force,
            replace=options.replace,
            approval="manual" if options.ask else "auto",
            return_state=True,
        )
        found = console.verdicts()
        if found:
            out.say("")
            out.table(console.rows(found))
    if not state.is_completed():
        for line in (state.message or "the flow did not finish").splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    out.say("")
    out.say("\n".join(console.ui_hints()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
