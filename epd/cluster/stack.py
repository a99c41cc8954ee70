"""What a process runs its stages on: a device's backend, and the runners that work on it. One file per kind of device.

`open_stack` is where the kind is chosen; what is above treats them alike. All of it may take long and touches no event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from epd.cluster.sizes import Sizes
from epd.config import ServeConfig
from epd.errors import BadConfig
from epd.model.config import ModelConfig
from epd.step import TextRunner, VisionRunner
from gpu.backend import Backend
from gpu.errors import GpuError
from gpu.pool import Pool
from gpu.stream import Stream
from gpu.utilisation import Meter

Report = Callable[[str], None]


class Stack(Protocol):
    """Called in the order of its methods."""

    @property
    def backend(self) -> Backend: ...

    @property
    def embedding_width(self) -> int:
        """Numbers in a row of an embedding block."""

    @property
    def steps_in_flight(self) -> int:
        """How many steps a stage gives the device before it knows what the first of them drew."""

    def decide(self, roles: Collection[str]) -> Sizes:
        """How large the pools are. Raises BadConfig, with the numbers, for what does not fit."""

    def load(self, roles: Collection[str], report: Report) -> None:
        """Bring the weights that these roles need. Raises BadCheckpoint."""

    def stage_stream(self, stage: str) -> Stream:
        """The stream that the runner of "encode", "prefill" or "decode" works on."""

    def vision_runner(self, embeddings: Pool, stream: Stream, report: Report) -> VisionRunner:
        """Ready to run on its stream."""

    def text_runner(self, kv: Pool, stage: str, stream: Stream, report: Report) -> TextRunner:
        """Of "prefill" or "decode", ready to run: compiled, captured. Those of one process share their weights."""

    def open_meter(self) -> Meter:
        """What tells how the device and this process are used; closed by whoever opens it."""

    def close(self) -> None: ...


def open_stack(config: ServeConfig, folder: Path, model: ModelConfig) -> Stack:
    """Raises BadConfig when there is no such device here."""
    try:
        if config.device == "cpu":
            from epd.cluster.cpu_stack import CpuStack

            return CpuStack(config, folder, model)
        if config.device.startswith("emulated:"):
            from epd.cluster.emulated_stack import EmulatedStack

            return EmulatedStack(config, model)
        from epd.cluster.cuda_stack import CudaStack
        from gpu.cuda.backend import open_cuda

        return CudaStack(config, folder, model, open_cuda(int(config.device.removeprefix("cuda:"))))
    except GpuError as error:
        raise BadConfig(f"--device {config.device}: {error}") from error
