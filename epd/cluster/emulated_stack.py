"""Stages on an emulated device: real messages, schedulers and block traffic; steps that take the time that a profile predicts."""

from __future__ import annotations

import time
from collections.abc import Collection
from urllib.parse import parse_qs

from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS, Sizes
from epd.cluster.stack import Report
from epd.config import ServeConfig
from epd.emulated.device import EmulatedDevice, Sharing
from epd.emulated.profile import load_profile, slowed
from epd.emulated.runner import WORD_BYTES, EmulatedTextRunner, EmulatedVisionRunner
from epd.errors import BadConfig
from epd.model.config import ModelConfig
from gpu.emulated import CopyTimes, EmulatedBackend
from gpu.host_pool import HostPool
from gpu.pool import Pool
from gpu.stream import Stream
from gpu.utilisation import DeviceUsage, Meter

_EMBEDDING_SHARE = 1 / 16  # of the memory that weights leave


class EmulatedStack:
    embedding_width = 1

    def __init__(self, config: ServeConfig, model: ModelConfig) -> None:
        path, sharing, factor, beat_s, phase_s = _read(config.device)
        self._profile = profile = slowed(load_profile(path), factor) if factor != 1.0 else load_profile(path)
        self.steps_in_flight = 1 if profile.device == "cpu" else 2  # as the device has it that is emulated
        self._config = config
        self._model = model
        self._device = EmulatedDevice(profile, sharing, beat_s=beat_s, phase_s=phase_s)
        times = CopyTimes(
            profile.copies.latency_s,
            profile.copies.bytes_per_s,
            {
                "kv": profile.model.kv_token_bytes * config.engine.block_size,
                "embedding": profile.model.embedding_row_bytes * EMBEDDING_BLOCK_ROWS,
            },
        )
        self.backend = EmulatedBackend(profile.memory_bytes, times)

    @property
    def device(self) -> EmulatedDevice:
        return self._device

    def decide(self, roles: Collection[str]) -> Sizes:
        engine, costs = self._config.engine, self._profile.model
        block_size = engine.block_size
        weights = costs.weight_bytes if {"prefill", "decode"} & set(roles) else 0
        weights += costs.vision_weight_bytes if "encode" in roles else 0
        left = int(self._profile.memory_bytes * self._config.memory_fraction) - weights
        num_embedding_blocks = int(left * _EMBEDDING_SHARE) // (costs.embedding_row_bytes * EMBEDDING_BLOCK_ROWS)
        num_kv_blocks = int(left * (1 - _EMBEDDING_SHARE)) // (costs.kv_token_bytes * block_size)
        if engine.kv_bytes:
            num_kv_blocks = engine.kv_bytes // (costs.kv_token_bytes * block_size)
        if engine.embedding_bytes:
            num_embedding_blocks = engine.embedding_bytes // (costs.embedding_row_bytes * EMBEDDING_BLOCK_ROWS)
        if min(num_kv_blocks, num_embedding_blocks) < 1:
            raise BadConfig(f"{costs.name} needs {weights / 1e9:.1f} GB of weights, which {self._profile.device} does not hold")
        wanted = engine.max_model_len or self._model.max_position_embeddings
        return Sizes(
            max_model_len=min(wanted, num_kv_blocks * block_size),
            num_kv_blocks=num_kv_blocks,
            kv_block_bytes=block_size * WORD_BYTES,
            num_embedding_blocks=num_embedding_blocks,
            embedding_block_bytes=EMBEDDING_BLOCK_ROWS * WORD_BYTES,
        )

    def load(self, roles: Collection[str], report: Report) -> None:
        profile = self._profile
        report(f"emulating {profile.device} with {profile.model.name} ({profile.provenance}: {profile.source})")

    def stage_stream(self, stage: str) -> Stream:
        return self.backend.open_stream(stage)

    def vision_runner(self, embeddings: Pool, stream: Stream, report: Report) -> EmulatedVisionRunner:
        return EmulatedVisionRunner(self._device, _host(embeddings), EMBEDDING_BLOCK_ROWS)

    def text_runner(self, kv: Pool, stage: str, stream: Stream, report: Report) -> EmulatedTextRunner:
        return EmulatedTextRunner(self._device, _host(kv), self._config.engine.block_size, stage)

    def open_meter(self) -> Meter:
        return Meter(_EmulatedMeter(self._device))

    def close(self) -> None:
        self._device.close()  # first: streams wait for it
        self.backend.close()


class _EmulatedMeter:
    """What an emulated device says of itself."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device
        self._before = (time.monotonic(), 0.0)

    def read(self) -> DeviceUsage:
        device = self._device
        (then, busy_then), self._before = self._before, (time.monotonic(), device.busy_s)
        utilisation = (device.busy_s - busy_then) / max(1e-9, self._before[0] - then)
        return DeviceUsage(
            f"{device.profile.device}, emulated", min(1.0, utilisation), busy_s=device.busy_s, late_s=device.late_s
        )

    def close(self) -> None:
        """The device is closed by its stack."""


def _read(device: str) -> tuple[str, Sharing, float, float, float]:
    """emulated:PROFILE?sharing=NAME&slow=FACTOR&beat=SECONDS&phase=SECONDS"""
    path, _, query = device.removeprefix("emulated:").partition("?")
    options = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    try:
        sharing, factor = Sharing(options.pop("sharing", Sharing.FUSED)), float(options.pop("slow", "1"))
        beat_s, phase_s = float(options.pop("beat", "0")), float(options.pop("phase", "0"))
    except ValueError as error:
        raise BadConfig(f"--device {device}: {error}; sharing is {' or '.join(Sharing)}, the others are numbers") from None
    if options or not 0 < factor < 1000 or not 0 <= phase_s <= beat_s < 1000:
        raise BadConfig(
            f"--device {device}: the options are sharing={'|'.join(Sharing)}, slow=FACTOR above 0, and beat=SECONDS with a "
            "phase=SECONDS of at most that"
        )
    return path, sharing, factor, beat_s, phase_s


def _host(pool: Pool) -> HostPool:
    if not isinstance(pool, HostPool):
        raise BadConfig(f"a {type(pool).__name__} is not in host memory")
    return pool
