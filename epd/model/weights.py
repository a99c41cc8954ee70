"""Tensors of a checkpoint by name: which a role needs, memory-mapped from safetensors or drawn at random.

A float32 tensor is a view of the mapped file, so that all processes of a host that serve the same checkpoint share its pages;
other float types are converted and are a process's own. Each role maps only the shards and reads only the tensors that it needs.
Does not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
import mmap
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from epd.errors import BadCheckpoint
from epd.model.config import ModelConfig, read_json
from epd.model.shapes import Shapes, text_shapes, vision_shapes

LoadFormat = Literal["safetensors", "dummy"]
Progress = Callable[[int, int], None]  # tensors loaded, tensors in all

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_MAX_HEADER_BYTES = 100 << 20
_JOIN_BYTES = 64 << 20
_NAMED = 8  # how many tensors an error lists


class Weights:
    """The tensors of one role. `tensor(name)` is float32, contiguous, and must not be written to."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, is_shared: bool) -> None:
        self._tensors = tensors
        self._joined: dict[tuple[str, ...], torch.Tensor] = {}
        self._lock = threading.Lock()
        self.is_shared = is_shared  # all of them are views of the mapped file

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def joined(self, names: Sequence[str]) -> torch.Tensor | None:
        """The tensors one below the other, which they are in memory from then on; None where that is not worth their pages.

        One product instead of three saves some microseconds, which show in a small model's steps and not in a large one's. Pages
        that several processes share are given up for it only where the whole is small.
        """
        if len(names) == 1:
            return self._tensors[names[0]]
        if self.is_shared and self.num_bytes > _JOIN_BYTES:
            return None
        with self._lock:
            key = tuple(names)
            if key not in self._joined:
                parts = [self._tensors[name] for name in names]
                self._joined[key] = torch.cat(parts)
                pieces = torch.split(self._joined[key], [len(part) for part in parts])
                self._tensors.update(zip(names, pieces, strict=True))
            return self._joined[key]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * 4 for tensor in self._tensors.values())


def load_text_weights(
    config: ModelConfig, folder: str | Path, load_format: LoadFormat = "safetensors", *, progress: Progress | None = None
) -> Weights:
    """What prefill and decode need. Raises BadCheckpoint naming missing, misshaped and unexpected tensors."""
    return _load(config, folder, text_shapes(config), load_format, progress)


def load_vision_weights(
    config: ModelConfig, folder: str | Path, load_format: LoadFormat = "safetensors", *, progress: Progress | None = None
) -> Weights:
    """What encode needs. Raises BadCheckpoint as above, and for a model that has no vision tower."""
    if config.vision is None:
        raise BadCheckpoint(f"{folder}: {config.architecture} has no vision tower to encode images with")
    return _load(config, folder, vision_shapes(config.vision), load_format, progress)


def _load(config: ModelConfig, folder: str | Path, wanted: Shapes, load_format: LoadFormat, progress: Progress | None) -> Weights:
    if load_format == "dummy":
        return _draw(wanted, progress)
    known = text_shapes(config) | (vision_shapes(config.vision) if config.vision else {})
    ignored = {"lm_head.weight"} if config.text.tie_word_embeddings else set()
    checkpoint = _Checkpoint(Path(folder))
    unexpected = sorted(
        name for name in checkpoint.names if name not in known and name not in ignored and not name.endswith("inv_freq")
    )
    missing = sorted(name for name in wanted if name not in checkpoint.names)
    entries = {name: checkpoint.entry(name) for name in wanted if name in checkpoint.names}
    misshaped = [
        f"{name} is {list(entry.shape)}, not {list(wanted[name])}"
        for name, entry in entries.items()
        if entry.shape != wanted[name]
    ]
    faults = [
        f"{kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("misshaped", misshaped), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise BadCheckpoint(f"{folder} does not hold the tensors that its config.json calls for; " + "; ".join(faults))
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        tensors[name] = entry.read()
        if progress:
            progress(len(tensors), len(entries))
    return Weights(tensors, is_shared=all(entry.dtype == torch.float32 for entry in entries.values()))


def _draw(wanted: Shapes, progress: Progress | None) -> Weights:
    """Random weights that are a function of name and shape: every worker draws the same."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in wanted.items():
        if "norm" in name and name.endswith("weight"):
            tensors[name] = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensors[name] = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        if progress:
            progress(len(tensors), len(wanted))
    return Weights(tensors, is_shared=False)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in a mapped shard."""

    mapped: mmap.mmap
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        tensor = torch.frombuffer(self.mapped, dtype=self.dtype, count=math.prod(self.shape), offset=self.offset)
        return tensor.view(self.shape).to(torch.float32)  # no copy where it is float32 already


class _Checkpoint:
    """The safetensors of a folder: one file, or shards behind an index. Maps a shard when its first tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, Mapping[str, _Entry]] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
                raise BadCheckpoint(f"{index} has no weight_map of tensor names to files beside it")
            self._shard_of: dict[str, str] = shards
        elif (folder / "model.safetensors").exists():
            self._shard_of = dict.fromkeys(self._shard("model.safetensors"), "model.safetensors")
        else:
            raise BadCheckpoint(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json; --load-format dummy needs none"
            )

    @property
    def names(self) -> Mapping[str, str]:
        return self._shard_of

    def entry(self, name: str) -> _Entry:
        shard = self._shard_of[name]
        try:
            return self._shard(shard)[name]
        except KeyError:
            raise BadCheckpoint(f"{self._folder / shard} does not hold {name}, which the index says it does") from None

    def _shard(self, name: str) -> Mapping[str, _Entry]:
        if name not in self._shards:
            self._shards[name] = _map_shard(self._folder / name)
        return self._shards[name]


def _map_shard(path: Path) -> Mapping[str, _Entry]:
    """The tensors of one file: 8 bytes of header length, a JSON header, the data. https://github.com/huggingface/safetensors"""
    try:
        with path.open("rb") as file:
            # Copy on write, since torch wants memory that could be written; nobody does, so the pages stay the file's.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be mapped: {error}") from error
    header_bytes = int.from_bytes(mapped[:8], "little")
    start = 8 + header_bytes
    if len(mapped) < 8 or header_bytes > _MAX_HEADER_BYTES or start > len(mapped):
        raise BadCheckpoint(f"{path} is no safetensors file, or is cut off in its header ({len(mapped)} bytes)")
    try:
        header = json.loads(mapped[8:start])
        return {name: _entry(mapped, start, path, name, fields) for name, fields in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path} has a broken safetensors header: {error}") from error


def _entry(mapped: mmap.mmap, start: int, path: Path, name: str, fields: dict[str, object]) -> _Entry:
    dtype = _DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise BadCheckpoint(f"{path}: {name} is {fields['dtype']}; only {', '.join(_DTYPES)} are supported")
    shape = tuple(int(n) for n in fields["shape"])  # type: ignore[attr-defined]
    begin, end = (int(n) for n in fields["data_offsets"])  # type: ignore[attr-defined]
    num_bytes = math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end or end - begin != num_bytes:
        raise BadCheckpoint(f"{path}: {name} has {end - begin} bytes of data for a shape that takes {num_bytes}")
    if start + end > len(mapped):
        raise BadCheckpoint(f"{path} is cut off: {name} ends at byte {start + end} of {len(mapped)}")
    return _Entry(mapped, start + begin, dtype, shape)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
