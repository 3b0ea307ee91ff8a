"""finetune@task: train a task's head on the shared core, with bidirectional attention. Writes models/<task>."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from memgpt import atomic, checkpoint, distributed, lineage, predict, tuning
from memgpt.config import TABLES, Config, Finetune, FinetuneLabels
from memgpt.errors import UserError, existing
from memgpt.tasks import judge
from memgpt.training import Log, train

MODELS = Path("models")
Watch = Callable[[float, int], None]


def run(config: Config, task: str, log: Log | None = None) -> dict[str, float]:
    return fit(getattr(config.finetune, task), task, MODELS / task, log)


def fit(
    params: Finetune,
    task: str,
    target: Path,
    log: Log | None = None,
    watch: Watch | None = None,
    head_seed: int | None = None,
) -> dict[str, float]:
    """Fine-tune into the directory `target`; returns the validation metrics.

    watch: called after each epoch with its validation score and number (from 1); an exception in it ends the training.
    head_seed: seed of the head's initial weights, shared by models that will be averaged. Default: params.seed.
    """
    if params.soup > 1:
        return _soup(params, task, target, log)
    if isinstance(params, FinetuneLabels) and params.ensemble > 1:
        return _ensemble(params, task, target, log)
    settings = params.model_dump()
    parent, tables = existing(MODELS / params.start), TABLES / task
    module = judge(task)
    if task == "recommendation" and distributed.processes() > 1:
        raise UserError(
            "finetune recommendation compares all items of a batch with each other, so that a batch cannot be divided "
            "among processes; run it without torchrun"
        )
    tokenizer = AutoTokenizer.from_pretrained(parent)
    head_seed = params.seed if head_seed is None else head_seed
    set_seed(head_seed)
    model = module.model(parent, TABLES, **settings)
    data = module.Training(TABLES, tokenizer, **settings)
    if not len(data):
        raise UserError(
            f"data.{task}.uri: no training example in {tables}; give more rows "
            "(of a reader's items the last two are held out, and learning from the others takes two)"
        )
    if not module.test_rows(TABLES, "validation"):
        raise UserError(f"data.{task}.uri: no validation example in {tables}, to calibrate and judge by; give some")
    epoch_steps = -(-len(data) // params.batch_size)
    steps = params.epochs * epoch_steps
    model = tuning.prepare(model, params, steps)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    table = model.base_model.memory_table.weight.detach().clone() if params.tune == "memory" else None
    checkpoints = checkpoint.directory(f"finetune-{task}", settings | {"head_seed": head_seed}, [parent, tables])
    epochs = _EarlyStopping(task, params, tokenizer, checkpoints / "epochs", watch)
    model = train(
        model,
        data,
        data.collate,
        params,
        steps=steps,
        checkpoints=checkpoints,
        title=f"finetune {task}",
        lengths=data.lengths if params.batch_by_length else None,
        epoch_steps=epoch_steps,
        after_epoch=epochs if params.patience or watch else None,
        over=epochs.over,
        log=log,
    )
    if not distributed.first():
        return {}
    if params.patience:
        model = predict.load(task, epochs.best).model
    if table is not None:  # only rows that the data reads are trained
        trainable -= int((model.base_model.memory_table.weight == table).all(dim=1).sum()) * table.shape[1]
    with atomic.replacing(target) as directory:
        found = save(model, task, params, tokenizer, directory) | validate(task, directory)
        metrics = {f"validation_{name}": round(value, 6) for name, value in found.items()}
        metrics |= {"trainable_parameters": trainable, "steps": epochs.step if params.patience else steps}
        lineage.write(directory, f"finetune@{task}", [parent, tables], settings, parent, params.seed, metrics)
    checkpoint.discard(checkpoints)
    return metrics


def _soup(params: Finetune, task: str, target: Path, log: Log | None) -> dict[str, float]:
    """The average of fine-tunings with different seeds (greedy soup, arXiv 2203.05482): best first, each is added if
    that improves the average's validation score."""
    inputs, primary = [existing(MODELS / params.start), TABLES / task], judge(task).PRIMARY
    place = checkpoint.directory(f"soup-{task}", params.model_dump(), inputs)
    members = _members(params.model_copy(update={"soup": 1}), params.soup, task, place, log, head_seed=params.seed)
    if not distributed.first():
        return {}
    scores = {member: validate(task, member)[primary] for member in members}
    members.sort(key=lambda member: -scores[member])
    best, score, taken = members[0], scores[members[0]], members[:1]
    predictor, tokenizer = predict.load(task, best), AutoTokenizer.from_pretrained(best)
    for member in members[1:]:
        weights = [load_file(path / "model.safetensors") for path in (*taken, member)]
        predictor.model.load_state_dict({name: _mean([w[name] for w in weights]) for name in weights[0]})
        average = place / f"average-{member.name}"
        with atomic.replacing(average) as directory:
            save(predictor.model, task, params, tokenizer, directory)
        reached = validate(task, average)[primary]
        if reached > score:
            best, score, taken = average, reached, [*taken, member]
    with atomic.replacing(target) as directory:
        shutil.copytree(best, directory)
        metrics = {f"validation_{name}": round(value, 6) for name, value in validate(task, directory).items()}
        metrics["members"] = len(taken)
        lineage.write(directory, f"finetune@{task}", inputs, params.model_dump(), inputs[0], params.seed, metrics)
    checkpoint.discard(place)
    return metrics


