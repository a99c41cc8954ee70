"""What every backend does alike: streams, pools, copies that are proven, scratch, landings."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu.errors import CannotMap, LayoutMismatch, OutOfMemory, PoolClosed, StreamClosed
from gpu.pool import PoolSpec
from tests.gpu.devices import DEVICES, LAYOUT, Device, contents, open_device, write


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as opened:
        yield opened


class TestBackend:
    def test_it_says_what_it_is(self, device: Device) -> None:
        backend = device.backend
        assert backend.torch_device.startswith(("cpu", "cuda:"))
        assert backend.dtype in ("float32", "bfloat16")
        assert backend.block_format.startswith(backend.dtype)
        assert backend.memory_budget() > 0

    def test_close_closes_all_that_was_opened(self, device: Device) -> None:
        stream, pool = device.backend.open_stream("one"), device.pool()
        device.backend.close()
        device.backend.close()
        with pytest.raises(StreamClosed):
            stream.submit(int)
        with pytest.raises(PoolClosed):
            pool.export()


class TestStream:
    def test_calls_run_in_order_on_one_other_thread(self, device: Device) -> None:
        seen: list[int] = []
        for future in [device.stream.submit(seen.append, i) for i in range(100)]:
            future.result(timeout=60)
        assert seen == list(range(100))
        threads = {device.stream.submit(threading.get_ident).result(timeout=60) for _ in range(3)}
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    def test_an_error_is_its_future_s_and_the_next_call_runs(self, device: Device) -> None:
        def fail() -> None:
            raise KeyError("gone")

        with pytest.raises(KeyError, match="gone"):
            device.stream.submit(fail).result(timeout=60)
        assert device.stream.submit(int, "3").result(timeout=60) == 3

    def test_a_call_cancelled_before_its_turn_does_not_run(self, device: Device) -> None:
        go = threading.Event()
        ran: list[str] = []
        first = device.stream.submit(go.wait)
        second = device.stream.submit(ran.append, "second")
        third = device.stream.submit(ran.append, "third")
        assert second.cancel()
        go.set()
        third.result(timeout=60)
        assert first.result()
        assert ran == ["third"]

    @pytest.mark.parametrize("priority", [-1, 20])
    def test_a_priority_that_is_none_is_refused(self, device: Device, priority: int) -> None:
        with pytest.raises(ValueError, match=r"0\.\.19"):
            device.backend.open_stream("test", priority=priority)


class TestPool:
    def test_it_begins_with_zeros_and_is_whole(self, device: Device) -> None:
        pool = device.backend.allocate_pool(PoolSpec(5, 4096 + 16, "kv", LAYOUT))
        assert not contents(pool).any()
        pool.check_integrity()
        write(pool, np.full((5, 4096 + 16), 255, np.uint8))
        pool.check_integrity()

    def test_more_than_there_is_is_refused_with_the_numbers(self, device: Device) -> None:
        with pytest.raises(OutOfMemory) as caught:
            device.backend.allocate_pool(PoolSpec(1 << 20, 1 << 30, "kv", LAYOUT))
        assert caught.value.wanted_bytes > 1 << 50
        assert 0 < caught.value.available_bytes < 1 << 50

    def test_generations_are_random_and_of_63_bits(self, device: Device) -> None:
        generations = {device.pool().generation for _ in range(8)}
        assert len(generations) == 8
        assert all(0 <= generation < 1 << 63 for generation in generations)

    def test_a_checksum_is_of_the_bytes_and_nothing_else(self, device: Device) -> None:
        one, other = device.pool(seed=1), device.pool(seed=1)
        sums = device.checksum(one, [4, 0, 4, 1])
        assert sums == device.checksum(other, [4, 0, 4, 1])
        assert sums[0] == sums[2]
        assert len(set(sums)) == 3
        rows = contents(other)
        rows[4, 1023] ^= 1
        write(other, rows)
        changed = device.checksum(other, [4, 0, 4, 1])
        assert [a != b for a, b in zip(sums, changed, strict=True)] == [True, False, True, False]
        assert device.checksum(one, []) == []

    def test_read_gives_the_bytes_of_blocks_in_the_order_asked(self, device: Device) -> None:
        pool = device.pool()
        ids = [3, 4, 5, 0, 2, 1, 1]
        found = device.stream.submit(pool.read, ids).result(timeout=60)
        assert [bytes(each) for each in found] == [contents(pool)[i].tobytes() for i in ids]
        assert list(device.stream.submit(pool.read, []).result(timeout=60)) == []

    @pytest.mark.parametrize("block_id", [-1, 6])
    def test_a_block_outside_of_the_pool_is_refused(self, device: Device, block_id: int) -> None:
        pool = device.pool()
        uses: list[Callable[[], object]] = [lambda: pool.checksum([0, block_id]), lambda: pool.read([block_id])]
        for use in [*uses, lambda: pool.landing([block_id])]:
            with pytest.raises(IndexError, match="not all inside"):
                device.stream.submit(use).result(timeout=60)

    def test_a_closed_pool_refuses_everything(self, device: Device) -> None:
        pool, other = device.pool(), device.pool()
        pool.close()
        pool.close()
        uses: list[Callable[[], object]] = [
            pool.export,
            pool.check_integrity,
            lambda: pool.checksum([0]),
            lambda: pool.read([0]),
            lambda: pool.landing([0]),
            lambda: pool.copy_from(other, [0], [0], [0]),
            lambda: other.copy_from(pool, [0], [0], [0]),
        ]
        for use in uses:
            with pytest.raises(PoolClosed):
                device.stream.submit(use).result(timeout=60)

    def test_what_looks_at_blocks_outlives_close(self, device: Device) -> None:
        pool = device.pool()
        blocks, expected = pool.blocks, contents(pool)  # type: ignore[attr-defined]
        pool.close()
        np.testing.assert_array_equal(np.asarray(blocks.cpu() if hasattr(blocks, "cpu") else blocks), expected)


class TestCopy:
    @pytest.mark.parametrize("block_bytes", [16, 256, 4096 + 16, 1 << 20])
    def test_blocks_arrive_where_they_belong_and_nothing_else_changes(self, device: Device, block_bytes: int) -> None:
        src, dst = device.pool(5, block_bytes), device.pool(7, block_bytes, seed=2)
        src_ids, dst_ids = [4, 0, 2], [1, 6, 3]
        expected = contents(dst)
        expected[dst_ids] = contents(src)[src_ids]
        checksums = device.checksum(src, src_ids)
        assert device.stream.submit(dst.copy_from, src, src_ids, dst_ids, checksums).result(timeout=60) == -1
        np.testing.assert_array_equal(contents(dst), expected)
        dst.check_integrity()

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ids=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6, unique_by=lambda pair: pair[1]))
    def test_any_ids(self, device: Device, ids: list[tuple[int, int]]) -> None:
        src, dst = device.pool(seed=1), device.pool(seed=2)
        expected = contents(dst)
        for a, b in ids:
            expected[b] = contents(src)[a]
        checksums = device.checksum(src, [a for a, _ in ids])
        copied = device.stream.submit(dst.copy_from, src, [a for a, _ in ids], [b for _, b in ids], checksums)
        assert copied.result(timeout=60) == -1
        np.testing.assert_array_equal(contents(dst), expected)
        src.close()
        dst.close()

    @pytest.mark.parametrize("position", [0, 57, -1])
    def test_one_altered_byte_is_noticed_and_named(self, device: Device, position: int) -> None:
        src, dst = device.pool(4), device.pool(4, seed=2)
        checksums = device.checksum(src, [0, 1, 2, 3])
        rows = contents(src)
        rows[2, position] ^= 0x40
        write(src, rows)
        assert device.stream.submit(dst.copy_from, src, [0, 1, 2, 3], [3, 2, 1, 0], checksums).result(timeout=60) == 2

    def test_what_does_not_fit_is_refused_before_anything_is_written(self, device: Device) -> None:
        src, dst, small = device.pool(seed=1), device.pool(seed=2), device.pool(block_bytes=512)
        before = contents(dst)
        for src_ids, dst_ids in (([0, 6], [0, 1]), ([0, 1], [0, -1]), ([0, 1], [0, 6])):
            with pytest.raises(IndexError):
                device.stream.submit(dst.copy_from, src, src_ids, dst_ids, [0, 0]).result(timeout=60)
        with pytest.raises(ValueError, match="as many"):
            device.stream.submit(dst.copy_from, src, [0, 1], [0], [1, 2]).result(timeout=60)
        with pytest.raises(ValueError, match="as many"):
            device.stream.submit(dst.copy_from, src, [0], [0], [1, 2]).result(timeout=60)
        with pytest.raises(LayoutMismatch):
            device.stream.submit(dst.copy_from, small, [0], [0], [0]).result(timeout=60)
        np.testing.assert_array_equal(contents(dst), before)


class TestScratch:
    def test_blocks_come_in_and_are_rows_of_the_backend_s_numbers(self, device: Device) -> None:
        pool, scratch = device.pool(), device.backend.allocate_scratch(3, 1024)
        checksums = device.checksum(pool, [5, 1, 2])
        assert device.stream.submit(scratch.copy_from, pool, [5, 1, 2], [0, 1, 2], checksums).result(timeout=60) == -1
        np.testing.assert_array_equal(contents(scratch), contents(pool)[[5, 1, 2]])
        size = {"float32": 4, "bfloat16": 2}[device.backend.dtype]
        rows = scratch.rows(32)
        assert tuple(rows.shape) == (3 * 1024 // size // 32, 32)
        assert str(rows.dtype).endswith(device.backend.dtype)

    def test_bytes_land_in_it(self, device: Device) -> None:
        pool, scratch = device.pool(), device.backend.allocate_scratch(2, 1024)
        landing = scratch.landing([1, 0])
        for buffer, row in zip(landing.buffers, contents(pool)[[3, 4]], strict=True):
            buffer[:] = row.tobytes()
        assert device.stream.submit(landing.settle, device.checksum(pool, [3, 4])).result(timeout=60) == -1
        np.testing.assert_array_equal(contents(scratch), contents(pool)[[4, 3]])


class TestLanding:
    def test_what_landed_is_brought_to_its_blocks_and_proven(self, device: Device) -> None:
        src, dst = device.pool(seed=1), device.pool(seed=2)
        ids = [2, 3, 0, 5]
        checksums = device.checksum(src, [0, 1, 2, 3])
        expected = contents(dst)
        expected[ids] = contents(src)[:4]
        landing = dst.landing(ids)
        assert [(len(buffer), buffer.readonly) for buffer in landing.buffers] == [(1024, False)] * 4
        for buffer, row in zip(landing.buffers, contents(src)[:4], strict=True):
            buffer[:] = row.tobytes()
        assert device.stream.submit(landing.settle, checksums).result(timeout=60) == -1
        np.testing.assert_array_equal(contents(dst), expected)
        dst.check_integrity()

    def test_a_wrong_block_is_named(self, device: Device) -> None:
        src, dst = device.pool(seed=1), device.pool(seed=2)
        landing = dst.landing([4, 1])
        for buffer, row in zip(landing.buffers, contents(src), strict=False):
            buffer[:] = row.tobytes()
        landing.buffers[1][1023] ^= 1
        assert device.stream.submit(landing.settle, device.checksum(src, [0, 1])).result(timeout=60) == 1

    def test_nothing_lands_well(self, device: Device) -> None:
        landing = device.pool().landing([])
        assert list(landing.buffers) == []
        assert device.stream.submit(landing.settle, []).result(timeout=60) == -1


class TestMapped:
    def test_blocks_come_over_and_are_proven(self, device: Device) -> None:
        src, dst = device.pool(of=device.peer), device.pool(seed=2)
        checksums = device.checksum(device.pool(), [5, 0])  # of the same bytes
        mapped = device.backend.map_pool(src.export())
        assert (mapped.num_blocks, mapped.block_bytes) == (6, 1024)
        assert (mapped.layout, mapped.generation) == (LAYOUT, src.generation)
        assert device.stream.submit(dst.copy_from, mapped, [5, 0], [1, 2], checksums).result(timeout=60) == -1
        np.testing.assert_array_equal(contents(dst)[[1, 2]], contents(src)[[5, 0]])
        assert device.stream.submit(dst.copy_from, mapped, [5, 1], [1, 2], checksums).result(timeout=60) == 1
        mapped.close()

    @pytest.mark.parametrize("field", ["generation", "layout", "num_blocks", "block_bytes", "memory", "handle"])
    def test_an_export_that_is_off_by_anything_is_refused(self, device: Device, field: str) -> None:
        export = device.pool(6, 4096, of=device.peer).export()
        # Of a memfd the inode, which is last: the number next to a process may be one of its threads. Of a device the host.
        handle = bytearray(export.handle)
        handle[-1 if export.memory == "memfd" else 0] ^= 1
        off: dict[str, Any] = {"memory": "paper", "handle": bytes(handle)}
        wrong = dataclasses.replace(export, **{field: off.get(field) or getattr(export, field) + 1})
        with pytest.raises(CannotMap):
            device.backend.map_pool(wrong)
        device.backend.map_pool(export).close()

    def test_blocks_that_divide_the_same_memory_otherwise_are_refused(self, device: Device) -> None:
        export = device.pool(6, 4096, of=device.peer).export()
        wrong = dataclasses.replace(export, num_blocks=12, block_bytes=2048)
        with pytest.raises(CannotMap, match="not the pool of generation"):
            device.backend.map_pool(wrong)

    def test_it_ends_with_the_owner_s_close(self, device: Device) -> None:
        src, dst = device.pool(of=device.peer), device.pool(seed=2)
        before = contents(dst)
        mapped = device.backend.map_pool(src.export())
        export = src.export()
        src.close()
        with pytest.raises(PoolClosed):
            device.stream.submit(dst.copy_from, mapped, [0], [0], [0]).result(timeout=60)
        with pytest.raises(CannotMap):
            device.backend.map_pool(export)
        np.testing.assert_array_equal(contents(dst)[1:], before[1:])

    def test_it_ends_with_its_own_close(self, device: Device) -> None:
        mapped = device.backend.map_pool(device.pool(of=device.peer).export())
        mapped.close()
        mapped.close()
        with pytest.raises(PoolClosed):
            device.stream.submit(device.pool().copy_from, mapped, [0], [0], [0]).result(timeout=60)
