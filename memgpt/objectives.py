"""The losses of pretraining: next tokens, masked tokens, or a mix of both, on rows of packed documents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from memgpt import distributed
from memgpt.config import Pretrain
from memgpt.model import MemGPTForCausalLM, MemGPTModel, kernels
from memgpt.model.memory import find_readers, look_up
from memgpt.model.unpadded import in_one_row

KEPT, RANDOM = 0.1, 0.1  # shares of the chosen tokens that stay unchanged, or become random (BERT, arXiv 1810.04805)
LOGITS = 8  # logits held at once in `fused_loss`, as a multiple of the hidden states; fewer would underuse a GPU


class Pretraining:
    """Causal and masked next-token prediction with one head (GPT-BERT, arXiv 2410.24159).

    A batch is read causally, or in both directions with `mask_fraction` of its tokens masked. The share of the latter
    steps moves from `masked_share_start` to `masked_share_end`. Either way the hidden state at position t predicts the
    token at t + 1. A step's random draws depend only on seed and step. So a resumed run draws the same, and so do
    several processes, each of which sees its share of a batch. For this they need `rows`, the data's number of rows.
    """

    def __init__(self, params: Pretrain, steps: int, vocab_size: int, mask_token_id: int, rows: int = 0):
        self.params, self.steps, self.rows = params, steps, rows
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.loss: Callable[..., torch.Tensor] | None = None
        self.ahead = _Ahead()

    def __call__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """Loss of a training step on input_ids and position_ids, both [B, T]. If these are on the CPU, they are copied
        to a GPU while it is busy with the previous step."""
        whole = getattr(model, "module", model)
        if self.loss is None:
            self.loss = self._prepare(whole, whole.device)
        draw = torch.Generator().manual_seed(self.params.seed * 1_000_003 + step)
        share = torch.lerp(
            torch.tensor(self.params.masked_share_start),
            torch.tensor(self.params.masked_share_end),
            step / max(1, self.steps - 1),
        )
        ids, positions = batch["input_ids"], batch["position_ids"]
        shown, labels = ids, ids
        mode: dict[str, Any] = {}
        if torch.rand((), generator=draw) < share:
            rows, fraction = self._rows(len(ids), step), self.params.mask_fraction
            shown, labels = mask(ids, positions, fraction, self.mask_token_id, self.vocab_size, draw, rows)
            mode = {"attention_mode": "bidirectional"}
        backbone = whole.base_model
        ours = isinstance(backbone, MemGPTModel)
        if ours and backbone.config._attn_implementation == "text_by_text":
            row = in_one_row(shown, positions)
            shown, positions = row.pop("input_ids"), row.pop("position_ids")
            mode |= row
            labels = torch.cat((torch.full_like(labels[:, :1], -100), labels[:, 1:]), dim=1).view(1, -1)
        with self.ahead(whole.device, ids) as bring:
            shown, labels, positions = bring(shown), bring(labels), bring(positions)
            mode = {name: bring(value) for name, value in mode.items()}
            looks_up = ours and backbone.memory_table is not None and (self.params.compile or shown.is_cuda)
            if looks_up:
                addresses = bring(backbone.ngram_hash(shown, positions))
                readers = bring(find_readers(backbone.memory_table, addresses))
        if looks_up:  # before the compiled step, which receives the entry as an input
            mode["memory_entry"] = look_up(backbone.memory_table, addresses, readers)
        return self.loss(model, shown, positions, labels, self.params.z_loss, _count(labels), **mode)

    def _prepare(self, whole: PreTrainedModel, device: torch.device) -> Callable[..., torch.Tensor]:
        """The loss, compiled if `compile` is set. On a GPU, our model is compiled block by block: blocks of a kind
        share code, so this takes a sixth of the time (9 s for preset `base` on an H100), and the code around them has
        its own kernels. From Ampere on, its attention runs document by document, without a mask over whole rows."""
        if device.type == "cuda" and isinstance(whole, MemGPTForCausalLM):
            if torch.cuda.get_device_capability(device) >= (8, 0):
                whole.set_attn_implementation("text_by_text")
            if self.params.compile:
                parts = [whole.model.ngram_hash, whole.model.recall, *whole.model.layers]
                if whole.model.recall is not None:
                    parts.append(whole.model.recall.look_back)
                for part in filter(None, parts):
                    part.compile(dynamic=False)
        elif self.params.compile:
            return torch.compile(next_token_loss, dynamic=False)
        return next_token_loss

    def _rows(self, own: int, step: int) -> int:
        """Rows of this step's batch in all processes together; the last batch of an epoch may be smaller."""
        if distributed.processes() == 1:
            return own
        size = self.params.batch_size
        return min(size, self.rows - step % -(-self.rows // size) * size)


class _Ahead:
    """Runs what does not depend on the previous step on a separate CUDA stream. The host has to wait for the number of
    rows that a step looks up. On the main stream it would wait for all queued work, and then launch its kernels late,
    which costs a twentieth of a step of preset `base` on an H100."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def __call__(self, device: torch.device, given: torch.Tensor) -> Iterator[Callable[[Any], Any]]:
        """Yields a function that moves a tensor, or a tuple of them, to the device for use on the main stream, and
        returns other values unchanged. given: the input; if on the device, the main stream may still be writing it."""
        if device.type != "cuda":
            yield lambda value: value
            return
        main = torch.cuda.current_stream(device)
        self.stream = self.stream or torch.cuda.Stream(device)
        if given.is_cuda:
            self.stream.wait_stream(main)

        def bring(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(bring, value))
            if isinstance(value, torch.Tensor):
                value = value if value.is_cuda else value.contiguous().pin_memory().to(device, non_blocking=True)
                value.record_stream(main)  # so that its memory is not reused before the main stream has read it
            return value

        with torch.cuda.stream(self.stream):
            yield bring
        main.wait_stream(self.stream)


def _count(labels: torch.Tensor) -> torch.Tensor | None:
    """The number of predictions to divide a loss by, averaged over the processes; None if there is only one process."""
    if distributed.processes() == 1:
        return None
    return distributed.mean((labels[:, 1:] != -100).sum()).clamp(min=1 / distributed.processes())


def next_token_loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    count: torch.Tensor | None = None,
    **mode: Any,
) -> torch.Tensor:
    """Mean of −log p(labels[t + 1] | hidden[t]) over labels [B, T] other than −100, plus `z_loss` · (log Z)², which
    keeps the logits' normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5). count: the number to divide the sum by;
    by default that of these labels."""
    targets = labels[:, 1:]
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **mode}
    if _fuses(model, input_ids):
        total = model(**inputs, head_loss=partial(fused_loss, targets=targets, z_loss=z_loss)).loss
        return total / ((targets != -100).sum().clamp(min=1) if count is None else count)
    logits = model(**inputs).logits[:, :-1].float()
    log_z = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != -100
    losses = log_z - chosen + z_loss * log_z.square()
    return losses.where(counted, 0.0).sum() / (counted.sum().clamp(min=1) if count is None else count)


def _fuses(model: torch.nn.Module, input_ids: torch.Tensor) -> bool:
    return kernels.LIGER and input_ids.is_cuda and isinstance(getattr(model, "module", model), MemGPTForCausalLM)


@torch.compiler.disable  # it waits for the device to count targets
def fused_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The sum that `next_token_loss` divides, for hidden [B, T, D], weight [V, D] and targets [B, T − 1]. It is Liger's
    fused linear cross-entropy (arXiv 2410.10989), which holds the logits of only a part of the tokens at once."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    shifted = torch.nn.functional.pad(targets, (0, 1), value=-100).flatten()
    return liger_fused_linear_cross_entropy(
        hidden.flatten(0, 1), weight, shifted, lse_square_scale=z_loss, reduction="sum", chunk_mem_const=LOGITS
    )


def mask(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    fraction: float,
    mask_token_id: int,
    vocab_size: int,
    draw: torch.Generator,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [B, T] → (corrupted input_ids, labels). `fraction` of the tokens are chosen, never a document's first.

    rows: number of rows of the whole batch, if input_ids is only this process's share."""
    device, shape = input_ids.device, (rows or len(input_ids), input_ids.shape[1])
    chance = distributed.share(torch.rand(shape, generator=draw)).to(device)
    fate = distributed.share(torch.rand(shape, generator=draw)).to(device)
    other = distributed.share(torch.randint(vocab_size, shape, generator=draw)).to(device)
    hidden = (chance < fraction) & (position_ids > 0)
    shown = input_ids.masked_fill(hidden & (fate >= KEPT + RANDOM), mask_token_id)
    shown = torch.where(hidden & (fate < RANDOM), other, shown)
    return shown, input_ids.masked_fill(~hidden, -100)
