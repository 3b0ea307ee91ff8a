"""`params.yaml` as strict, frozen models: a misspelt key or a wrong type fails before work starts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memgpt.errors import UserError

PARAMS = Path("params.yaml")
TABLES = Path("data/tables")  # output of ingest, a folder per source
SOURCES = ("corpus", "ner", "sentiment", "recommendation")
TASKS = ("ner", "sentiment", "recommendation")
MODELS = ("base", *TASKS)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Section):
    """Where one kind of data comes from.

    uri: `sample://newsroom`, a file, glob or folder, `s3://bucket/prefix` or `hf://[org/]name?config=…&split=…`.
    columns: our column → the source's, where the names differ; null: none, even if one has a usual name.
    labels: the allowed labels or entity types; null infers them from train.
    licence: licence of the source; null takes what the source says.
    """

    uri: str
    columns: dict[str, str | None] = {}
    labels: list[str] | None = None
    licence: str | None = None


class Data(Section):
    corpus: Source
    ner: Source
    sentiment: Source
    recommendation: Source


class Ingest(Section):
    validation_fraction: Fraction
    test_fraction: Fraction
    corpus_validation_fraction: Fraction


class Validate(Section):
    min_rows: Positive
    max_text_chars: Positive
    max_garbage: Fraction
    max_duplicates: Fraction
    max_corpus_overlap: Fraction
    min_label_share: Fraction


class Tokenize(Section):
    vocab_size: Annotated[int, Field(ge=300)]
    min_frequency: Positive
    max_documents: Positive


class Training(Section):
    """What every training stage needs. The learning rate rises over `warmup_fraction` of the steps, stays constant, and
    falls to zero over the last `decay_fraction` (1: it falls right after the warm-up)."""

    batch_size: Positive
    learning_rate: Rate
    memory_learning_rate: Rate
    weight_decay: NonNegative
    warmup_fraction: Fraction
    decay_fraction: Fraction
    checkpoint_steps: Positive
    seed: int


class Pretrain(Training):
    """learning_rate is AdamW's, matrix_learning_rate Muon's. masked_share_*: share of the steps that predict masked
    tokens, at the start and the end of the run. update: which weights change in a run that starts from `init`;
    "memory": of the memory rows that the new text reads more than the old did, the best `update_share`.
    memory_rows: rows per hash head of the memory; None: the preset's number. memory_least: how often an n-gram must
    occur to own a memory row; 0: all n-grams that hash to a row share it.
    float8: 8-bit matrix products in the blocks, on GPUs that have them."""

    init: str | None
    preset: Literal["tiny", "small", "base"]
    sequence_length: Annotated[int, Field(ge=8)]
    tokens: Positive
    matrix_learning_rate: Rate
    masked_share_start: Fraction
    masked_share_end: Fraction
    mask_fraction: Annotated[float, Field(gt=0, lt=1)]
    z_loss: NonNegative
    update: Literal["all", "memory"]
    update_share: Annotated[float, Field(gt=0, le=1)]
    memory_rows: Positive | None
    memory_least: Annotated[int, Field(ge=0)]
    compile: bool
    activation_checkpointing: bool
    float8: bool

    @model_validator(mode="after")
    def _update_needs_a_start(self) -> "Pretrain":
        if self.update == "memory" and self.init is None:
            raise ValueError("update=memory needs pretrain.init, a MemGPT directory that has a memory")
        return self

    @model_validator(mode="after")
    def _rows_are_of_a_new_model(self) -> "Pretrain":
        if self.memory_rows is not None and self.init is not None:
            raise ValueError("memory_rows is of a model that is made anew; the one in pretrain.init has its own")
        return self

    @model_validator(mode="after")
    def _start_is_not_the_output(self) -> "Pretrain":
        """DVC deletes a stage's output before it runs the stage."""
        output = Path("models/base")
        if self.init is not None and Path(self.init).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"init={self.init} is what pretrain writes anew; copy it to another name first")
        return self


