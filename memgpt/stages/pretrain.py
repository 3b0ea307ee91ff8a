"""pretrain: train the core, including its memory, to predict the next token of the corpus. Writes models/base."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from memgpt import atomic, checkpoint, distributed, environment, lineage
from memgpt.config import Config, Pretrain
from memgpt.errors import UserError, existing
from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM, canonical_ids
from memgpt.model.kernels import float8
from memgpt.model.update import USAGE_FILE, choose_rows, count_rows, load_usage, restrict_to_memory, save_usage
from memgpt.objectives import Pretraining
from memgpt.optimizers import for_pretraining
from memgpt.training import Log, train

VALIDATION_ROWS = 512  # for the held-out loss; more would not change its third digit

TOKENIZER, TOKENS, BASE = Path("models/tokenizer"), Path("data/tokens"), Path("models/base")


def positions(starts: np.ndarray, first: int, count: int) -> np.ndarray:
    """Position ids of a row of `count` tokens, from token `first` of a split on; they restart at 0 with each document.
    starts: index of each document's first token."""
    where = np.arange(first, first + count)
    document = starts[np.searchsorted(starts, where, side="right") - 1]
    return where - np.maximum(document, first)


class PackedTokens(Dataset):
    """Rows of `length` tokens cut from a split of data/tokens.

    position_ids restart at 0 with each document, so that attention and n-grams stay within it. Every document starts
    with the end token, so the last token of the one before it learns to predict the end.
    """

    def __init__(self, directory: Path, split: str, length: int):
        self.ids = np.load(directory / f"{split}.npy", mmap_mode="r")
        self.starts = np.load(directory / f"{split}_starts.npy")
        self.length = length
        if len(self) == 0:
            raise UserError(
                f"{directory}/{split}.npy: holds {len(self.ids)} tokens, fewer than one row of "
                f"pretrain.sequence_length={length}; give a larger corpus or a smaller sequence_length"
            )

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        first = row * self.length
        ids = torch.from_numpy(self.ids[first : first + self.length].astype(np.int64))
        return {
            "input_ids": ids,
            "position_ids": torch.from_numpy(positions(self.starts, first, self.length)),
            "labels": ids,
        }


