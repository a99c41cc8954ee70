"""The safetensors files of a checkpoint: which tensors are where in them, checked before anything is read.

Knows the file format and its index. Does not know which tensors a model has or what becomes of them.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epd.errors import BadCheckpoint
from epd.model.config import read_json

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_MAX_HEADER_BYTES = 100 << 20


class Checkpoint:
    """The safetensors of a folder: one file, or shards behind an index. Maps a shard when its first tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, Mapping[str, Entry]] = {}
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

    def entry(self, name: str) -> Entry:
        shard = self._shard_of[name]
        try:
            return self._shard(shard)[name]
        except KeyError:
            raise BadCheckpoint(f"{self._folder / shard} does not hold {name}, which the index says it does") from None

    def _shard(self, name: str) -> Mapping[str, Entry]:
        if name not in self._shards:
            self._shards[name] = _map_shard(self._folder / name)
        return self._shards[name]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a mapped shard: `offset` bytes into the file, in C order."""

    path: Path
    mapped: mmap.mmap
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """As float32 on the host: a view of the mapped file where it is float32 there."""
        tensor = torch.frombuffer(self.mapped, dtype=self.dtype, count=math.prod(self.shape), offset=self.offset)
        return tensor.view(self.shape).to(torch.float32)


def _map_shard(path: Path) -> Mapping[str, Entry]:
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


def _entry(mapped: mmap.mmap, start: int, path: Path, name: str, fields: dict[str, Any]) -> Entry:
    dtype = _DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise BadCheckpoint(f"{path}: {name} is {fields['dtype']}; only {', '.join(_DTYPES)} are supported")
    shape = tuple(int(n) for n in fields["shape"])
    begin, end = (int(n) for n in fields["data_offsets"])
    num_bytes = math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end or end - begin != num_bytes:
        raise BadCheckpoint(f"{path}: {name} has {end - begin} bytes of data for a shape that takes {num_bytes}")
    if start + end > len(mapped):
        raise BadCheckpoint(f"{path} is cut off: {name} ends at byte {start + end} of {len(mapped)}")
    return Entry(path, mapped, start + begin, dtype, shape)
