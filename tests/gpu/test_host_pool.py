from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash

from gpu.cpu import CpuBackend
from gpu.errors import BrokenPool, CannotMap, OutOfMemory, PoolClosed
from gpu.host_pool import HostPool
from gpu.pool import PoolExport, PoolSpec
from tests.gpu.processes import exporter, holders

LAYOUT = 0xFEDCBA9876543210


@pytest.fixture
def backend() -> Iterator[CpuBackend]:
    opened = CpuBackend()
    yield opened
    opened.close()


def make_pool(backend: CpuBackend, num_blocks: int = 6, block_bytes: int = 1000, layout: int = LAYOUT) -> HostPool:
    pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", layout))
    pool.blocks[:] = np.random.default_rng(1).integers(0, 256, pool.blocks.shape, dtype=np.uint8)
    return pool


class TestPool:
    @pytest.mark.parametrize(
        ("num_blocks", "block_bytes", "layout"), [(0, 1, 0), (1, 0, 0), (-1, 5, 0), (1, 1, -1), (1, 1, 1 << 64)]
    )
    def test_a_spec_that_cannot_be_is_refused(self, num_blocks: int, block_bytes: int, layout: int) -> None:
        with pytest.raises(ValueError, match="not"):
            PoolSpec(num_blocks, block_bytes, "kv", layout)

    def test_more_than_there_is_is_refused(self, backend: CpuBackend) -> None:
        with pytest.raises(OutOfMemory) as caught:
            backend.allocate_pool(PoolSpec(1 << 20, 1 << 30, "kv", LAYOUT))
        assert caught.value.wanted_bytes > 1 << 50
        assert 0 < caught.value.available_bytes < 1 << 50

    def test_generations_are_random_and_of_63_bits(self, backend: CpuBackend) -> None:
        generations = {make_pool(backend).generation for _ in range(8)}
        assert len(generations) == 8
        assert all(0 <= generation < 1 << 63 for generation in generations)

    def test_an_array_is_the_pool_itself(self, backend: CpuBackend) -> None:
        pool = make_pool(backend, num_blocks=3, block_bytes=2 * 5 * 4)
        array = pool.array(np.float32, (2, 5))
        assert array.shape == (3, 2, 5)
        array[1, 1, 4] = 1.5
        assert np.frombuffer(pool.block(1), np.float32)[9] == 1.5
        pool.block(2)[:4] = np.float32(-2).tobytes()
        assert array[2, 0, 0] == -2

    def test_an_array_that_does_not_fill_its_blocks_is_refused(self, backend: CpuBackend) -> None:
        with pytest.raises(ValueError, match="take 36 bytes and this pool's have 1000"):
            make_pool(backend).array(np.float32, (3, 3))

    @pytest.mark.parametrize("block_id", [-1, 6])
    def test_a_block_outside_of_the_pool_is_refused(self, backend: CpuBackend, block_id: int) -> None:
        pool = make_pool(backend)
        for use in (pool.block, lambda i: pool.checksum([i]), backend.map_pool(pool.export()).block):
            with pytest.raises(IndexError, match="not all inside a pool of 6 blocks"):
                use(block_id)

    @pytest.mark.parametrize("block_bytes", [1, 240, 241, 1000, 4096])
    def test_checksums_are_those_of_the_library(self, backend: CpuBackend, block_bytes: int) -> None:
        pool = make_pool(backend, block_bytes=block_bytes)
        assert pool.checksum([4, 0, 4]) == [xxhash.xxh3_64_intdigest(pool.block(i)) for i in (4, 0, 4)]
        assert pool.checksum([]) == []

    def test_a_closed_pool_refuses_everything(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        pool.close()
        pool.close()
        uses: list[Callable[[], object]] = [
            lambda: pool.block(0),
            lambda: pool.checksum([0]),
            lambda: pool.array(np.uint8, (1000,)),
            pool.export,
            pool.check_integrity,
        ]
        for use in uses:
            with pytest.raises(PoolClosed):
                use()

    def test_integrity_holds_for_any_content_of_the_blocks(self, backend: CpuBackend) -> None:
        pool = make_pool(backend, num_blocks=5, block_bytes=4096 + 7)
        pool.blocks[:] = 255
        pool.check_integrity()

    def test_a_write_past_the_last_block_is_noticed(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        pool.memory.bytes[6 * 1000] = 1
        with pytest.raises(BrokenPool, match="past the last block"):
            pool.check_integrity()

    def test_an_overwritten_label_is_noticed(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        pool.memory.bytes[-mmap.PAGESIZE + 8] ^= 1
        with pytest.raises(BrokenPool, match="last page"):
            pool.check_integrity()

    def test_a_descriptor_that_became_something_else_is_noticed(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        other = os.memfd_create("other")
        os.dup2(other, pool.memory.fd)
        os.close(other)
        with pytest.raises(BrokenPool, match="no longer"):
            pool.check_integrity()


def _off(export: PoolExport, field: str) -> dict[str, Any]:
    return {field: "cuda-ipc" if field == "memory" else getattr(export, field) + 1}


class TestMappedPool:
    def test_it_reads_what_the_owner_writes(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        mapped = backend.map_pool(pool.export())
        pool.block(3)[:3] = b"abc"
        assert bytes(mapped.block(3)[:3]) == b"abc"
        assert mapped.block(3).readonly
        assert (mapped.num_blocks, mapped.block_bytes) == (6, 1000)
        assert (mapped.layout, mapped.generation) == (LAYOUT, pool.generation)

    @pytest.mark.parametrize("field", ["generation", "layout", "memory", "inode", "fd", "pid", "num_blocks", "block_bytes"])
    def test_a_handle_that_is_off_by_anything_is_refused(self, backend: CpuBackend, field: str) -> None:
        export = make_pool(backend, num_blocks=6, block_bytes=4096).export()
        handle = dict(zip(("pid", "fd", "inode"), struct.unpack("<qqQ", export.handle), strict=True))
        if field in handle:
            handle[field] += {"pid": 2**22, "fd": 1000}.get(field, 1)
            wrong = replace(export, handle=struct.pack("<qqQ", *handle.values()))
        else:
            wrong = replace(export, **_off(export, field))
        with pytest.raises(CannotMap):
            backend.map_pool(wrong)
        backend.map_pool(export).close()

    def test_a_handle_that_is_none_is_refused(self, backend: CpuBackend) -> None:
        with pytest.raises(CannotMap, match="not host memory"):
            backend.map_pool(replace(make_pool(backend).export(), handle=b"short"))

    def test_blocks_that_divide_the_same_memory_otherwise_are_refused(self, backend: CpuBackend) -> None:
        export = make_pool(backend, num_blocks=6, block_bytes=4096).export()
        wrong = replace(export, num_blocks=12, block_bytes=2048)
        with pytest.raises(CannotMap, match="not the pool of generation"):
            backend.map_pool(wrong)

    def test_it_ends_with_the_owner_s_close(self, backend: CpuBackend) -> None:
        pool = make_pool(backend)
        mapped = backend.map_pool(pool.export())
        before = mapped.is_current
        pool.close()
        assert (before, mapped.is_current) == (True, False)
        with pytest.raises(PoolClosed):
            mapped.block(0)

    def test_it_ends_with_its_own_close(self, backend: CpuBackend) -> None:
        mapped = backend.map_pool(make_pool(backend).export())
        block = mapped.block(1)
        mapped.close()
        assert not mapped.is_current
        with pytest.raises(PoolClosed):
            mapped.block(1)
        assert len(bytes(block)) == 1000


class TestCopies:
    def test_several_threads_copy_at_once(self, backend: CpuBackend) -> None:
        src, dst = make_pool(backend, 32, 64 << 10), make_pool(backend, 32, 64 << 10)
        dst.blocks[:] = 0
        checksums = src.checksum(range(32))

        def copy(start: int) -> None:
            for i in range(start, 32, 4):
                assert dst.copy_from(src, [i], [31 - i], checksums[i : i + 1]) == -1

        threads = [threading.Thread(target=copy, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(dst.blocks, src.blocks[::-1])


class TestBetweenProcesses:
    def test_blocks_come_over_and_are_proven(self, backend: CpuBackend) -> None:
        dst = make_pool(backend, 4, 50_000)
        with exporter(3, 50_000, LAYOUT) as other:
            mapped = backend.map_pool(other.export)
            assert dst.copy_from(mapped, [2, 0], [1, 3], [other.checksums[2], other.checksums[0]]) == -1
            assert (dst.blocks[1] == 3).all()
            assert (dst.blocks[3] == 1).all()
            assert dst.copy_from(mapped, [1], [0], [other.checksums[2]]) == 0

    def test_its_close_is_noticed(self, backend: CpuBackend) -> None:
        with exporter(3, 500, LAYOUT) as other:
            mapped = backend.map_pool(other.export)
            other.close_pool()
            with pytest.raises(PoolClosed):
                mapped.block(0)
            with pytest.raises(CannotMap):
                backend.map_pool(other.export)

    def test_after_kill_9_the_reader_still_reads_and_then_nothing_is_left(self, backend: CpuBackend) -> None:
        shared = set(os.listdir("/dev/shm"))
        with exporter(3, 5000, LAYOUT) as other:
            pid, _, inode = struct.unpack("<qqQ", other.export.handle)
            assert holders(inode) == {pid}
            mapped = backend.map_pool(other.export)
            assert holders(inode) == {pid, os.getpid()}
            other.kill()
            assert (np.frombuffer(mapped.block(2), np.uint8) == 3).all()
            assert mapped.is_current
            with pytest.raises(CannotMap, match="cannot open"):
                backend.map_pool(other.export)
            assert holders(inode) == {os.getpid()}
            mapped.close()
            assert holders(inode) == set()
        assert not {name for name in set(os.listdir("/dev/shm")) - shared if "epd" in name}
