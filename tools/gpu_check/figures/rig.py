"""What every part measures on: a backend, a model's geometry with random weights made on the device, pools, the device's limits.

Owns what it opened; `close` gives it back. Weights, KV pool and runner are made when they are first asked for, so that a part
that needs none of them pays for none. Does not know what is measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epd.config import ServeConfig, parse
from epd.model.config import ModelConfig, load_model_config
from epd.model.device.graphs import GraphOptions
from epd.model.device.runner import DeviceTextRunner
from epd.model.device.text import DeviceTextModel
from epd.model.weights import Placement, Weights, load_text_weights
from gpu.cuda.backend import CudaBackend
from gpu.cuda.choose import choose_kernels
from gpu.cuda.kernels import Kernels
from gpu.cuda.pool import CudaPool
from gpu.pool import PoolSpec
from gpu.stream import Stream
from tools.gpu_check.figures.counts import kv_token_bytes
from tools.gpu_check.figures.timing import Timer, open_timer
from tools.gpu_check.found import Limits

_SETS = {name: partial(choose_kernels, name) for name in ("triton", "numba")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """How large what is measured is. The defaults are those of the bars."""

    copy_bytes: int = 4 << 30
    matrix_side: int = 8192
    decode: tuple[tuple[int, int], ...] = ((1, 1024), (64, 4096))  # requests, tokens of context
    decode_steps: int = 60
    attention: tuple[int, int] = (64, 8192)  # requests, tokens of context
    prefill_tokens: int = 8192
    short_prompts: tuple[int, int] = (64, 128)  # requests, tokens
    num_images: int = 8
    image_size: tuple[int, int] = (1920, 1080)
    ipc_bytes: int = 1 << 30
    linear_bytes: int = 1 << 30  # of weights that take turns: none is still in a cache
    experts: tuple[int, int, int, int] = (128, 8, 768, 2048)  # experts, chosen, intermediate size of one, hidden size
    expert_rows: tuple[int, ...] = (1, 8, 64, 2048, 8192)
    max_model_len: int = 32_768
    reserve_bytes: int = 10 << 30  # of the device's memory, for steps and libraries, beside weights and KV
    rounds: int = 9

    @classmethod
    def from_json(cls, changed: Mapping[str, Any]) -> Loads:
        """With what an order changes."""
        return cls(**{name: _tuples(value) for name, value in changed.items()})


@dataclass
class Rig:
    """`sets`: how to come by the kernel sets that there may be beside the backend's own."""

    backend: CudaBackend
    folder: Path  # config.json and what else a server reads of a model but its weights
    loads: Loads = field(default_factory=Loads)
    limits: Limits | None = None
    sets: Mapping[str, Callable[[], Kernels]] = field(default_factory=lambda: dict(_SETS))
    block_size: int = 16

    def __post_init__(self) -> None:
        self.config: ModelConfig = load_model_config(self.folder)
        self.device = self.backend.driver.torch_device
        self.timer: Timer = open_timer(self.device)
        self.placement = Placement(self.backend.torch_device, "float32" if self.backend.dtype == "float32" else "bfloat16")
        self.dtype = self.placement.torch_dtype
        served = parse(["serve", "--roles", "encode,prefill,decode", "--device", "cuda"])
        assert isinstance(served, ServeConfig)
        self.server = served.engine  # what `epd serve --device cuda` does unless told otherwise
        self._weights: Weights | None = None
        self._models: dict[str, DeviceTextModel] = {}
        self._kv: CudaPool | None = None
        self._streams: dict[str, Stream] = {}

    def known_limits(self) -> Limits:
        """Raises ValueError unless they have been measured."""
        if self.limits is None:
            raise ValueError("the device's limits were not measured in this run, so nothing can be held against them")
        return self.limits

    def stream(self, name: str) -> Stream:
        if name not in self._streams:
            self._streams[name] = self.backend.open_stream(name)
        return self._streams[name]

    @property
    def weights(self) -> Weights:
        """Random, of the language model, on the device."""
        if self._weights is None:
            self._weights = load_text_weights(self.config, self.folder, "dummy", placement=self.placement)
        return self._weights

    def model(self, kernels: Kernels | None = None) -> DeviceTextModel:
        """All share one copy of the weights."""
        kernels = kernels or self.backend.kernels
        if kernels.name not in self._models:
            self._models[kernels.name] = DeviceTextModel(self.config, self.weights, kernels, self.device, self.dtype)
        return self._models[kernels.name]

    @property
    def kv(self) -> CudaPool:
        """For the largest load of `decode`, or as much of it as there is room for; full of random numbers."""
        if self._kv is None:
            _ = self.weights  # first, as there is room for what they leave
            block_bytes = self.block_size * kv_token_bytes(self.config.text, self.dtype.itemsize)
            wanted = max(batch * self.num_blocks_of(context + 1) for batch, context in self.loads.decode)
            wanted = max(wanted, self.num_blocks_of(self.loads.prefill_tokens + 1))
            room = max(self.backend.memory_budget() - self.loads.reserve_bytes, 0) // block_bytes
            layout = self.config.kv_layout(self.block_size, self.backend.block_format)
            pool = self.backend.allocate_pool(PoolSpec(min(wanted, room), block_bytes, "kv", layout))
            fill_random(self.kv_blocks(pool))
            self.timer.synchronize()
            self._kv = pool
        return self._kv

    def kv_blocks(self, pool: CudaPool | None = None) -> Tensor:
        """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]"""
        return (pool or self.kv).array(self.dtype, self.config.kv_block_shape(self.block_size))

    def runner(self, kernels: Kernels | None = None, *, graphs: GraphOptions | None = None) -> DeviceTextRunner:
        """A new one over the pool, not prepared. To be closed by who asked."""
        return DeviceTextRunner(
            self.model(kernels),
            self.kv_blocks(),
            max_sequences=max(self.server.max_running, *(batch for batch, _ in self.loads.decode)),
            max_model_len=self.loads.max_model_len,
            graphs=graphs,
        )

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def give_back(self) -> None:
        """Memory that torch keeps for later: pools are not torch's."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._models.clear()
        self._weights = self._kv = None
        self.backend.close()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def fill_random(values: Tensor) -> None:
    """Standard normal, a part at a time: zeros would be too easy on the device."""
    for part in torch.split(values, max(1, (1 << 28) // max(1, values[0].numel()))):
        part.normal_()