class Tuning(Training):
    """Training on labelled data. ema_decay: decay of the moving average of the weights, which replaces the final ones;
    0: none. adversarial: length of the adversarial step on the embeddings, trained on as well (FGM); 0: none."""

    optimizer: Literal["adamw", "sgd", "adafactor"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    adversarial: NonNegative


class Augment(Section):
    """Training rows to add, as shares of the existing ones: with words replaced by others of similar embedding, with
    words dropped or swapped, in lower or upper case only, or combined from parts of two rows."""

    synonyms: NonNegative
    word_edits: NonNegative
    letter_case: NonNegative
    recombination: NonNegative


class AugmentNER(Augment):
    """mention_replacement: rows with names replaced by others of the same type."""

    mention_replacement: NonNegative


class Multitask(Tuning):
    """mixing_temperature: a task is drawn in proportion to its number of examples to the power of 1 /
    mixing_temperature. balancing: how the tasks' losses are weighted: equally, or by a learned uncertainty per task."""

    steps: Positive
    mixing_temperature: Annotated[float, Field(ge=1)]
    balancing: Literal["none", "uncertainty"]
    max_length: Annotated[int, Field(ge=8)]
    item_length: Annotated[int, Field(ge=8)]
    max_history: Positive
    similarity_temperature: Rate


class Finetune(Tuning):
    """tune: what is trained besides the head: all, backbone (all but the memory), memory (the rows that the data read),
    head (nothing else), adapter (`rank` more hidden units in each feed-forward layer), prefix (`rank` keys and values
    that every token sees in each layer), lora or adalora (low-rank changes of the backbone's matrices, of rank `rank`,
    merged into them at the end). patience: stop after so many epochs without a better validation score, and keep the
    best epoch; 0: never. soup: fine-tunings with different seeds to average, as long as that helps on validation."""

    start: Literal["base", "multitask"]
    tune: Literal["all", "backbone", "memory", "head", "adapter", "prefix", "lora", "adalora"]
    rank: Positive
    epochs: Positive
    patience: Annotated[int, Field(ge=0)]
    soup: Positive
    batch_by_length: bool
    max_length: Annotated[int, Field(ge=8)]

    @model_validator(mode="after")
    def _adversarial_needs_embeddings(self) -> "Finetune":
        if self.adversarial and self.tune not in ("all", "backbone"):
            raise ValueError(
                f"adversarial={self.adversarial} steps along the gradient of the token embeddings, which "
                f"tune={self.tune} does not train; set one of the two back"
            )
        return self


class FinetuneLabels(Finetune):
    """word_votes: rows of the table in which the words around a token, or the words and word pairs of a text, vote for
    its label; 0: none. ensemble: fine-tunings with different seeds whose probabilities are averaged."""

    word_votes: Annotated[int, Field(ge=0)]
    ensemble: Positive

    @model_validator(mode="after")
    def _one_way_to_join_seeds(self) -> "FinetuneLabels":
        if self.ensemble > 1 and self.soup > 1:
            raise ValueError(f"ensemble={self.ensemble} and soup={self.soup} both take several seeds; set one to 1")
        return self


class FinetuneNER(FinetuneLabels):
    augment: AugmentNER


class FinetuneSentiment(FinetuneLabels):
    """class_balance: a text's loss is weighted by the frequency of its label to the power of -class_balance."""

    class_balance: Fraction
    augment: Augment


class FinetuneRecommendation(Finetune):
    """rerank: learn on validation how to weight text match, popularity, recency, co-visitation and taste. Taste is
    learned from users' choices in `taste_epochs`."""

    max_history: Positive
    similarity_temperature: Rate
    rerank: bool
    taste_epochs: Annotated[int, Field(ge=0)]


class FinetuneTasks(Section):
    ner: FinetuneNER
    sentiment: FinetuneSentiment
    recommendation: FinetuneRecommendation


class Evaluate(Section):
    """robustness: number of test rows that are predicted again with changes; 0: none. mistakes: number of the worst
    mistakes to write out. before: also measure the untouched pretrained core."""

    bootstrap: Positive
    seed: int
    robustness: Annotated[int, Field(ge=0)]
    mistakes: Annotated[int, Field(ge=0)]
    before: bool


class Gate(Section):
    """floor: the primary metric below which a challenger is rejected. Larger is better for every model; `base` is
    judged by minus its bits per byte, so its floor is negative. margin: how far the interval's lower bound may lie
    below the champion; 0 demands superiority. slices: name → the largest accepted drop against the champion."""

    floor: float
    margin: NonNegative
    slices: dict[str, NonNegative]


class Promote(Section):
    """timeout_seconds: limit for a version to load, and again to answer; a slower one counts as not predicting."""

    bootstrap: Positive
    seed: int
    timeout_seconds: Rate
    base: Gate
    ner: Gate
    sentiment: Gate
    recommendation: Gate


class MaxPsi(Section):
    """Population stability index above which a distribution has drifted; by convention 0.1 is little, 0.25 much."""

    length: Rate
    tokens: Rate
    topic: Rate
    label: Rate


class Monitor(Section):
    """Arriving texts; no stage of the pipeline reads this section. uri: a file, glob or folder, or
    `s3://bucket/prefix`. text: the text column; null: one of the usual names. false_alarms: surges reported by chance,
    per topic and year. history_weeks: the past that a day is compared with; a topic with texts on fewer than least_days
    of it is not judged. drift_days: the latest days, compared with the training tables if they have drift_texts texts.
    retrain: on a surge or drift start a retraining, for a person to approve, at most once in cooldown_days."""

    uri: str | None
    text: str | None
    model: str
    negative: str
    false_alarms: Rate
    history_weeks: Positive
    least_days: Positive
    drift_days: Positive
    drift_texts: Positive
    max_psi: MaxPsi
    retrain: bool
    cooldown_days: Rate


class Runtime(Section):
    """slots: pretrain, multitask and finetune runs active at once, at most, over a user's checkouts on a machine."""

    threads: Positive | None
    slots: Positive | None


class Config(Section):
    data: Data
    ingest: Ingest
    validate_: Annotated[Validate, Field(alias="validate")]
    tokenize: Tokenize
    pretrain: Pretrain
    multitask: Multitask
    finetune: FinetuneTasks
    evaluate: Evaluate
    promote: Promote
    monitor: Monitor
    runtime: Runtime


def load(path: Path | str = PARAMS) -> Config:
    """Read and check `params.yaml`.

    Raises:
        UserError: naming the file and the key, if it is missing, not YAML, or breaks the schema.
    """
    return parse(read(path), source=str(path))


def read(path: Path | str = PARAMS) -> Any:
    """The YAML document with its comments, ready to be edited and written back."""
    path = Path(path)
    try:
        document = _yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the command in the root of the checkout") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}:{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected sections such as `data:` and `pretrain:`, found none")
    return document


