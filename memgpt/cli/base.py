"""What several commands share: argument types, loading the configuration, the registry client, and printing."""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memgpt import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from memgpt.config import Config

Source = Literal["corpus", "ner", "sentiment", "recommendation"]
Task = Literal["ner", "sentiment", "recommendation"]
Model = Literal["base", "ner", "sentiment", "recommendation"]

SourceName = Annotated[Source, typer.Argument(help="Which of the four sources.")]
TaskName = Annotated[Task, typer.Argument(help="Which of the three tasks.")]
ModelName = Annotated[Model, typer.Argument(help="The core, or one of the three tasks.")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="ner, its champion; ner@champion; ner/3.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
REPLACE = "Promote it though it is not comparable, its gain not certain, or it was rolled back; not what is rejected."
Reason = Annotated[str, typer.Option(help="Why, in your words: kept in the record of the decision.")]


def open_registry() -> "MlflowClient":
    """The client of the configured registry."""
    from memgpt import tracking

    tracking.use()
    return tracking.client()


def show(told: Any) -> None:
    """Print a list of lines, a rich table at least 100 columns wide, or anything else as JSON."""
    if isinstance(told, list) and all(isinstance(line, str) for line in told):
        print("\n".join(told))
    elif hasattr(told, "__rich_console__"):
        from rich.console import Console

        console = Console()
        Console(width=max(100, console.width)).print(told, crop=False)
    else:
        import json

        print(json.dumps(told, ensure_ascii=False, indent=2))


def load_config() -> "Config":
    from memgpt import config

    return config.load()


def compute_with(config: "Config") -> None:
    """Set the number of threads, before torch is imported and creates its pools. A user's OMP_NUM_THREADS wins."""
    threads = str(environment.threads(config.runtime.threads))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
