"""The registered model as MLflow loads it: this file is logged as the model's code, with `memgpt` beside it.

The type hints are the contract: MLflow derives the signature from them and rejects other input before `predict` runs.
Over REST the body is `{"inputs": [...]}`. Sentiment takes texts with or without topic, a union that MLflow records as
"any", so its members are checked here. Ner also takes words that are already split: with `params={"separator": " "}`
each text is split at exactly that one character, and offsets refer to the text as given.
"""

from typing import Any

from mlflow.exceptions import MlflowException  # the server shows its message, but not those of others
from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Likelihood(Record):
    """Total nats and tokens of a text, and bits per byte of its UTF-8."""

    nats: float
    tokens: int
    bytes: int
    bits_per_byte: float


class Entity(Record):
    """text[start:end] is the entity; score in 0..1."""

    text: str
    type: str
    score: float
    start: int
    end: int


class TopicalText(Record):
    text: str
    topic: str | None = None


class Opinion(Record):
    """topic: as given; predicted_topic: only from a model trained with topics."""

    label: str
    scores: dict[str, float]
    topic: str | None = None
    predicted_topic: str | None = None


class Reader(Record):
    """history (oldest first) and candidates (null: every known item) hold item ids, or texts of unknown items.
    rerank=False ranks by text match only."""

    history: list[str]
    k: int = Field(default=10, ge=1)
    candidates: list[str] | None = None
    rerank: bool = True


class Suggestion(Record):
    """item_id is null where the candidate was given as a text."""

    item_id: str | None = None
    title: str
    score: float


class Served(PythonModel):
    """Loads the packaged model directory through the packaged code."""

    def load_context(self, context: Any) -> None:
        from memgpt.predict import load

        # load_model(uri, model_config={"device": "cuda", "weights": "bfloat16"}) serves from a GPU, and faster
        settings = dict(context.model_config)
        self.predictor = load(settings.pop("task"), context.artifacts["model"], **settings)


class Base(Served):
    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[Likelihood]:
        return self.predictor.predict(model_input)


class Ner(Served):
    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[list[Entity]]:
        separator = (params or {}).get("separator") or ""
        if len(separator) > 1:
            raise MlflowException.invalid_parameter_value(
                f"params.separator: one character (or none for running text), got {separator!r}"
            )
        return self.predictor.predict([text.split(separator) for text in model_input] if separator else model_input)


class Sentiment(Served):
    def predict(
        self, context: Any, model_input: list[str | TopicalText], params: dict[str, Any] | None = None
    ) -> list[Opinion]:
        for row, value in enumerate(model_input):
            try:
                if not isinstance(value, str):
                    TopicalText.model_validate(value, strict=True)
            except ValidationError:
                raise MlflowException.invalid_parameter_value(
                    f"inputs[{row}]: expected a text or {{text, topic}}, got {value!r}"
                ) from None
        return self.predictor.predict(model_input)


class Recommendation(Served):
    def predict(
        self, context: Any, model_input: list[Reader], params: dict[str, Any] | None = None
    ) -> list[list[Suggestion]]:
        return self.predictor.predict([reader.model_dump(exclude_none=True) for reader in model_input])


served: dict[str, type[PythonModel]] = {
    "base": Base,
    "ner": Ner,
    "sentiment": Sentiment,
    "recommendation": Recommendation,
}
set_model(served[ModelConfig().get("task")]())
