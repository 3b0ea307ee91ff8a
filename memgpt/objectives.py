"""What pretraining minimises: next tokens, masked tokens, or both in turn, on rows of packed documents."""

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

KEPT, RANDOM = 0.1, 0.1  # of the chosen tokens, these stay as they are or become any other (BERT, arXiv 1810.04805)
LOGITS = 8  # at once in `fused_loss`, times the size of the hidden states: with fewer, a GPU has too little to do


class Pretraining:
    """Causal and masked next-token prediction with one head (GPT-BERT, arXiv 2410.24159).

    A batch is read causally, or, in a share of the steps that moves from `masked_share_start` to `masked_share_end`, in
    both directions with `mask_fraction` of its tokens hidden. Either way the hidden state at position t predicts the
    token at t + 1. What a step draws depends on seed and step alone, so that a resumed run draws the same, and so do
    several processes together, of which each sees its share of a batch: they are told how many rows the data have.
    """

    def __init__(self, params: Pretrain, steps: int, vocab_size: int, mask_token_id: int, rows: int = 0):
        self.params, self.steps, self.rows = params, steps, rows
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.loss: Callable[..., torch.Tensor] | None = None
        self.ahead = _Ahead()

    def __call__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """Loss of a training step on input_ids and position_ids, both [B, T], as the data give them: on the CPU. Then a
        GPU gets them while it is busy with the step before."""
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
        if looks_up:  # before a compiled step, which takes it as it is
            mode["memory_entry"] = look_up(backbone.memory_table, addresses, readers)
        return self.loss(model, shown, positions, labels, self.params.z_loss, _count(labels), **mode)

    def _prepare(self, whole: PreTrainedModel, device: torch.device) -> Callable[..., torch.Tensor]:
        """The loss, compiled if that is asked for. On a GPU, attention goes document by document, in place of a mask
        over whole rows, and our model is compiled block by block: blocks of a kind share their code, which so is ready
        in a sixth of the time (9 s at preset `base` on an H100), and what surrounds them has kernels of its own."""
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
        """Of this step's batch in all processes; an epoch's last one may be smaller."""
        if distributed.processes() == 1:
            return own
        size = self.params.batch_size
        return min(size, self.rows - step % -(-self.rows // size) * size)


class _Ahead:
    """What does not depend on the step before is done on a stream of its own. Else the host, which has to wait for the
    number of rows that a step looks up, waits for all that the device still has to do, and is late from then on: a
    twentieth of a step of preset `base` on an H100."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def __call__(self, device: torch.device, given: torch.Tensor) -> Iterator[Callable[[Any], Any]]:
        """Gives a function that brings a tensor, or a tuple of them, to the device and keeps it for what comes after;
        all else it leaves. given: what the work begins with; if it is on the device, it may be of the step before."""
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
                value.record_stream(main)  # so that its memory is not given away before it was read there
            return value

        with torch.cuda.stream(self.stream):
            yield bring
        main.wait_stream(self.stream)


def _count(labels: torch.Tensor) -> torch.Tensor | None:
    """How many predictions a loss is the mean of, if that is not for this process alone to say."""
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
    keeps the logits' normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5). count: divides the sum in place of the
    labels' own number."""
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


@torch.compiler.disable  # it waits for the device, to count targets
def fused_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The sum that `next_token_loss` divides, for hidden [B, T, D], weight [V, D] and targets [B, T − 1], without the
    logits of more than a part of the tokens at once: Liger's fused linear cross-entropy (arXiv 2410.10989)."""
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
    """input_ids [B, T] → (what is shown, labels): `fraction` of the tokens hidden, never a document's first.

    rows: of the whole batch, if input_ids is this process's share of it."""
    device, shape = input_ids.device, (rows or len(input_ids), input_ids.shape[1])
    chance = distributed.share(torch.rand(shape, generator=draw)).to(device)
    fate = distributed.share(torch.rand(shape, generator=draw)).to(device)
    other = distributed.share(torch.randint(vocab_size, shape, generator=draw)).to(device)
    hidden = (chance < fraction) & (position_ids > 0)
    shown = input_ids.masked_fill(hidden & (fate >= KEPT + RANDOM), mask_token_id)
    shown = torch.where(hidden & (fate < RANDOM), other, shown)
    return shown, input_ids.masked_fill(~hidden, -100)
