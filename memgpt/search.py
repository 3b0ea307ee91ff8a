"""Hyperparameters of a fine-tuning: a search with Optuna, and a range test of the learning rate.

A study is stored in SQLite and resumes where it was stopped, including the fine-tuning of a killed trial. Trials are
scored on validation; the test split is never read.
"""

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt import atomic, config, tracking
from memgpt.config import TABLES, Finetune
from memgpt.errors import UserError, existing
from memgpt.lineage import digest
from memgpt.tasks import judge

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

MODELS, STUDIES = Path("models"), Path(".memgpt/studies")
DEFAULT_SPACE = [
    "learning_rate=0.0002..0.005",
    "memory_learning_rate=0.0001..0.1",
    "dropout=0.0..0.3",
    "batch_size=16,32",
]
Space = dict[str, tuple[float, float] | list[Any]]
Told = Callable[[int, float | None, dict[str, Any], str], None]


def parse_space(task: str, assignments: list[str]) -> Space:
    """`key=low..high`, the range of a rate or fraction, or `key=a,b,c`; keys of finetune.<task>.

    Raises:
        UserError: for anything else, and for a value that the setting does not accept.
    """
    space: Space = {}
    document = config.read()
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        key = key.strip()
        values: list[Any] = []
        for value in text.split("..") if ".." in text else text.split(","):
            tried = _settings(task, document, [f"{key}={value}"], f"--space {assignment}")
            values.append(reduce(getattr, key.split("."), tried))
        if ".." not in text:
            space[key] = values
        elif [type(value) for value in values] == [float, float] and values[0] < values[1] < math.inf:
            space[key] = (values[0], values[1])
        else:
            raise UserError(
                f"--space {assignment}: a range is low..high of a rate or fraction; else list the values: a,b,c"
            )
    return space


def _settings(task: str, document: Any, assignments: list[str], source: str) -> Finetune:
    """finetune.<task> of the document, with values in the form of `--set`; the document is not changed."""
    changed = config.override(copy.deepcopy(document), [f"finetune.{task}.{each}" for each in assignments], source)
    return getattr(config.parse(changed).finetune, task)


def search(task: str, space: Space, trials: int, told: Told) -> "Study":
    """Continue until the study has `trials` finished or pruned trials. A trial is pruned if it is worse than the median
    after an epoch, or if its values are incompatible or cannot be trained.

    Another space, other settings, data or another core start a new study. told: called after each trial with its
    number, its validation score (None: pruned), its values, and why they could not be trained.

    Raises:
        UserError: if no trial could be finished. The study is then deleted, so that the next call starts a new one.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    document = config.read()
    params = _settings(task, document, [], "")
    inputs = [*(existing(MODELS / str(start)) for start in space.get("start", [params.start])), TABLES / task]
    question = [params.model_dump(), space, *map(digest, inputs)]
    name = f"{task}-{hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]}"
    with tracking.locked(STUDIES / f"{name}.lock"), tracking.stage_run("tune", task, _named(task, space)) as parent:
        parent.inputs([task], "training")
        storage, why = f"sqlite:///{STUDIES / 'studies.db'}", ""
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        )
        # The sampler starts anew in each process: another seed, so that it does not repeat the earlier trials' values.
        study.sampler = optuna.samplers.TPESampler(seed=params.seed + len(study.get_trials()))
        for left in study.get_trials(states=(TrialState.RUNNING,)):  # of a process that died, since we have the lock
            study.tell(left.number, state=TrialState.FAIL)
            study.enqueue_trial(left.params)
        while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < trials:
            trial = study.ask()
            for key, choice in space.items():
                _suggest(trial, key, choice)
            values, why = _tried(trial), ""
            with tracking.stage_run("trial", task, _named(task, values), parent=parent.id) as run:
                try:
                    assignments = [f"{key}={value}" for key, value in values.items()]
                    score = _score(trial, task, _settings(task, document, assignments, "--space"))
                except UserError as error:  # other values may train
                    score, why = None, str(error)
                    run.tags({"error": why})
                except Exception:  # a killed trial, by contrast, stays open and is tried again
                    study.tell(trial, state=TrialState.FAIL)
                    raise
                if score is None:
                    study.tell(trial, state=TrialState.PRUNED)
                else:
                    study.tell(trial, score)
                    run.metrics({f"validation_{judge(task).PRIMARY}": score})
            told(trial.number, score, values, why)
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            optuna.delete_study(study_name=name, storage=storage)
            raise UserError(f"tune {task}: no trial could be finished; the last: {why}")
        parent.metrics({f"best_validation_{judge(task).PRIMARY}": study.best_value})
        parent.params({"best": _tried(study.best_trial)})
    return study


def _named(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values under their names in params.yaml."""
    return {"finetune": {task: values}}


def as_settings(task: str, study: "Study") -> str:
    """The best values as options of `memgpt retrain`."""
    return " ".join(f"--set finetune.{task}.{key}={value}" for key, value in _tried(study.best_trial).items())