def _mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The mean; of integer tensors the first, since all members have them from the core (such as the row owners)."""
    return torch.stack(tensors).mean(0) if tensors[0].is_floating_point() else tensors[0]


def _ensemble(params: FinetuneLabels, task: str, target: Path, log: Log | None) -> dict[str, float]:
    """An ensemble: fine-tunings with different seeds in one directory that predict together, each calibrated alone."""
    inputs = [existing(MODELS / params.start), TABLES / task]
    place = checkpoint.directory(f"ensemble-{task}", params.model_dump(), inputs)
    members = _members(params.model_copy(update={"ensemble": 1}), params.ensemble, task, place, log)
    if not distributed.first():
        return {}
    with atomic.replacing(target) as directory:
        for number, member in enumerate(members, start=1):
            shutil.copytree(member, directory if number == 1 else directory / f"member-{number}")
        metrics = {f"validation_{name}": round(value, 6) for name, value in validate(task, directory).items()}
        metrics["members"] = len(members)
        lineage.write(directory, f"finetune@{task}", inputs, params.model_dump(), inputs[0], params.seed, metrics)
    checkpoint.discard(place)
    return metrics


def _members(
    params: Finetune, count: int, task: str, place: Path, log: Log | None, head_seed: int | None = None
) -> list[Path]:
    """Fine-tunings with `count` seeds, from params.seed on, each in its own directory below `place`."""
    members = []
    for seed in range(params.seed, params.seed + count):
        members.append(place / f"seed-{seed}")
        if not members[-1].exists():
            fit(params.model_copy(update={"seed": seed}), task, members[-1], log, head_seed=head_seed)
    return members


def save(
    model: PreTrainedModel, task: str, params: Finetune, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> dict[str, float]:
    """Write everything that prediction needs to a directory; returns the numbers that calibration found."""
    training, device = model.training, model.device
    whole = tuning.whole(model).to("cpu").eval()  # calibration and the item index are computed on the CPU
    module, found = judge(task), {}
    if hasattr(module, "calibrate"):
        found = module.calibrate(whole, tokenizer, TABLES, params.max_length)
    whole.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if task == "recommendation":
        module.write_index(whole, tokenizer, TABLES, directory, **params.model_dump())
    model.to(device).train(training)
    return found


def validate(task: str, directory: Path) -> dict[str, float]:
    module = judge(task)
    rows = module.test_rows(TABLES, "validation")
    predictor = predict.load(task, directory)
    predictions = predictor.predict([row["input"] for row in rows])
    found = module.metrics(rows, predictions)
    if hasattr(module, "apart"):
        found |= module.apart(TABLES, rows, predictions, predictor)
    return found


class _EarlyStopping:
    """Early stopping: keeps the model directory of the best epoch by validation score, predicting as when served.

    The scores are stored by step, so that a resumed run decides like an uninterrupted one.
    """

    def __init__(
        self,
        task: str,
        params: Finetune,
        tokenizer: PreTrainedTokenizerFast,
        directory: Path,
        watch: Watch | None = None,
    ):
        self.task, self.params, self.tokenizer, self.watch = task, params, tokenizer, watch
        self.best, self.scores = directory / "best", directory / "scores.json"

    def __call__(self, model: PreTrainedModel, step: int) -> bool:
        scores = {at: score for at, score in self._read().items() if at < step}
        with atomic.replacing(self.scores.with_name("epoch")) as directory:
            save(model, self.task, self.params, self.tokenizer, directory)
        epoch = self.scores.with_name("epoch")
        score = validate(self.task, epoch)[judge(self.task).PRIMARY]
        if score > max(scores.values(), default=float("-inf")):
            with atomic.replacing(self.best) as directory:
                epoch.rename(directory)
        scores[step] = score
        atomic.write_json(self.scores, scores)
        if self.watch:
            try:
                self.watch(score, len(scores))
            except Exception:  # the training ends for good and will not be resumed
                checkpoint.discard(self.scores.parent.parent)
                raise
        return not self.over

    @property
    def over(self) -> bool:
        """Whether none of the last `patience` epochs was better than the best one before them."""
        scores = list(self._read().values())
        return bool(scores) and 0 < self.params.patience < len(scores) - scores.index(max(scores))

    @property
    def step(self) -> int:
        """The last step of the best epoch."""
        scores = self._read()
        return max(scores, key=scores.__getitem__)

    def _read(self) -> dict[int, float]:
        if not self.scores.exists():
            return {}
        scores = json.loads(self.scores.read_text(encoding="utf-8"))
        return {int(step): scores[step] for step in sorted(scores, key=int)}
