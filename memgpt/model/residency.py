"""Where the rows of the memory table are stored during inference. Applied to a trained model.

    resident   in the process, as trained; the only option for training
    mapped     in the safetensors file; however much is looked up, the process holds at most a fixed part of it
    int8       in the process or on the device, one byte per element and a scale per row
    host       in host memory beside an accelerator, prefetched before the forward pass

"mapped" and "host" give exactly the logits of "resident". "int8" changes an element of a row by at most 1/254 of the
row's largest one. An address depends only on token ids (arXiv 2601.07372), so a row can be fetched before the layer
that reads it runs.
"""

import copy
import json
import mmap
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from memgpt.model.memory import NGramHash, make_table

Residency = Literal["resident", "mapped", "int8", "host"]

_NAME = re.compile(r"(?:^|\.)memory_table\.weight$")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
_SCALE_BYTES = 4
_BLOCK = 16  # log2 of bytes: the system maps up to 64 KiB around a touched page
_COPIED_BYTES = 1 << 24  # per step when a table is converted
_HELD_SHARE = 16  # by default, 1/16 of a mapped table may stay in the process


def quantise(x: torch.Tensor) -> torch.Tensor:
    """x [..., M] → int8 [..., M + 4]: x / scale rounded, then the bytes of the scale, max |x| / 127, as float32.

    An element is off by at most max |x| / 254. Values and scale are stored together, so that one look-up reads both.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    values = (x / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round().to(torch.int8)
    return torch.cat((values, scale.contiguous().view(torch.int8)), dim=-1)


def dequantise(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantise`, up to rounding: int8 [..., M + 4] → [..., M]."""
    scale = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (packed[..., :-_SCALE_BYTES] * scale).to(dtype)


def _decoded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantise(rows, dtype) if rows.dtype == torch.int8 else rows.to(dtype)


# --- the file


