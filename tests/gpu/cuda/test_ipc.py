"""Two processes and one device: blocks that one exports and the other reads, and what is left when the first is killed.

Once over the driver without a device, whose memory real processes share, and once on a GPU.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from gpu.backend import Backend
from gpu.cuda.backend import CudaBackend, open_cuda
from gpu.cuda.reference import sum64_rows
from gpu.errors import CannotMap, PoolClosed
from gpu.pool import PoolExport, PoolSpec
from gpu.stream import Stream
from tests.gpu.cuda.fake_driver import fake_backend
from tests.gpu.devices import Rows, contents, write
from tests.gpu.processes import ROOT

LAYOUT = 7
NUM_BLOCKS, BLOCK_BYTES = 64, 64 << 10

_OWNER = """
import base64, dataclasses, json, sys
from gpu.pool import PoolSpec
from tests.gpu.cuda.test_ipc import open_device
num_blocks, block_bytes, layout = map(int, sys.argv[2:])
backend = open_device(sys.argv[1])
pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", layout))
for i in range(num_blocks):
    pool.blocks[i] = i + 1
if pool.blocks.is_cuda:
    import torch
    torch.cuda.synchronize()
checksums = backend.open_stream("owner").submit(pool.checksum, range(num_blocks)).result()
export = {**dataclasses.asdict(pool.export()), "handle": base64.b64encode(pool.export().handle).decode()}
print(json.dumps({"export": export, "checksums": checksums}), flush=True)
sys.stdin.readline()
backend.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def open_device(name: str) -> CudaBackend:
    return fake_backend() if name == "no device" else open_cuda(0)


@dataclass
class Owner:
    process: subprocess.Popen[str]
    export: PoolExport
    checksums: list[int]

    def close_pool(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "closed\n"

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL


@contextmanager
def owner(name: str) -> Iterator[Owner]:
    """Another process with a pool of which block i is filled with i + 1."""
    arguments = [name, *map(str, (NUM_BLOCKS, BLOCK_BYTES, LAYOUT))]
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            told["export"]["handle"] = base64.b64decode(told["export"]["handle"])
            yield Owner(process, PoolExport(**told["export"]), told["checksums"])
        finally:
            process.kill()


class Reader:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.stream: Stream = backend.open_stream("copies")
        self.dst = backend.allocate_pool(PoolSpec(NUM_BLOCKS, BLOCK_BYTES, "kv", LAYOUT))


@pytest.fixture(params=["no device", pytest.param("cuda", marks=pytest.mark.gpu)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(name: str) -> Iterator[Reader]:
    backend = open_device(name)
    yield Reader(backend)
    backend.close()


def test_scattered_blocks_come_over_and_are_proven(name: str, reader: Reader) -> None:
    order = np.random.default_rng(1).permutation(NUM_BLOCKS)
    src_ids, dst_ids = order[:40].tolist(), order[::-1][:40].tolist()
    with owner(name) as other:
        mapped = reader.backend.map_pool(other.export)
        checksums = [other.checksums[i] for i in src_ids]
        assert checksums == [int(each) for each in sum64_rows(_blocks(src_ids))]
        assert reader.stream.submit(reader.dst.copy_from, mapped, src_ids, dst_ids, checksums).result(timeout=60) == -1
        expected = np.zeros((NUM_BLOCKS, BLOCK_BYTES), np.uint8)
        expected[dst_ids] = _blocks(src_ids)
        np.testing.assert_array_equal(contents(reader.dst), expected)
        wrong = [*checksums[:3], checksums[3] ^ 1, *checksums[4:]]
        assert reader.stream.submit(reader.dst.copy_from, mapped, src_ids, dst_ids, wrong).result(timeout=60) == 3
        mapped.close()
    reader.dst.check_integrity()


def test_a_pool_is_opened_any_number_of_times(name: str, reader: Reader) -> None:
    with owner(name) as other:
        first, second = reader.backend.map_pool(other.export), reader.backend.map_pool(other.export)
        first.close()
        assert reader.stream.submit(reader.dst.copy_from, second, [5], [0], [other.checksums[5]]).result(timeout=60) == -1
        second.close()
        third = reader.backend.map_pool(other.export)
        assert reader.stream.submit(reader.dst.copy_from, third, [6], [0], [other.checksums[6]]).result(timeout=60) == -1


def test_its_owner_s_close_is_noticed(name: str, reader: Reader) -> None:
    with owner(name) as other:
        mapped = reader.backend.map_pool(other.export)
        other.close_pool()
        with pytest.raises(CannotMap):
            reader.backend.map_pool(other.export)
        mapped.close()
    assert reader.stream.submit(int, "3").result(timeout=60) == 3


def test_after_kill_9_of_the_owner_the_reader_lives_and_its_pool_is_whole(name: str, reader: Reader) -> None:
    """Copies before, during and after: each is proven, or refused with what the transfer takes for a handle that is stale."""
    kept = np.random.default_rng(2).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
    write(reader.dst, kept)
    ids = list(range(32))  # the other half is ours
    with owner(name) as other:
        mapped = reader.backend.map_pool(other.export)
        checksums = [other.checksums[i] for i in ids]
        num_copies = 100 if name == "no device" else 20_000  # about a second's work
        copies = [reader.stream.submit(reader.dst.copy_from, mapped, ids, ids, checksums) for _ in range(num_copies)]
        assert copies[0].result(timeout=60) == -1
        other.kill()
        results = [copy.exception(timeout=60) or copy.result() for copy in copies]
        assert all(result == -1 or isinstance(result, PoolClosed) for result in results), results
        with pytest.raises(PoolClosed, match="has ended"):
            reader.stream.submit(reader.dst.copy_from, mapped, ids, ids, checksums).result(timeout=60)
        with pytest.raises(CannotMap, match="has ended"):
            reader.backend.map_pool(other.export)
        mapped.close()
    reader.dst.check_integrity()
    np.testing.assert_array_equal(contents(reader.dst)[32:], kept[32:])
    if not any(isinstance(result, PoolClosed) for result in results):
        np.testing.assert_array_equal(contents(reader.dst)[:32], _blocks(ids))
    found = reader.stream.submit(reader.dst.checksum, range(NUM_BLOCKS)).result(timeout=60)
    assert found == [int(each) for each in sum64_rows(contents(reader.dst))]


def test_in_one_process_it_is_not_mapped(name: str, reader: Reader) -> None:
    with pytest.raises(CannotMap, match="of its own"):
        reader.backend.map_pool(reader.dst.export())


def _blocks(ids: list[int]) -> Rows:
    return np.repeat((np.array(ids, np.uint8) + 1)[:, None], BLOCK_BYTES, axis=1)
