"""The training loop of all stages: transformers' `Trainer` with our optimizers, schedule, checkpoints and progress."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from memgpt import checkpoint, distributed, sharding, tuning
from memgpt.config import Training, Tuning
from memgpt.errors import UserError
from memgpt.model.kernels import multiplies_bfloat16
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
    over: bool = False,
    whole_batches: bool = False,
    divide_tables: bool = False,
) -> PreTrainedModel:
    """Train `model` in place for `steps` optimizer steps and return it, or its moving average.

    Resumes from the newest complete checkpoint below `checkpoints`: weights, optimizer, schedule, random state and
    position in the data. So a killed run ends bit-identical to an undisturbed one.

    Under torchrun all processes call this with the same arguments and end with the same model. They divide each step's
    batch; its loss and gradient equal those of one process up to rounding. Only the first process logs and writes.

    optimizer: chosen by `params` if None. loss: called with (model, collated batch, step); the model's own if None.
    lengths: of the dataset's elements, to batch those of similar length; None mixes them.
    whole_batches: each element of the dataset is already a process's share of a batch.
    divide_tables: shard the memory tables among the processes; then only the first ends with whole tables.
    after_epoch: called with the model and the step after every `epoch_steps` steps; returns whether to continue.
    over: `after_epoch` already returned False, in a run that was killed afterwards; nothing more is trained.
    """
    section = title.replace(" ", ".")
    distributed.divides(params.batch_size, f"{section}.batch_size")
    cpu, bf16 = _device(title)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size // distributed.processes(),
        save_strategy="steps",
        save_steps=params.checkpoint_steps,
        save_total_limit=2,  # the previous one stays until the newest is complete
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=bf16,
        seed=params.seed,
        data_seed=params.seed,
        max_grad_norm=1.0,
        use_cpu=cpu,
        ddp_find_unused_parameters=whole_batches,  # a batch of one task leaves the other tasks' heads unused
        ddp_broadcast_buffers=False,  # buffers are the same in all processes
    )
    settings = params if isinstance(params, Tuning) else None
    average = _Average(model, settings.ema_decay) if settings and settings.ema_decay else None
    callbacks = [_AllocateRanks(), average, _Epochs(epoch_steps, after_epoch, average) if after_epoch else None]
    optimizer = optimizer or for_tuning(model, params, settings.optimizer if settings else "adamw")
    callbacks += [_MarkComplete(), _StopOnNaN(), _Progress(title, steps, log) if distributed.first() else None]
    wrapped = distributed.exclude_tables_from_ddp(model)
    if divide_tables:
        sharding.divide(model)
    with _memory_to_be_short_of(section, params):
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps, params))),
            callbacks=[*filter(None, callbacks)],
        )
        trainer.loss = loss
        trainer.adversarial = settings.adversarial if settings else 0.0
        size = 1 if whole_batches else params.batch_size
        trainer.batches = _Batches(len(dataset), size, params.seed, lengths)  # type: ignore[arg-type]
        trainer.remove_callback(_printer())
        if not wrapped:  # only the memory is trained, and DDP refuses a model without gradients to average
            trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
        if distributed.first():
            checkpoint.sweep(checkpoints)
        distributed.wait()
        resume = checkpoint.latest(checkpoints)
        set_seed(params.seed + distributed.rank())  # different dropout masks in each process
        if not distributed.broadcast_flag(over):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    sharding.join(model, checkpoints)
    for module in model.modules():
        module._compiled_call_impl = None  # drop what a loss compiled in place for the shapes of training steps
    trained = average.model.module if average else model
    return trained.to("cpu").eval()


def _schedule(steps: int, params: Training) -> Callable[[int], float]:
    warmup = max(1, round(steps * params.warmup_fraction))
    decay = max(1, min(steps - warmup, round(steps * params.decay_fraction)))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))

    return factor


def _device(title: str) -> tuple[bool, bool]:
    """Whether to train on the CPU, and whether in bf16, which is used if the device multiplies matrices in it. Prints a
    line if a GPU was to be expected but there is none, or if it is too old for bf16."""
    if not torch.cuda.is_available():
        if torch.version.cuda or os.environ.get("CUDA_VISIBLE_DEVICES", "-1") not in ("", "-1"):
            distributed.print_once(f"{title}: no GPU that torch can use; training on the CPU")
        return True, multiplies_bfloat16(torch.device("cpu"))
    major, minor = torch.cuda.get_device_capability()
    if major < 8:  # torch would emulate bf16, which is slower than 32 bits
        distributed.print_once(
            f"{title}: {torch.cuda.get_device_name()} (compute capability {major}.{minor}) is too old for bf16, which "
            "takes 8.0; training in 32 bits"
        )
    return False, major >= 8


@contextmanager
def _memory_to_be_short_of(section: str, params: Training) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        length = "sequence_length" if hasattr(params, "sequence_length") else "max_length"
        raise UserError(
            f"out of GPU memory; lower {section}.batch_size={params.batch_size} or "
            f"{section}.{length}={getattr(params, length)}"
            f"{', or set pretrain.activation_checkpointing=true' if section == 'pretrain' else ''}"
        ) from None


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Trainer(Trainer):
    """Passes batches to the model as collated, including string arguments (`task`)."""

    loss: Loss | None = None
    adversarial = 0.0
    batches: "_Batches"

    def get_train_dataloader(self) -> DataLoader:
        return _Loader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs if self.loss else super()._prepare_inputs(inputs)  # a custom loss moves them to the device itself

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Not counted for a custom loss, because the host would wait for the device."""
        return None if self.loss else super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.loss is not None:
            with self.accelerator.autocast():  # needed for the loss's own look-ups; the model has autocast anyway
                return self.loss(model, inputs, self.state.global_step)
        counted = {}
        if distributed.processes() > 1:
            counted["num_items_in_batch"] = distributed.mean((inputs["labels"] != -100).sum())
        outputs = model(**inputs, **counted)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """With `adversarial`, adds the gradient at embeddings moved by that distance in the direction in which the loss
        rises (fast gradient method, arXiv 1605.07725)."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.adversarial:
            embeddings = self.model.get_input_embeddings().weight
            before = embeddings.detach().clone()
            with torch.no_grad():
                embeddings.add_(embeddings.grad, alpha=self.adversarial / (embeddings.grad.norm().item() + 1e-12))
            super().training_step(model, inputs, *args, **kwargs)
            with torch.no_grad():
                embeddings.copy_(before)
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with sharding.without_rows(self.model, self.optimizer):
            super()._save_checkpoint(*args, **kwargs)
        directory = checkpoint.of_step(self.args.output_dir, self.state.global_step)
        sharding.write(self.model, self.optimizer, directory)
        if distributed.first():
            tuning.write_ranks(self.model, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not tuning.read_ranks(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict or sharding.without_tables(self.model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            sharding.read(self.model, self.optimizer, Path(checkpoint))

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        distributed.average_rows(model.parameters())
        return clip_gradients(model.parameters(), self.args.max_grad_norm)


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _Batches(Sampler):
    """Row numbers of this process's share of each batch. The order differs between epochs and does not depend on the
    number of processes. With `lengths`, rows of similar length are batched together."""

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: list[int] | None):
        self.rows, self.batch_size, self.seed, self.lengths, self.epoch = rows, batch_size, seed, lengths, 0

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        else:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = get_length_grouped_indices(self.lengths, self.batch_size, generator=draw)
        for first in range(0, self.rows, self.batch_size):
            yield distributed.share(order[first : first + self.batch_size])


class _Average(TrainerCallback):
    """Exponential moving average of the weights, saved with every checkpoint."""

    FILE = "average.safetensors"

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.to(args.device)
        if state.global_step:
            load_model(self.model, checkpoint.of_step(args.output_dir, state.global_step) / self.FILE)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model.update_parameters(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.first():
            save_model(self.model, str(checkpoint.of_step(args.output_dir, state.global_step) / self.FILE))


class _AllocateRanks(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuning.allocate_ranks(model, state.global_step)


class _Epochs(TrainerCallback):
    """Asks after each epoch whether to continue, before that step's checkpoint, so a resumed run does not skip it."""

    def __init__(self, steps: int, ask: AfterEpoch, average: _Average | None):
        self.steps, self.ask, self.average = steps, ask, average

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            model = self.average.model.module if self.average else model
            if not distributed.broadcast_flag(distributed.first() and self.ask(model, state.global_step)):
                control.should_training_stop = True


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete once the Trainer has written all of it, in every process."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.wait()
        if distributed.first():
            (checkpoint.of_step(args.output_dir, state.global_step) / checkpoint.COMPLETE).touch()


class _StopOnNaN(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise UserError(
                f"the loss is {loss} at step {state.global_step}; lower the stage's learning_rate "
                f"(the last whole checkpoint is kept in {args.output_dir})"
            )


class _Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere, such as in the logs of a flow, a line every ten seconds."""

    def __init__(self, title: str, steps: int, log: Log | None):
        self.title, self.steps, self.log = title, steps, log
        self.loss = ""  # until a loss is logged
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
                f"{self.title}: step {state.global_step}/{self.steps}, {self.loss}"
                f"{pace * (self.steps - state.global_step):.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.loss = f"loss {loss:.3f}, "
            if self.bar is not None:
                self.bar.set_postfix(loss=f"{loss:.3f}")
            if self.log:
                self.log({"loss": loss}, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
