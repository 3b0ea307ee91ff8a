"""Input → answer, one file per model. It imports the core only: the two are packaged with every version."""

from pathlib import Path
from typing import Any, Protocol


class Predictor(Protocol):
    """What every file here offers under the same name."""

    def predict(self, inputs: list[Any]) -> list[Any]: ...


def load(task: str, directory: Path | str, device: str = "cpu") -> Predictor:
    """The predictor of `base`, `ner`, `sentiment` or `recommendation` from a model directory."""
    from importlib import import_module

    return import_module(f"memgpt.predict.{task}").Predictor(directory, device)
