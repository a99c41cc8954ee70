"""The other process of a transfer: makes a pool, fills it, says how to find it, and waits until standard input closes.

`python -m tools.gpu_check.figures.exporter OPENER NUM_BLOCKS BLOCK_BYTES LAYOUT`, OPENER being
"module:function", which opens a backend.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpu.cuda.backend import CudaBackend, open_cuda
from gpu.pool import PoolExport, PoolSpec

_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Exported:
    export: PoolExport
    checksums: list[int]


def open_first() -> CudaBackend:
    return open_cuda(0)


@contextmanager
def exporting(opener: str, num_blocks: int, block_bytes: int, layout: int) -> Iterator[Exported]:
    """What the other process says of its pool, while it lives. Raises RuntimeError if it ends without a word."""
    command = [sys.executable, "-m", "tools.gpu_check.figures.exporter", opener, *map(str, (num_blocks, block_bytes, layout))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        try:
            said = next((line for line in process.stdout if line.startswith("{")), "")  # libraries print, too
            if not said:
                raise RuntimeError(f"the exporting process ended with status {process.wait()}")
            answer = json.loads(said)
            handle = base64.b64decode(answer["export"].pop("handle"))
            yield Exported(PoolExport(handle=handle, **answer["export"]), answer["checksums"])
        finally:
            process.communicate(timeout=30)


def main(opener: str, num_blocks: int, block_bytes: int, layout: int) -> None:
    module, _, function = opener.partition(":")
    backend: CudaBackend = getattr(importlib.import_module(module), function)()
    pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", layout))
    pool.blocks.view(torch.int64).random_()
    if pool.blocks.is_cuda:
        torch.cuda.synchronize()
    checksums = backend.open_stream("owner").submit(pool.checksum, range(num_blocks)).result()
    export = pool.export()
    said = {**asdict(export), "handle": base64.b64encode(export.handle).decode()}
    print(json.dumps({"export": said, "checksums": checksums}), flush=True)
    sys.stdin.read()
    backend.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], *map(int, sys.argv[2:]))
