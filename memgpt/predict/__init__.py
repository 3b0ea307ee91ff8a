"""Input → answer, one file per model. Imports only the core (`memgpt.model`); both are packaged with every version."""

from pathlib import Path
from typing import Any, Protocol


class Predictor(Protocol):
    """The interface of the class `Predictor` in each model's file."""

    model: Any

    def predict(self, inputs: list[Any]) -> list[Any]: ...


def load(
    task: str,
    directory: Path | str,
    device: str = "cpu",
    memory: str = "resident",
    weights: str = "float32",
    compile: bool = False,
    padding: bool = True,
) -> Predictor:
    """The predictor of `base`, `ner`, `sentiment` or `recommendation` from a model directory.

    memory: where the memory's table is kept, as in `memgpt.model.residency.load`. weights, compile, padding: as in
    `memgpt.model.serving.accelerate`. The defaults reproduce the evaluated answers to the last digit; "bfloat16" is
    faster and changes a probability by some thousandths.
    """
    from importlib import import_module

    predictor: Predictor = import_module(f"memgpt.predict.{task}").Predictor(directory, device, memory)
    if weights != "float32" or compile or not padding:
        from memgpt.model.serving import accelerate

        for model in getattr(predictor.model, "members", [predictor.model]):  # members: of an ensemble
            accelerate(model, weights, compile, padding)
    return predictor