class _File:
    """A safetensors file, of whose memory mapping at most `held` bytes stay in the process.

    The blocks touched first, which for text are those of frequent n-grams, are read through the mapping until `held` is
    used up. All other rows are copied with pread, which bypasses the mapping. Dropping mapped pages instead would cost
    a page fault per row again.

    Raises:
        ValueError: in one line, if the file is truncated or is no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._handle = path.open("rb")
            self.start = 8 + int.from_bytes(self._handle.read(8), "little")
            size = path.stat().st_size
            self.tensors: dict[str, dict[str, Any]] = (
                json.loads(self._handle.read(self.start - 8)) if self.start <= size else {}
            )
            self.tensors.pop("__metadata__", None)
            whole = self.start + max(entry["data_offsets"][1] for entry in self.tensors.values()) == size
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; fetch or save the model again") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: not a whole safetensors file; fetch or save the model again")
        self._bytes: np.ndarray | None = None

    def pread(self, start: int, size: int) -> bytes:
        found = os.pread(self._handle.fileno(), size, start)
        if len(found) != size:
            raise ValueError(f"{self.path}: was cut off while it was in use")
        return found

    def map(self, held: int) -> None:
        mapping = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM)  # no read-ahead, because the next row is elsewhere
        self._bytes = np.frombuffer(mapping, np.uint8)
        # Blocks are counted by memory address, by which the system aligns what it maps around a touched page.
        self._shift = self._bytes.ctypes.data & ((1 << _BLOCK) - 1)
        self._mapped = np.zeros(((self._shift + len(self._bytes)) >> _BLOCK) + 1, bool)
        self._room = held >> _BLOCK

    def gather(self, start: int, rows: np.ndarray, width: int) -> np.ndarray:
        """The bytes [n, width] of rows [n] of a tensor that starts at `start`."""
        assert self._bytes is not None
        starts = start + rows * width
        first, last = (self._shift + starts) >> _BLOCK, (self._shift + starts + width - 1) >> _BLOCK
        new = ~(self._mapped[first] & self._mapped[last])
        if new.any():
            # Let the system fetch all rows at once, rather than one after another as they are read.
            if hasattr(os, "posix_fadvise"):
                for offset in starts[new].tolist():
                    os.posix_fadvise(self._handle.fileno(), offset, width, os.POSIX_FADV_WILLNEED)
            if self._room:
                blocks = np.unique(np.concatenate((first[new], last[new])))
                blocks = blocks[~self._mapped[blocks]][: self._room]
                self._mapped[blocks] = True
                self._room -= len(blocks)
                new = ~(self._mapped[first] & self._mapped[last])
        answer = np.empty((len(rows), width), np.uint8)
        near = ~new
        answer[near] = np.lib.stride_tricks.as_strided(self._bytes[start:], (rows.max() + 1, width), (width, 1))[
            rows[near]
        ]
        if new.any():
            far = b"".join(self.pread(offset, width) for offset in starts[new].tolist())
            answer[new] = np.frombuffer(far, np.uint8).reshape(-1, width)
        return answer


class _Stored:
    """A table in a file, read by slices of rows."""

    def __init__(self, file: _File, name: str):
        entry = file.tensors[name]
        if entry["dtype"] not in _DTYPES or len(entry["shape"]) != 2:
            raise ValueError(f"{file.path}: {name} is no table: {entry['dtype']} {entry['shape']}")
        self.file, self.dtype = file, _DTYPES[entry["dtype"]]
        self.shape: tuple[int, int] = (entry["shape"][0], entry["shape"][1])
        self.width = self.shape[1] * self.dtype.itemsize
        self.start = file.start + entry["data_offsets"][0]
        if entry["data_offsets"][1] - entry["data_offsets"][0] != self.shape[0] * self.width:
            raise ValueError(f"{file.path}: {name} does not fill its place; fetch or save the model again")

    def __getitem__(self, rows: slice) -> torch.Tensor:
        size = (rows.stop - rows.start) * self.width
        found = bytearray(self.file.pread(self.start + rows.start * self.width, size))
        return torch.frombuffer(found, dtype=self.dtype).view(-1, self.shape[1])


def _stored(directory: Path) -> _Stored | None:
    """The table in a model directory, if it has one."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: not an index of weights; fetch or save the model again") from None
    elif (directory / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    else:
        raise ValueError(f"{directory}: has no {SAFE_WEIGHTS_NAME}: give the directory of a saved model")
    for file in [_File(directory / name) for name in names]:  # opens all files first, so any damaged one is reported
        for name in file.tensors:
            if _NAME.search(name):
                return _Stored(file, name)
    return None


# --- the tables, each a replacement for `MemGPTModel.memory_table`: addresses [...] → rows [..., M]


class _Table(nn.Module):
    kept: Residency

    def __init__(self, like: Any):
        """like: a module of the model, whose weight determines dtype and device."""
        super().__init__()
        self._like = (like,)  # in a tuple, so that it is not registered as a submodule
        self.training = False

    @property
    def like(self) -> torch.Tensor:
        """A parameter of the model. Rows are returned in its current dtype and on its current device."""
        return self._like[0].weight

    def train(self, mode: bool = True) -> "_Table":
        if mode:
            raise ValueError(
                f"memory={self.kept!r} is for inference: load the model with memory='resident' to train it"
            )
        return super().train(mode)


class MappedTable(_Table):
    kept = "mapped"

    def __init__(self, stored: _Stored, like: nn.Module):
        super().__init__(like)
        self.stored = stored

    @torch.compiler.disable  # reads a file
    def forward(self, addresses: torch.Tensor) -> torch.Tensor:
        stored, rows = self.stored, addresses.flatten().cpu().numpy()
        if not len(rows):
            return self.like.new_empty(*addresses.shape, stored.shape[1])
        found = torch.from_numpy(stored.file.gather(stored.start, rows, stored.width)).view(stored.dtype)
        return _decoded(found.to(self.like.device), self.like.dtype).unflatten(0, addresses.shape)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("memory='mapped' is not saved: the model directory that it was loaded from holds the table")


class Int8Table(_Table):
    """Saved and loaded as `weight`, int8 [rows, M + 4], whose shape a plain from_pretrained refuses."""

    kept = "int8"

    def __init__(self, weight: torch.Tensor, like: nn.Module):
        super().__init__(like)
        self.weight = nn.Buffer(weight)

    def forward(self, addresses: torch.Tensor) -> torch.Tensor:
        return dequantise(self.weight[addresses], self.like.dtype)


class HostTable(_Table):
    """Rows in host memory, pinned if CUDA is available; `prefetch` copies those of the next batch on a side stream."""

    kept = "host"

    def __init__(self, rows: torch.Tensor, like: nn.Module, ngram_hash: NGramHash):
        super().__init__(like)
        self.rows = rows  # neither parameter nor buffer, so that it stays behind when the model moves to a device
        self.ngram_hash = (ngram_hash,)
        self._stream: torch.cuda.Stream | None = None
        self._ahead: tuple[torch.Tensor, torch.Tensor] | None = None

    def prefetch(self, addresses: torch.Tensor) -> None:
        """Start to fetch the rows at addresses [...], a tensor on the host."""
        device = self.like.device
        rows = self._gather(addresses)
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._ahead = (addresses.to(device, non_blocking=True), rows.to(device, non_blocking=True))
        else:
            self._ahead = (addresses.to(device), rows.to(device))

    def _gather(self, addresses: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(
            *addresses.shape, self.rows.shape[1], dtype=self.rows.dtype, pin_memory=self.rows.is_pinned()
        )
        return torch.index_select(self.rows, 0, addresses.flatten(), out=rows.view(-1, self.rows.shape[1])).view_as(
            rows
        )

    @torch.compiler.disable  # the prefetched rows change from call to call
    def forward(self, addresses: torch.Tensor) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self._stream is not None:
            current = torch.cuda.current_stream(self.like.device)
            current.wait_stream(self._stream)
            for tensor in ahead:
                tensor.record_stream(current)
        if ahead is not None and torch.equal(ahead[0], addresses):
            return _decoded(ahead[1], self.like.dtype)
        return _decoded(self._gather(addresses.cpu()).to(self.like.device), self.like.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.rows


# --- the public functions


def load(
    cls: type[PreTrainedModel],
    directory: Path | str,
    memory: Residency = "resident",
    *,
    held_bytes: int | None = None,
    **kwargs: Any,
) -> Any:
    """`cls.from_pretrained(directory, **kwargs)`, with the memory table stored as `memory` says.

    Unless "resident", the process never holds the whole table as floats. A directory saved with an int8 table can be
    loaded in every way; "mapped" and "host" then keep its int8 rows. held_bytes: how much of a mapped table may stay in
    the process; None is a sixteenth.

    Raises:
        ValueError: in one line, if a file is damaged, lacks the table or has one of another shape.
    """
    _check_residency(memory)
    stored = _stored(Path(directory))
    if memory == "resident" and (stored is None or stored.dtype != torch.int8):
        return cls.from_pretrained(directory, **kwargs)

    def hollow(self: Any, config: Any, *args: Any, **more: Any) -> None:
        # from_pretrained creates the model on "meta", so the table that is replaced here never used memory.
        cls.__init__(self, config, *args, **more)
        if self.base_model.memory_table is not None:
            found = [*self.base_model.memory_table.weight.shape]
            if stored is None:
                raise ValueError(f"{directory}: the memory table is missing; fetch or save the model again")
            if [*stored.shape] != [found[0], found[1] + _SCALE_BYTES * (stored.dtype == torch.int8)]:
                raise ValueError(
                    f"{directory}: the memory table has shape {[*stored.shape]}, the configuration asks for {found}"
                )
            self.base_model.memory_table = nn.Identity()

    members = {"__init__": hollow, "__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [_NAME.pattern]}
    hollow_class: Any = type(cls.__name__, (cls,), members)
    model = hollow_class.from_pretrained(directory, **kwargs)
    model.__class__ = cls
    if stored is None or model.base_model.memory_table is None:
        return model
    if memory == "mapped":
        size = stored.shape[0] * stored.width
        stored.file.map(size // _HELD_SHARE if held_bytes is None else held_bytes)
    model.base_model.memory_table = _kept(memory, stored, model.base_model)
    return model


def place(model: PreTrainedModel, memory: Residency) -> PreTrainedModel:
    """Change how the table of a loaded model is stored, in place; the model is then in evaluation mode.

    Raises:
        ValueError: for "mapped", unless it already is, because a table in memory has no file.
    """
    _check_residency(memory)
    table: Any = model.base_model.memory_table
    kept = getattr(table, "kept", "resident")
    if table is not None and kept != memory:
        if memory == "mapped":
            raise ValueError("memory='mapped': save the model and load it from its directory")
        rows = {"mapped": "stored", "host": "rows"}.get(kept, "weight")
        model.base_model.memory_table = _kept(memory, getattr(table, rows), model.base_model)
    return model.eval()


def prefetch(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    context_ids: torch.Tensor | None = None,
) -> None:
    """Fetch the rows of the next batch while this one is computed, if the table is stored as "host"; else do nothing.

    Arguments as in the model's forward, on the host. If the next batch has other ids, the rows are not used.
    """
    table = model.base_model.memory_table
    if isinstance(table, HostTable):
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        table.prefetch(table.ngram_hash[0](input_ids, positions, context_ids))


def _check_residency(memory: str) -> None:
    if memory not in get_args(Residency):
        raise ValueError(f"memory={memory!r}: expected one of {', '.join(get_args(Residency))}")


@torch.no_grad()
def _kept(memory: Residency, rows: Any, model: Any) -> nn.Module:
    """A table, stored as `memory` says, from `rows`: a tensor or a `_Stored`. model: the backbone."""
    like, shape, dtype = model.norm.weight, tuple(rows.shape), rows.dtype
    if memory == "mapped":
        return MappedTable(rows, model.norm)
    width = shape[1] - _SCALE_BYTES * (dtype == torch.int8)
    if memory == "resident":
        with torch.device(like.device):
            table = make_table(model.config).to(like.dtype)
        _copy(rows, table.weight, lambda part: _decoded(part, like.dtype))
        return table
    if memory == "int8":
        packed = torch.empty(shape[0], width + _SCALE_BYTES, dtype=torch.int8, device=like.device)
        _copy(rows, packed, lambda part: part if dtype == torch.int8 else quantise(part))
        return Int8Table(packed, model.norm)
    host = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    _copy(rows, host, lambda part: part)
    return HostTable(host, model.norm, copy.deepcopy(model.ngram_hash).cpu())


def _copy(rows: Any, target: torch.Tensor, convert: Any) -> None:
    """Copy in parts, so that no second table of floats is created on the way."""
    step = max(1, _COPIED_BYTES // (rows.shape[1] * rows.dtype.itemsize))
    for start in range(0, rows.shape[0], step):
        stop = min(start + step, rows.shape[0])
        target[start:stop] = convert(rows[start:stop])
