"""The one training loop: transformers' `Trainer` with our optimizers, schedule, checkpoints and progress."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from memgpt import checkpoint, tuning
from memgpt.config import Training, Tuning
from memgpt.errors import UserError
from memgpt.optimizers import clip_gradients, for_tuning

Log = Callable[[dict[str, float], int], None]
Loss = Callable[[PreTrainedModel, dict[str, Any], int], torch.Tensor]
AfterEpoch = Callable[[PreTrainedModel, int], bool]


def train(
    model: PreTrainedModel,
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    params: Training,
    *,
    steps: int,
    checkpoints: Path,
    title: str,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    log: Log | None = None,
    lengths: list[int] | None = None,
    epoch_steps: int = 0,
    after_epoch: AfterEpoch | None = None,
) -> PreTrainedModel:
    """Train `model` in place for `steps` optimizer steps and return it, or its moving average.

    Continues from the newest whole checkpoint below `checkpoints`: weights, optimizer, schedule, random state and
    position in the data, so that a killed run ends with the bytes of an undisturbed one.

    optimizer: by `params` if None. loss: of (model, batch, step); the model's own if None.
    lengths: of the elements, to put those of similar length into a batch; None mixes them.
    after_epoch: asked after every `epoch_steps` steps, with the model and the step, whether to go on.
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
    settings = params if isinstance(params, Tuning) else None
    average = _Average(model, settings.ema_decay) if settings and settings.ema_decay else None
    callbacks = [_AllocateRanks(), average, _Epochs(epoch_steps, after_epoch, average) if after_epoch else None]
    optimizer = optimizer or for_tuning(model, params, settings.optimizer if settings else "adamw")
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps, params))),
        callbacks=[*filter(None, callbacks), _MarkComplete(), _StopOnNaN(), _Progress(title, steps, log)],
    )
    trainer.loss = loss
    trainer.adversarial = settings.adversarial if settings else 0.0
    trainer.lengths = lengths
    trainer.remove_callback(_printer())
    resume = checkpoint.latest(checkpoints)
    set_seed(params.seed)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trained = average.model.module if average else model
    return trained.to("cpu").eval()


def _schedule(steps: int, params: Training) -> Callable[[int], float]:
    warmup = max(1, round(steps * params.warmup_fraction))
    decay = max(1, min(steps - warmup, round(steps * params.decay_fraction)))

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
    adversarial = 0.0
    lengths: list[int] | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.loss is not None:
            return self.loss(model, inputs, self.state.global_step)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """With `adversarial`, also the gradient at embeddings moved that far to where the loss rises (fast gradient
        method, arXiv 1605.07725); the two are added."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.adversarial:
            embeddings = model.get_input_embeddings().weight
            before = embeddings.detach().clone()
            with torch.no_grad():
                embeddings.add_(embeddings.grad, alpha=self.adversarial / (embeddings.grad.norm().item() + 1e-12))
            super().training_step(model, inputs, *args, **kwargs)
            with torch.no_grad():
                embeddings.copy_(before)
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return _ByLength(self.lengths, self.args.per_device_train_batch_size, self.args.seed)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return clip_gradients(model.parameters(), self.args.max_grad_norm)


class _ByLength(Sampler):
    """Elements of similar length next to each other, in an order of their own in each epoch."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))


class _Average(TrainerCallback):
    """Exponential moving average of the weights, kept with every checkpoint."""

    FILE = "average.safetensors"

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            load_model(self.model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model.update_parameters(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_model(self.model, str(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE))


class _AllocateRanks(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuning.allocate_ranks(model, state.global_step)


class _Epochs(TrainerCallback):
    """Asks after each epoch whether to go on; before the checkpoint of that step, so that a resumed run asks too."""

    def __init__(self, steps: int, ask: AfterEpoch, average: _Average | None):
        self.steps, self.ask, self.average = steps, ask, average

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            model = self.average.model.module if self.average else model
            if not self.ask(model, state.global_step):
                control.should_training_stop = True


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
