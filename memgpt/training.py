"""The one training loop: transformers' `Trainer` with our parameter groups, schedule, checkpoints and progress."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from memgpt import checkpoint
from memgpt.config import Training
from memgpt.errors import UserError
from memgpt.optimizers import clip_gradients

Log = Callable[[dict[str, float], int], None]
Loss = Callable[[PreTrainedModel, dict[str, Any], int], torch.Tensor]


def train(
    model: PreTrainedModel,
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    params: Training,
    *,
    steps: int,
    checkpoints: Path,
    title: str,
    decay_fraction: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    log: Log | None = None,
) -> PreTrainedModel:
    """Train `model` in place for `steps` optimizer steps and return it.

    Continues from the newest whole checkpoint below `checkpoints`: weights, optimizer, schedule, random state and
    position in the data, so that a killed run ends with the bytes of an undisturbed one.

    decay_fraction: share of the steps, at the end, over which the learning rate falls to zero; the rest after the
    warm-up is constant. None: it falls from the end of the warm-up on.
    optimizer: AdamW over `parameter_groups` if None. loss: of (model, batch, step); the model's own if None.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size,
        save_strategy="steps",
        save_steps=params.checkpoint_steps,
        save_total_limit=2,  # the one before stays until the newest is whole
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=_bf16_pays(),
        seed=params.seed,
        data_seed=params.seed,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, params), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps, params.warmup_fraction, decay_fraction))
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        optimizers=(optimizer, schedule),
        callbacks=[_MarkComplete(), _StopOnNaN(), _Progress(title, steps, log)],
    )
    trainer.loss = loss
    trainer.remove_callback(_printer())
    resume = checkpoint.latest(checkpoints)
    set_seed(params.seed)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return model.to("cpu").eval()


def parameter_groups(model: PreTrainedModel, params: Training) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms, biases and embeddings without; memory tables without, at their own rate."""
    groups: dict[str, list[torch.nn.Parameter]] = {"decay": [], "plain": [], "memory": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("memory.table.weight"):
            groups["memory"].append(parameter)
        elif parameter.ndim < 2 or "embed_tokens" in name:
            groups["plain"].append(parameter)
        else:
            groups["decay"].append(parameter)
    settings = {
        "decay": {"lr": params.learning_rate, "weight_decay": params.weight_decay},
        "plain": {"lr": params.learning_rate, "weight_decay": 0.0},
        "memory": {"lr": params.memory_learning_rate, "weight_decay": 0.0},
    }
    return [{"params": groups[name], **settings[name]} for name in groups if groups[name]]


def _schedule(steps: int, warmup_fraction: float, decay_fraction: float | None) -> Callable[[int], float]:
    warmup = max(1, round(steps * warmup_fraction))
    decay = max(1, steps - warmup if decay_fraction is None else round(steps * decay_fraction))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))

    return factor


def _bf16_pays() -> bool:
    """Whether this device multiplies matrices in bf16, so that autocast makes training faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Trainer(Trainer):
    """Batches reach the model as the collator made them, string arguments (`task`) included."""

    loss: Loss | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.loss is not None:
            return self.loss(model, inputs, self.state.global_step)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return clip_gradients(model.parameters(), self.args.max_grad_norm)


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint once the Trainer has written all of it."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / checkpoint.COMPLETE).touch()


class _StopOnNaN(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise UserError(
                f"the loss is {loss} at step {state.global_step}; lower the stage's learning_rate "
                f"(the last whole checkpoint is kept in {args.output_dir})"
            )


class _Progress(TrainerCallback):
    """A bar on a terminal; elsewhere, so in the logs of a flow, a line every ten seconds."""

    def __init__(self, title: str, steps: int, log: Log | None):
        self.title, self.steps, self.log = title, steps, log
        self.loss = math.nan
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first, self.told = time.monotonic(), state.global_step, time.monotonic()
        if state.global_step:
            print(f"{self.title}: resuming at step {state.global_step} of {self.steps}", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=state.global_step, desc=self.title, unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            pace = (self.told - self.began) / max(1, state.global_step - self.first)
            print(
                f"{self.title}: step {state.global_step}/{self.steps}, loss {self.loss:.3f}, "
                f"{pace * (self.steps - state.global_step):.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            if self.bar is not None:
                self.bar.set_postfix(loss=f"{self.loss:.3f}")
            if self.log:
                self.log({"loss": self.loss}, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