def parse(document: Any, source: str = str(PARAMS)) -> Config:
    try:
        return Config.model_validate(_plain(document))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def override(document: Any, assignments: list[str], source: str = "--set") -> Any:
    """Apply `key=value` assignments (dotted keys, YAML values: the grammar of `dvc exp run -S`) to the document.

    Raises:
        UserError: for an assignment without `=`, an unknown key or a value that the schema refuses.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"{source} {assignment}: expected key=value, such as finetune.ner.epochs=3")
        try:
            value = _yaml().load(text) if text.strip() else None
        except YAMLError:
            raise UserError(f"{source} {assignment}: {text!r} is not a YAML value") from None
        *parents, last = key.split(".")
        node = document
        for depth, name in enumerate(parents):
            if name not in node and _optional(key.split(".")[: depth + 1]):
                node[name] = {}
            node = node.get(name) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise UserError(f"{source} {key}: no such section {'.'.join(parents[: depth + 1])!r} in params.yaml")
        node[last] = value
    parse(document, source)
    return document


def write(document: Any, path: Path | str = PARAMS) -> None:
    import io

    from memgpt import atomic

    buffer = io.StringIO()
    _yaml().dump(document, buffer)
    atomic.write_text(path, buffer.getvalue())


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # no wrapping, so that unchanged lines stay as they are
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _optional(path: list[str]) -> bool:
    """A mapping that may be absent from the file: `data.<source>.columns`."""
    return len(path) == 3 and path[0] == "data" and path[2] == "columns"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if isinstance(value, bool) else kind(value)
    return value


def _explain(error: ValidationError) -> str:
    import difflib

    errors = error.errors()  # a misspelt key is also reported as missing: prefer the misspelling
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for name in location[:-1]:
            field = section.model_fields.get(name) or section.model_fields.get(f"{name}_")
            section = field.annotation if field else None
        known = [f.alias or n for n, f in section.model_fields.items()] if section else []
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if first["type"] == "value_error":  # incompatible values
        return f"{key}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{key}: missing; add it (the committed params.yaml shows every key)"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