def draw(study: "Study", target: Path) -> None:
    """Plot the score against each setting, a dot per trial."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [trial for trial in study.get_trials() if trial.value is not None]
    keys = sorted({key for trial in done for key in trial.params})
    figure, axes = plt.subplots(
        1, len(keys), figsize=(4 * len(keys), 3.5), layout="constrained", squeeze=False, sharey=True
    )
    for axis, key in zip(axes[0], keys, strict=True):
        known = [trial for trial in done if key in trial.params]
        scale = known[0].distributions[key]
        values = [trial.params[key] if hasattr(scale, "log") else str(trial.params[key]) for trial in known]
        axis.scatter(values, [trial.value for trial in known])
        axis.set(xlabel=key, xscale="log" if getattr(scale, "log", False) else axis.get_xscale())
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation score")
    with atomic.replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=100)
    plt.close(figure)


def range_test(task: str, params: Finetune, steps: int = 100) -> tuple[list[tuple[float, float]], float | None]:
    """The loss while the learning rate rises from 1e-6 to 1 (Smith 2017, arXiv 1506.01186).

    Returns (rate, smoothed loss) of each step until the loss has risen far above its minimum, and the rate at its
    steepest fall; None if it falls by no more than the noise between batches.
    """
    import torch
    from torch.utils.data import DataLoader, RandomSampler
    from transformers import AutoTokenizer, set_seed

    from memgpt import tuning
    from memgpt.optimizers import clip_gradients, for_tuning

    parent, settings, module = existing(MODELS / params.start), params.model_dump(), judge(task)
    set_seed(params.seed)
    model = tuning.prepare(module.model(parent, TABLES, **settings), params, steps).train()
    data = module.Training(TABLES, AutoTokenizer.from_pretrained(parent), **settings)
    optimizer = for_tuning(model, params, params.optimizer)
    rates = np.geomspace(1e-6, 1.0, steps)
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, steps - 1)] / params.learning_rate)
    draws = RandomSampler(data, replacement=True, num_samples=steps * params.batch_size)
    losses: list[float] = []
    average, least = 0.0, math.inf
    for step, batch in enumerate(DataLoader(data, params.batch_size, sampler=draws, collate_fn=data.collate)):
        loss = model(**batch).loss
        average = 0.9 * average + 0.1 * loss.item()
        so_far = average / (1 - 0.9 ** (step + 1))
        least = min(least, so_far)
        if not so_far < 4 * least:  # NaN too
            break
        losses.append(loss.item())
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rise.step()
    if len(losses) < 3:
        return [*zip(rates[: len(losses)].tolist(), losses, strict=True)], None
    smoothed, noise = _smoothed(np.array(losses))
    points = [*zip(rates[: len(losses)].tolist(), smoothed.tolist(), strict=True)]
    valley = int(smoothed.argmin())
    if valley < 2 or smoothed[:valley].max() - smoothed[valley] <= noise:
        return points, None
    return points, float(rates[int(np.argmin(np.gradient(smoothed[: valley + 1])[:-1]))])


def _smoothed(losses: np.ndarray) -> tuple[np.ndarray, float]:
    """The losses smoothed by a Gaussian whose standard deviation is a twentieth of all steps, and their noise: twice
    the standard error of a smoothed loss."""
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / max(1.0, 0.05 * len(losses))) ** 2)
    weights /= weights.sum(1, keepdims=True)
    means = weights @ losses
    return means, 2 * float(np.std(losses - means) * np.sqrt((weights**2).sum(1)).max())


def draw_range(points: list[tuple[float, float]], suggestion: float | None, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(*zip(*points, strict=True))
    if suggestion is not None:
        axis.axvline(suggestion, color="tab:red", linestyle="--", label=f"steepest fall: {suggestion:.2g}")
        axis.legend()
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    with atomic.replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=100)
    plt.close(figure)


def _suggest(trial: "Trial", key: str, choice: tuple[float, float] | list[Any]) -> None:
    if isinstance(choice, list):
        trial.suggest_categorical(key, choice)
    else:
        low, high = choice
        trial.suggest_float(key, low, high, log=low > 0 and high / low >= 10)


def _tried(trial: "Trial | FrozenTrial") -> dict[str, Any]:
    """A trial's values, as tried and printed: those of a range are rounded to three digits, within the range."""
    from optuna.distributions import FloatDistribution

    values = dict(trial.params)
    for key, scale in trial.distributions.items():
        if isinstance(scale, FloatDistribution):
            values[key] = min(max(float(f"{values[key]:.3g}"), scale.low), scale.high)
    return values


def _score(trial: "Trial", task: str, params: Finetune) -> float | None:
    """The validation score of a fine-tuning with these settings; None if it was pruned."""
    from optuna import TrialPruned

    from memgpt.stages import finetune

    def watch(score: float, epoch: int) -> None:
        trial.report(score, epoch)
        if trial.should_prune():
            raise TrialPruned

    target = STUDIES / f"trial-{trial.study.study_name}"
    try:
        return finetune.fit(params, task, target, watch=watch)[f"validation_{judge(task).PRIMARY}"]
    except TrialPruned:
        return None
    finally:
        shutil.rmtree(target, ignore_errors=True)
