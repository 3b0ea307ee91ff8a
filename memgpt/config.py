"""`params.yaml` as strict, frozen models: a misspelt key or a wrong type fails before work starts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memgpt.errors import UserError

PARAMS = Path("params.yaml")
TABLES = Path("data/tables")  # of ingest, a folder per source
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
    columns: our column → the source's, where the names differ; null: none, though one has a usual name.
    labels: the label or entity-type set, pinned; null infers it from train.
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
    """What every training stage needs. Fractions are of the number of steps: the learning rate rises over
    `warmup_fraction`, stays, and falls to zero over the last `decay_fraction` (1: it falls from the top on)."""

    batch_size: Positive
    learning_rate: Rate
    memory_learning_rate: Rate
    weight_decay: NonNegative
    warmup_fraction: Fraction
    decay_fraction: Fraction
    checkpoint_steps: Positive
    seed: int


class Pretrain(Training):
    """learning_rate is that of AdamW, matrix_learning_rate Muon's. masked_share_*: share of the steps that predict
    masked tokens, at the start and the end of the run. update: which weights a run that starts from `init` changes;
    "memory" changes, of the memory rows that the new text reads more than the old did, the best `update_share`.
    memory_rows: of each hash head of the memory; None for as many as the preset has. memory_least: 0, or how often an
    n-gram must occur to be given a row of the memory, which then is its own.
    float8: matrix products of the blocks in 8 bits, where the GPU has them."""

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
    """Training on labelled data. ema_decay: 0, or of the moving average of the weights that is kept in place of the
    last ones. adversarial: 0, or the length of the step on the embeddings against which is trained as well (FGM)."""

    optimizer: Literal["adamw", "sgd", "adafactor"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    adversarial: NonNegative


class Augment(Section):
    """Training rows to add, as shares of those there are: with words replaced by others that the core reads alike, with
    words dropped or swapped, in small or capital letters only, of parts of two rows."""

    synonyms: NonNegative
    word_edits: NonNegative
    letter_case: NonNegative
    recombination: NonNegative


class AugmentNER(Augment):
    """mention_replacement: with other names of the same type."""

    mention_replacement: NonNegative


class Multitask(Tuning):
    """mixing_temperature: a task is drawn in proportion to its examples to the power of one over this. balancing: of
    the tasks' losses: none, or by how uncertain each task is found to be (a learned weight for each)."""

    steps: Positive
    mixing_temperature: Annotated[float, Field(ge=1)]
    balancing: Literal["none", "uncertainty"]
    max_length: Annotated[int, Field(ge=8)]
    item_length: Annotated[int, Field(ge=8)]
    max_history: Positive
    similarity_temperature: Rate


class Finetune(Tuning):
    """tune: what is trained beside the head: all, backbone (all but the memory), memory (the rows that the data reads),
    head (nothing else), adapter (`rank` more hidden units in each feed-forward layer), prefix (`rank` keys and values
    that every token sees in each layer), or low-rank changes of the backbone's matrices, of rank `rank`, merged into
    them at the end. patience: 0, or after how many epochs without a better validation score to stop; the best epoch is
    kept. soup: how many fine-tunings, with other seeds, to average as long as that helps on validation."""

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
    its label, 0 for none. ensemble: how many fine-tunings, with other seeds, answer together, by the mean of their
    probabilities."""

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
    """class_balance: a text's loss is weighted by how frequent its label is, to the power of minus this."""

    class_balance: Fraction
    augment: Augment


class FinetuneRecommendation(Finetune):
    """rerank: learn on validation how to weigh the match of texts against popularity, recency, co-visitation
    and taste, which is learned from choices in `taste_epochs`."""

    max_history: Positive
    similarity_temperature: Rate
    rerank: bool
    taste_epochs: Annotated[int, Field(ge=0)]


class FinetuneTasks(Section):
    ner: FinetuneNER
    sentiment: FinetuneSentiment
    recommendation: FinetuneRecommendation


class Evaluate(Section):
    """robustness: how many test rows are asked again with changes, 0 for none. mistakes: how many of the worst are
    written down. before: whether the pretrained core is measured too, untouched."""

    bootstrap: Positive
    seed: int
    robustness: Annotated[int, Field(ge=0)]
    mistakes: Annotated[int, Field(ge=0)]
    before: bool


class Gate(Section):
    """floor: the primary metric below which a challenger is rejected (larger is better for every model: `base` is
    judged by minus its bits per byte, so its floor is negative). margin: how much worse the lower bound may be; 0
    demands superiority. slices: name → the largest drop against the champion that is accepted there."""

    floor: float
    margin: NonNegative
    slices: dict[str, NonNegative]


class Promote(Section):
    """timeout_seconds: in which a version must load, and then answer; one that takes longer does not predict."""

    bootstrap: Positive
    seed: int
    timeout_seconds: Rate
    base: Gate
    ner: Gate
    sentiment: Gate
    recommendation: Gate


class MaxPsi(Section):
    """Population stability index above which a distribution has drifted; by custom 0.1 is little, 0.25 much."""

    length: Rate
    tokens: Rate
    topic: Rate
    label: Rate


class Monitor(Section):
    """Texts that arrive; no stage of the pipeline reads this. uri: a file, glob or folder, or `s3://bucket/prefix`.
    text: its column of texts; null: one of the usual names. false_alarms: surges that are reported by chance, per topic
    and year. history_weeks: what a day is compared with; a topic with texts on fewer than least_days of it is not
    judged. drift_days: the latest, which are compared with the training tables from drift_texts texts on. retrain:
    start a retraining, for a person to approve, on a surge or drift, at most once in cooldown_days."""

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
    """slots: how many of pretrain, multitask and finetune run at once, over all checkouts of a user on a machine."""

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
    yaml.width = 4096  # never wraps: what is not changed stays as it is
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

    errors = error.errors()  # a misspelt key is also a missing one: say how it was spelt
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
    if first["type"] == "value_error":  # keys that do not go together
        return f"{key}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{key}: missing; add it (the committed params.yaml shows every key)"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