def budget(rows: int, params: Pretrain) -> tuple[int, int]:
    """(steps, tokens): how many steps read at most `pretrain.tokens` of a split of `rows` rows, but at least one step,
    and how many tokens they read. The last batch of an epoch may be smaller."""
    epochs, rest = divmod(params.tokens // params.sequence_length, rows)
    batches = rest // params.batch_size
    if not epochs + batches:
        return 1, min(params.batch_size, rows) * params.sequence_length
    steps = epochs * -(-rows // params.batch_size) + batches
    return steps, (epochs * rows + batches * params.batch_size) * params.sequence_length


def _all(data: Dataset, what: str) -> Iterable[dict[str, torch.Tensor]]:
    """All rows of the data once, in batches, with a progress bar on a terminal."""
    batches = DataLoader(data, batch_size=64)
    return tqdm(batches, desc=what, unit="batch", leave=False, disable=True if environment.rank() else None)


def run(config: Config, log: Log | None = None) -> dict[str, float]:
    params = config.pretrain
    tokenizer = AutoTokenizer.from_pretrained(existing(TOKENIZER))
    data = PackedTokens(TOKENS, "train", params.sequence_length)
    held_out = PackedTokens(TOKENS, "validation", params.sequence_length)
    steps, tokens = budget(len(data), params)
    set_seed(params.seed)
    model = _initial_model(config, tokenizer)
    parent = Path(params.init) if params.init and Path(params.init).is_dir() else None
    stored, memory_table = model.num_parameters(), model.model.memory_table
    table = 0 if memory_table is None else memory_table.weight.numel()
    size = f"{(stored - table) / 1e6:.1f} M active parameters, {table / 1e6:.1f} M in the memory table"
    distributed.print_once(f"pretrain: {params.init or params.preset}, {size}")
    if memory_table is not None and params.memory_least:
        learned = memory_table.weight.any(dim=1)
        model.model.ngram_hash.claim(_all(data, "count n-grams"), params.memory_least, learned)
    usage = count_rows(model, _all(data, "count reads")) if table else None
    if params.update == "memory":
        _update_memory_only(model, usage, params)
    inputs = [TOKENIZER, TOKENS, *([parent] if parent else [])]
    checkpoints = checkpoint.directory("pretrain", params.model_dump(), inputs)
    if params.activation_checkpointing:
        model.activation_checkpointing_enable()
    with _products(model, params):
        train(
            model,
            data,
            default_collate,
            params,
            steps=steps,
            checkpoints=checkpoints,
            title="pretrain",
            optimizer=for_pretraining(model, params),
            loss=Pretraining(params, steps, len(tokenizer), tokenizer.mask_token_id, len(data)),
            log=log,
            divide_tables=params.update == "all",  # the rows to update are numbered by the whole table
        )
    if not distributed.first():
        return {}
    loss = held_out_loss(model, Subset(held_out, range(min(len(held_out), VALIDATION_ROWS))), params.batch_size)
    metrics = {
        "validation_loss": round(loss, 6),
        "validation_perplexity": round(math.exp(loss), 4),
        "tokens_seen": tokens,
        "parameters": stored,
        "memory_parameters": table,
    }
    with atomic.replacing(BASE) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if usage is not None:
            known = parent is not None and (parent / USAGE_FILE).exists()
            save_usage(usage + load_usage(parent) if known and parent else usage, directory)
        lineage.write(directory, "pretrain", inputs, params.model_dump(), parent, params.seed, metrics)
    checkpoint.discard(checkpoints)
    return metrics


def _products(model: MemGPTForCausalLM, params: Pretrain) -> AbstractContextManager[None]:
    """A context in which training multiplies in 8 bits, if `pretrain.float8` is set and the GPU supports it.

    UserError if only torchao is missing for that.
    """
    if not params.float8:
        return nullcontext()
    if not float8.available():
        distributed.print_once(
            "pretrain.float8: no GPU that multiplies in 8 bits (Ada, Hopper or later); training without"
        )
        return nullcontext()
    if find_spec("torchao") is None:
        raise UserError(
            "pretrain.float8 needs torchao; pip install -e '.[float8]' in the checkout, or set pretrain.float8=false"
        )
    return float8.products(model)


@torch.no_grad()
def held_out_loss(model: MemGPTForCausalLM, data: Dataset, batch_size: int) -> float:
    """Mean negative log-likelihood per predicted token, in nats."""
    total = count = 0.0
    for batch in DataLoader(data, batch_size=batch_size):
        predicted = batch["labels"].numel() - len(batch["labels"])
        total += model(**batch).loss.item() * predicted
        count += predicted
    return total / count


def _initial_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> MemGPTForCausalLM:
    params = config.pretrain
    if params.init is None:
        shape = PRESETS[params.preset]
        if params.memory_rows:
            shape = {**shape, "memory_rows": params.memory_rows}
        model = MemGPTForCausalLM(
            MemGPTConfig(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                mask_token_id=tokenizer.mask_token_id,
                **shape,
            )
        )
        model.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer))
        return model
    try:
        config_there = AutoConfig.from_pretrained(params.init)
        if config_there.model_type != MemGPTConfig.model_type:
            raise UserError(
                f"pretrain.init={params.init}: a {config_there.model_type} model, of which no weight fits; "
                "take it over with `memgpt convert`, or start from a directory that a stage made"
            )
        model = MemGPTForCausalLM.from_pretrained(params.init, task_labels=None, prefix_length=0, dtype=torch.float32)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"pretrain.init={params.init}: {str(error).strip().splitlines()[0]}") from None
    if model.config.vocab_size < len(tokenizer):  # a larger vocabulary than the tokenizer's is padding
        raise UserError(
            f"pretrain.init={params.init}: its vocabulary has {model.config.vocab_size} entries and its tokenizer "
            f"{len(tokenizer)}; start from a directory whose tokenizer belongs to the model"
        )
    return model


def _update_memory_only(model: MemGPTForCausalLM, usage: torch.Tensor | None, params: Pretrain) -> None:
    if usage is None:
        raise UserError(f"pretrain.update=memory: {params.init} has no memory to update")
    try:
        rows = choose_rows(usage, load_usage(str(params.init)), params.update_share)
    except ValueError as error:
        raise UserError(f"pretrain.init={params.init}: {error}") from None
    restrict_to_memory(model, rows)
    distributed.print_once(f"pretrain: updating {int(rows.sum())} of {len(rows)} rows of the memory table")
