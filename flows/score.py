"""score: score files of texts with a registered version, to Parquet parts, like the command `memgpt score`."""

import time
from collections.abc import Callable
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.states import Completed, State
from pydantic import Field

from flows import in_one_line, workspace
from memgpt import config, environment, scoring

_EVERY = 2.0  # seconds between two progress updates


@flow(name="score")
@in_one_line
def score(
    model: str,
    source: str,
    target: str,
    chunk: Annotated[int, Field(ge=1)] = scoring.CHUNK,
    column: str | None = None,
    force: bool = False,
) -> State[Any]:
    """Score files of texts with a registered version. A repeated run continues with the missing parts.

    Args:
        model: The version: ner (its champion), ner@champion or ner/3.
        source: A file, glob or folder of .jsonl, .csv, .parquet or .txt (each also .gz), or s3://bucket/prefix.
        target: Where to write the Parquet parts: a folder (absolute path) or s3://bucket/prefix.
        chunk: Rows per part.
        column: The column of texts; if empty, one of the usual names.
        force: Start again if the target has parts of another version or input.
    """
    environment.prepare()
    workspace.lasting("target", target)
    show = progress("score-progress", f"{model}: {source} → {target}")
    done = scoring.score(config.load(), model, source, target, column=column, chunk=chunk, force=force, progress=show)
    show(1, 1)
    kept = f", {done.skipped} of them there already" if done.skipped else ""
    return Completed(message=f"{done.rows} rows in {target} by {done.version}, {done.parts} parts{kept}")


def progress(key: str, description: str) -> Callable[[int, int], None]:
    """Create a progress bar among the run's artifacts; returns a function that takes the number done and the total."""
    bar, told = create_progress_artifact(0.0, key=key, description=description), 0.0

    def show(done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > _EVERY:
            told = time.monotonic()
            update_progress_artifact(bar, 100 * done / total)

    return show
