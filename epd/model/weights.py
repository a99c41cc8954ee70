"""Tensors of a checkpoint by name: which a role needs, mapped from safetensors, read onto a device, or drawn at random.

On the host a float32 tensor is a view of the mapped file, so that all processes of a host that serve the same checkpoint share
its pages; other float types are converted and are a process's own. On a device all tensors of a role lie in one allocation. Each
role maps only the shards and reads only the tensors that it needs. Does not know what the tensors are for.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from epd.errors import BadCheckpoint, BadConfig
from epd.model.checkpoint import Checkpoint, Entry
from epd.model.config import ModelConfig
from epd.model.shapes import Shapes, count_numbers, text_groups, text_shapes, vision_shapes
from epd.model.upload import upload

LoadFormat = Literal["safetensors", "dummy"]
Progress = Callable[[int, int], None]  # tensors loaded, tensors in all
Group = tuple[str, ...]  # names of tensors that are to lie one below the other

_JOIN_BYTES = 64 << 20
_NAMED = 8  # how many tensors an error lists
_ALIGNMENT = 256  # bytes, of each tensor or group on a device


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go and as what. The default is the host, mapped."""

    device: str = "cpu"  # as torch names it
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def is_mapped(self) -> bool:
        return self.device == "cpu" and self.dtype == "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16


