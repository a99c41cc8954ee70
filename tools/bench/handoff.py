"""What a handoff costs on one host: KV blocks from another process's pool into our own, beside a plain memcpy of as many bytes.

One process owns a pool and fills it; this one maps it and copies blocks that lie in no order on either side, by the call that a
decode worker makes, which compares every block with its checksum. The baseline is one memcpy of the whole pool, between the same
two mappings, in turns with the rest. NIXL stands beside it where it is installed (`pip install --no-deps nixl-cu12`). What the
messages of a handoff cost is `tools.bench.handoff_stages`'s.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from gpu.cpu import CpuBackend
from gpu.host_pool import HostPool, MappedHostPool
from gpu.kernels import warm_up
from gpu.pool import PoolExport, PoolSpec
from tools.bench import handoff_stages
from tools.bench.rows import Row, make_row, render

_ROUNDS = 11
_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """[num_layers, 2, num_kv_heads, block_size, head_dim] float32 is one block; `num_blocks` of them are handed over."""

    name: str
    block_bytes: int
    num_blocks: int


GEOMETRIES = (
    Geometry("3.67 MB blocks", 28 * 2 * 8 * 16 * 128 * 4, 48),  # Qwen3-0.6B
    Geometry("32 KiB blocks", 4 * 2 * 2 * 16 * 32 * 4, 4096),  # the bundled model
)


def run() -> list[Row]:
    """Measure; takes about half a minute."""
    warm_up()
    backend = CpuBackend()
    try:
        rows = [row for geometry in GEOMETRIES for row in _throughput(backend, geometry)]
        rows += _fixed_costs(backend)
    finally:
        backend.close()
    return rows + handoff_stages.run() + _beside_nixl(rows)


def gather_figures(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median duration of each work in seconds, measured in turns; the first turn does not count."""
    durations: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                durations[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in durations.items()}


@contextmanager
def exporting(geometry: Geometry, *flags: str) -> Iterator[dict[str, Any]]:
    """What the other process says of its pool, while it lives."""
    command = [
        sys.executable,
        "-m",
        "tools.bench.handoff",
        "--export",
        str(geometry.num_blocks),
        str(geometry.block_bytes),
        *flags,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = next((line for line in process.stdout if line.startswith("{")), "")  # libraries print, too
            if not told:
                raise RuntimeError("the process that was to own the pool ended before it had one")
            yield json.loads(told)
        finally:
            process.communicate("\n", timeout=60)


def _throughput(backend: CpuBackend, geometry: Geometry) -> list[Row]:
    with exporting(geometry) as other:
        src = backend.map_pool(msgspec.convert(other["export"], PoolExport))
        dst = _own_pool(backend, geometry)
        rng = np.random.default_rng(0)
        src_ids, dst_ids = rng.permutation(geometry.num_blocks), rng.permutation(geometry.num_blocks)
        checksums = [other["checksums"][i] for i in src_ids]
        seconds = gather_figures(
            _ROUNDS,
            {
                "memcpy": lambda: plain_memcpy(src, dst),
                "copy": lambda: dst.copy_from(src, src_ids.tolist(), dst_ids.tolist(), checksums),
                "sender": lambda: dst.checksum(dst_ids.tolist()),
            },
        )
        src.close()
        dst.close()
    speed = {name: geometry.num_blocks * geometry.block_bytes / value / 1e9 for name, value in seconds.items()}
    baseline = speed["memcpy"]
    return [
        make_row(f"KV between processes, {geometry.name}", speed["copy"], "GB/s", baseline=baseline, bar=">=0.6"),
        make_row(f"sender's checksums, {geometry.name}", speed["sender"], "GB/s", baseline=baseline),
    ]


def _fixed_costs(backend: CpuBackend) -> list[Row]:
    """What copying one small block costs beside the bytes; and what the first from a worker costs on top."""
    geometry = dataclasses.replace(GEOMETRIES[1], num_blocks=64)
    with exporting(geometry) as other:
        export = msgspec.convert(other["export"], PoolExport)
        src, dst = backend.map_pool(export), _own_pool(backend, geometry)
        stream = backend.open_stream("handoff")
        seconds = gather_figures(
            201,
            {
                "memcpy": lambda: ctypes.memmove(dst.blocks.ctypes.data, src.blocks.ctypes.data, geometry.block_bytes),
                "stream": lambda: stream.submit(dst.copy_from, src, [7], [9], other["checksums"][7:8]).result(),
                "direct": lambda: dst.copy_from(src, [7], [9], other["checksums"][7:8]),
                "map": lambda: backend.map_pool(export).close(),
            },
        )
        src.close()
    fixed = seconds["stream"] - seconds["memcpy"]
    note = "32 KiB through a stream, less its memcpy"
    return [
        make_row("fixed cost of copying a block", 1e3 * fixed, "ms", note=note),
        make_row("one 32 KiB block, on the calling thread", 1e3 * seconds["direct"], "ms"),
        make_row("mapping another worker's pool", 1e3 * seconds["map"], "ms", note="once per worker"),
    ]


def plain_memcpy(src: MappedHostPool, dst: HostPool) -> None:
    ctypes.memmove(dst.blocks.ctypes.data, src.blocks.ctypes.data, src.num_blocks * src.block_bytes)


def _own_pool(backend: CpuBackend, geometry: Geometry) -> HostPool:
    pool = backend.allocate_pool(PoolSpec(geometry.num_blocks, geometry.block_bytes, "kv", _LAYOUT))
    pool.blocks[:] = 0
    return pool


def _beside_nixl(ours: list[Row]) -> list[Row]:
    """In a process of its own: what it does to a process is not ours to trust."""
    command = [sys.executable, "-m", "tools.bench.nixl_peer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"no figures beside NIXL, which is not installed or did not run here: {reason}", file=sys.stderr)
        return []
    found: dict[str, float] = json.loads(lines[-1])
    value = {row["name"]: row["value"] for row in ours}
    big = GEOMETRIES[0].name
    note = "baseline: NIXL over UCX, the same blocks, which it does not check"
    one = "one 32 KiB block, on the calling thread"
    return [
        make_row(f"beside NIXL, {big}", value[f"KV between processes, {big}"], "GB/s", baseline=found["speed"], note=note),
        make_row(f"beside NIXL, {one}", value[one], "ms", baseline=1e3 * found["fixed_s"], note=note),
    ]


def _export(num_blocks: int, block_bytes: int) -> None:
    """The other process: a pool of random bytes, until a line comes."""
    backend = CpuBackend()
    pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", _LAYOUT))
    pool.blocks[:] = np.random.default_rng(0).integers(0, 256, pool.blocks.shape, dtype=np.uint8)
    told: dict[str, Any] = {"export": msgspec.to_builtins(pool.export()), "checksums": pool.checksum(range(num_blocks))}
    if "--nixl" in sys.argv:
        from tools.bench.nixl_peer import Agent

        agent = Agent("owner", pool.blocks)
        told |= {"metadata": agent.metadata.hex(), "address": pool.blocks.ctypes.data}
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
    backend.close()


if __name__ == "__main__":
    if "--export" in sys.argv:
        _export(int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(render(run()))