class Weights:
    """The tensors of one role. `tensor(name)` is of the placement's dtype, contiguous, and must not be written to.

    On a device, packed experts are contiguous as the file has them, which may be [experts, in, out].
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        is_shared: bool,
        joined: Mapping[Group, torch.Tensor] | None = None,
    ) -> None:
        """`joined`: what lies one below the other already; its tensors are views of it."""
        self._tensors = tensors
        self._joined: dict[Group, torch.Tensor] = dict(joined or {})
        self._lock = threading.Lock()
        self.is_shared = is_shared  # all of them are views of the mapped file

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def joined(self, names: Sequence[str]) -> torch.Tensor | None:
        """The tensors one below the other, which they are in memory from then on; None where that is not worth their pages.

        One product instead of three saves some microseconds, which show in a small model's steps and not in a large one's. Pages
        that several processes share are given up for it only where the whole is small. On a device they were read that way.
        """
        if len(names) == 1:
            return self._tensors[names[0]]
        with self._lock:
            key = tuple(names)
            if key not in self._joined:
                if self.is_shared and self.num_bytes > _JOIN_BYTES:
                    return None
                parts = [self._tensors[name] for name in names]
                self._joined[key] = torch.cat(parts)
                pieces = torch.split(self._joined[key], [len(part) for part in parts])
                self._tensors.update(zip(names, pieces, strict=True))
            return self._joined[key]

    def with_turned(self, names: Iterable[str]) -> Weights:
        """The same, where tensors of these names [n, in, out] are seen as [n, out, in]."""
        turned = {name: self._tensors[name].transpose(1, 2) for name in names}
        return Weights(self._tensors | turned, is_shared=self.is_shared, joined=self._joined)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


def load_text_weights(
    config: ModelConfig,
    folder: str | Path,
    load_format: LoadFormat = "safetensors",
    *,
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> Weights:
    """What prefill and decode need. Raises BadCheckpoint naming missing, misshaped and unexpected tensors, BadConfig where the
    device has no room for them."""
    return _load(config, folder, text_shapes(config), text_groups(config), load_format, progress, placement or Placement())


def load_vision_weights(
    config: ModelConfig,
    folder: str | Path,
    load_format: LoadFormat = "safetensors",
    *,
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> Weights:
    """What encode needs. Raises as above, and BadCheckpoint for a model that has no vision tower."""
    if config.vision is None:
        raise BadCheckpoint(f"{folder}: {config.architecture} has no vision tower to encode images with")
    return _load(config, folder, vision_shapes(config.vision), [], load_format, progress, placement or Placement())


def _load(
    config: ModelConfig,
    folder: str | Path,
    wanted: Shapes,
    groups: Sequence[Group],
    load_format: LoadFormat,
    progress: Progress | None,
    placement: Placement,
) -> Weights:
    count = progress or (lambda done, total: None)
    if load_format == "dummy":
        return _draw(wanted, groups, count, placement)
    entries = _entries(config, Path(folder), wanted)
    turned = _turned(entries, wanted)
    if placement.is_mapped:
        tensors: dict[str, torch.Tensor] = {}
        for name, entry in entries.items():
            tensors[name] = entry.read().transpose(1, 2).contiguous() if name in turned else entry.read()
            count(len(tensors), len(entries))
        is_shared = not turned and all(entry.dtype == torch.float32 for entry in entries.values())
        return Weights(tensors, is_shared=is_shared)
    weights = _allocate({name: entry.shape for name, entry in entries.items()}, groups, placement)
    upload(entries, weights.tensor, count)
    return weights.with_turned(turned)


def _entries(config: ModelConfig, folder: Path, wanted: Shapes) -> dict[str, Entry]:
    """Where the tensors lie. Raises BadCheckpoint unless the folder holds what `config` calls for.

    Packed experts may be turned.
    """
    known = text_shapes(config) | (vision_shapes(config.vision) if config.vision else {})
    ignored = {"lm_head.weight"} if config.text.tie_word_embeddings else set()
    checkpoint = Checkpoint(folder)
    unexpected = sorted(
        name for name in checkpoint.names if name not in known and name not in ignored and not name.endswith("inv_freq")
    )
    missing = sorted(name for name in wanted if name not in checkpoint.names)
    entries = {name: checkpoint.entry(name) for name in wanted if name in checkpoint.names}
    misshaped = [
        f"{name} is {list(entry.shape)}, not {list(wanted[name])}"
        for name, entry in entries.items()
        if entry.shape != wanted[name] and not (len(entry.shape) == 3 and _turn(entry.shape) == wanted[name])
    ]
    faults = [
        f"{kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("misshaped", misshaped), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise BadCheckpoint(f"{folder} does not hold the tensors that its config.json calls for; " + "; ".join(faults))
    return entries


def _turned(entries: Mapping[str, Entry], wanted: Shapes) -> set[str]:
    """Packed experts that are stored [experts, in, out]. Those with as many inputs as outputs are if any others are."""
    turned = {name for name, entry in entries.items() if entry.shape != wanted[name]}
    return turned | {name for name, shape in wanted.items() if turned and len(shape) == 3 and shape[1] == shape[2]}


def _turn(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1])


def _draw(wanted: Shapes, groups: Sequence[Group], count: Progress, placement: Placement) -> Weights:
    """Random weights that are a function of name and shape: every worker of one kind of device draws the same.

    They are drawn where they will be, so those of a GPU are not those of a CPU, nor bfloat16's those of float32.
    """
    weights = _allocate(wanted, () if placement.is_mapped else groups, placement)
    for done, name in enumerate(wanted, 1):
        tensor = weights.tensor(name)
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(placement.device).manual_seed(zlib.crc32(name.encode()))
            tensor.normal_(0.0, 0.02, generator=generator)
        count(done, len(wanted))
    return weights


def _allocate(wanted: Shapes, groups: Sequence[Group], placement: Placement) -> Weights:
    """Room for the tensors in one allocation, each group of them one below the other."""
    dtype = placement.torch_dtype
    per_unit = _ALIGNMENT // dtype.itemsize
    group_of = {name: group for group in groups for name in group}
    starts: dict[Group, int] = {}
    end = 0
    for name in wanted:
        unit = group_of.get(name, (name,))
        if unit not in starts:
            starts[unit] = end
            end += -(-count_numbers({each: wanted[each] for each in unit}) // per_unit) * per_unit
    try:
        memory = torch.empty(end, dtype=dtype, device=placement.device)
    except torch.OutOfMemoryError as error:
        raise BadConfig(f"the weights take {end * dtype.itemsize / 2**30:.2f} GiB: {error}") from error
    tensors: dict[str, torch.Tensor] = {}
    joined: dict[Group, torch.Tensor] = {}
    for unit, start in starts.items():
        first = start
        for name in unit:
            count = math.prod(wanted[name])
            tensors[name] = memory[first : first + count].view(wanted[name])
            first += count
        if len(unit) > 1:
            joined[unit] = memory[start:first].view(-1, *wanted[unit[0]][1:])
    return Weights(tensors, is_shared=False, joined=joined)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
