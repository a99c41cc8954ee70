"""Other processes' pools: opened once, closed when nobody reads them any more, given up when their owner is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from gpu.cuda.backend import CudaBackend
from gpu.cuda.handle import Handle
from gpu.cuda.mapping import MappedCudaPool
from gpu.cuda.pool import CudaPool
from gpu.cuda.processes import ProcessId
from gpu.cuda.reference import sum64_rows
from gpu.errors import CannotMap, DeviceFailed, PoolClosed
from gpu.pool import PoolExport, PoolSpec
from tests.gpu.cuda.fake_driver import FakeDriver, FakeProcesses, fake_backend
from tests.gpu.devices import contents, is_empty, write

LAYOUT = 7
OWNER, READER = ProcessId(100, 5), ProcessId(200, 6)


class Pair:
    """Two processes on one device: one whose pool is read, and one that reads it."""

    def __init__(self, *, reader: FakeDriver | None = None, owner: FakeDriver | None = None) -> None:
        self.ended: set[ProcessId] = set()
        self.owner_driver, self.driver = owner or FakeDriver(), reader or FakeDriver()
        self.owner = self._process(self.owner_driver, OWNER)
        self.reader = self._process(self.driver, READER)
        self.src = self.pool(self.owner, seed=1)
        self.dst = self.pool(self.reader, seed=2)
        self.checksums = [int(each) for each in sum64_rows(contents(self.src))]
        self.stream = self.reader.open_stream("copies")

    def pool(self, backend: CudaBackend, *, seed: int) -> CudaPool:
        pool = backend.allocate_pool(PoolSpec(6, 1024, "kv", LAYOUT))
        write(pool, np.random.default_rng(seed).integers(0, 256, (6, 1024), np.uint8))
        return pool

    def copy(self, mapped: MappedCudaPool, ids: list[int]) -> Future[int]:
        return self.stream.submit(self.dst.copy_from, mapped, ids, ids, [self.checksums[i] for i in ids])

    def kill_owner(self) -> None:
        self.owner_driver.end()
        self.ended.add(OWNER)

    def wait_closed(self) -> None:
        """Mappings are closed by a thread of their own."""
        self.driver.wait_for(lambda: "opened" not in self.driver.left())

    def close(self) -> None:
        for driver in (self.driver, self.owner_driver):
            driver.release()
        self.reader.close()
        self.owner.close()
        if not self.driver.has_failed:
            is_empty(self.driver)

    def _process(self, driver: FakeDriver, own: ProcessId) -> CudaBackend:
        return fake_backend(driver, dtype=torch.float32, processes=FakeProcesses(own, ended=self.ended))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def changed(export: PoolExport, **fields: object) -> PoolExport:
    handle = dataclasses.replace(Handle.unpack(export.handle), **fields)  # type: ignore[arg-type]
    return dataclasses.replace(export, handle=handle.pack())


class TestOpening:
    def test_a_pool_mapped_twice_is_opened_once_and_closed_with_the_last(self, pair: Pair) -> None:
        first, second = pair.reader.map_pool(pair.src.export()), pair.reader.map_pool(pair.src.export())
        assert pair.driver.left()["opened"] == 1
        first.close()
        first.close()
        assert pair.copy(second, [1]).result(timeout=60) == -1
        second.close()
        pair.wait_closed()

    def test_it_can_be_mapped_again(self, pair: Pair) -> None:
        for _ in range(3):
            mapped = pair.reader.map_pool(pair.src.export())
            assert pair.copy(mapped, [0, 5]).result(timeout=60) == -1
            mapped.close()
        pair.wait_closed()

    def test_an_export_is_made_once(self, pair: Pair) -> None:
        assert pair.src.export() is pair.src.export()

    def test_a_pool_of_this_process_is_not_mapped(self, pair: Pair) -> None:
        with pytest.raises(CannotMap, match="of its own"):
            pair.owner.map_pool(pair.src.export())

    def test_a_pool_of_another_host_is_not_mapped(self, pair: Pair) -> None:
        with pytest.raises(CannotMap, match="another host"):
            pair.reader.map_pool(changed(pair.src.export(), boot_id=b"another host 000"))

    def test_a_pool_of_a_process_that_has_ended_is_not_mapped(self, pair: Pair) -> None:
        export = pair.src.export()
        pair.kill_owner()
        with pytest.raises(CannotMap, match="process 100 has ended"):
            pair.reader.map_pool(export)

    def test_a_handle_that_cuda_refuses_is_not_mapped_and_leaves_nothing(self, pair: Pair) -> None:
        export = pair.src.export()
        pair.owner_driver.end()
        for _ in range(2):
            with pytest.raises(CannotMap, match="cudaErrorInvalidResourceHandle"):
                pair.reader.map_pool(export)
        assert "opened" not in pair.driver.left()

    def test_an_event_that_cuda_refuses_leaves_nothing_open(self, pair: Pair) -> None:
        with pytest.raises(CannotMap):
            pair.reader.map_pool(changed(pair.src.export(), event=bytes(64)))
        assert "opened" not in pair.driver.left()

    def test_memory_that_is_not_the_pool_that_was_named_is_not_kept_open(self, pair: Pair) -> None:
        with pytest.raises(CannotMap, match="not the pool of generation"):
            pair.reader.map_pool(dataclasses.replace(pair.src.export(), generation=1))
        pair.wait_closed()

    def test_a_size_that_cannot_be_is_refused_before_anything_is_opened(self, pair: Pair) -> None:
        with pytest.raises(CannotMap, match="cannot be"):
            pair.reader.map_pool(dataclasses.replace(pair.src.export(), num_blocks=600))
        with pytest.raises(CannotMap, match="no handle"):
            pair.reader.map_pool(dataclasses.replace(pair.src.export(), handle=b"short"))

    def test_memory_of_another_kind_is_refused(self, pair: Pair) -> None:
        with pytest.raises(CannotMap, match="memfd is not device memory"):
            pair.reader.map_pool(dataclasses.replace(pair.src.export(), memory="memfd"))


class TestOtherDevices:
    @pytest.mark.parametrize(("peers", "reaches"), [({b"fake device 0001": True}, True), ({b"fake device 0001": False}, False)])
    def test_it_is_mapped_where_there_is_peer_access(self, peers: dict[bytes, bool], reaches: bool) -> None:
        pair = Pair(reader=FakeDriver(peers=peers), owner=FakeDriver(uuid=b"fake device 0001"))
        if reaches:
            assert pair.copy(pair.reader.map_pool(pair.src.export()), [3]).result(timeout=60) == -1
        else:
            with pytest.raises(CannotMap, match="no peer access"):
                pair.reader.map_pool(pair.src.export())
        pair.close()

    def test_one_that_is_not_visible_here_is_tried(self) -> None:
        pair = Pair(owner=FakeDriver(uuid=b"fake device 0001"))
        assert pair.copy(pair.reader.map_pool(pair.src.export()), [3]).result(timeout=60) == -1
        pair.close()


class TestLifetime:
    def test_a_mapping_is_not_undone_under_a_copy(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        pair.driver.hold(pair.stream.handle)
        copied = pair.copy(mapped, [2, 4])
        pair.driver.wait_for(lambda: pair.driver.num_waiting(pair.stream.handle) > 0)
        mapped.close()
        assert pair.driver.left()["opened"] == 1
        pair.driver.release()
        assert copied.result(timeout=60) == -1
        pair.wait_closed()

    def test_a_copy_that_is_refused_lets_go_of_the_mapping(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        with pytest.raises(IndexError):
            pair.stream.submit(pair.dst.copy_from, mapped, [6], [0], [0]).result(timeout=60)
        assert pair.stream.submit(pair.dst.copy_from, mapped, [], [], []).result(timeout=60) == -1
        mapped.close()
        pair.wait_closed()

    def test_nothing_is_launched_once_the_owner_is_dead(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        before = contents(pair.dst)
        pair.kill_owner()
        with pytest.raises(PoolClosed, match="process 100"):
            pair.copy(mapped, [1]).result(timeout=60)
        np.testing.assert_array_equal(contents(pair.dst), before)
        pair.dst.check_integrity()
        mapped.close()
        pair.wait_closed()

    def test_a_copy_under_way_when_the_owner_dies_is_good_if_it_is_proven(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        pair.driver.hold(pair.stream.handle)
        copied = pair.copy(mapped, [2, 4])
        pair.driver.wait_for(lambda: pair.driver.num_waiting(pair.stream.handle) > 0)
        pair.kill_owner()
        pair.driver.release()
        assert copied.result(timeout=60) == -1
        np.testing.assert_array_equal(contents(pair.dst)[[2, 4]], contents(pair.src)[[2, 4]])

    def test_a_copy_under_way_when_the_owner_dies_is_refused_if_it_is_not(self, pair: Pair) -> None:
        """What the memory of a dead process holds is undefined; here, something else."""
        mapped = pair.reader.map_pool(pair.src.export())
        pair.driver.hold(pair.stream.handle)
        copied = pair.copy(mapped, [2, 4])
        pair.driver.wait_for(lambda: pair.driver.num_waiting(pair.stream.handle) > 0)
        write(pair.src, np.full((6, 1024), 0xEE, np.uint8))
        pair.kill_owner()
        pair.driver.release()
        with pytest.raises(PoolClosed, match="closed while it was copied"):
            copied.result(timeout=60)
        pair.dst.check_integrity()
        mapped.close()
        pair.wait_closed()

    def test_a_copy_under_way_when_the_owner_closes_is_refused_if_it_is_not_proven(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        pair.driver.hold(pair.stream.handle)
        copied = pair.copy(mapped, [2])
        pair.driver.wait_for(lambda: pair.driver.num_waiting(pair.stream.handle) > 0)
        write(pair.src, np.full((6, 1024), 0xEE, np.uint8))
        pair.src.close()
        pair.driver.release()
        with pytest.raises(PoolClosed):
            copied.result(timeout=60)

    def test_a_wrong_block_of_a_pool_that_is_there_is_wrong(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        write(pair.src, np.full((6, 1024), 0xEE, np.uint8))
        assert pair.copy(mapped, [2]).result(timeout=60) == 0

    def test_another_generation_is_another_mapping(self, pair: Pair) -> None:
        old = pair.reader.map_pool(pair.src.export())
        pair.src.close()
        again = pair.pool(pair.owner, seed=1)
        new = pair.reader.map_pool(again.export())
        assert (old.is_current, new.is_current) == (False, True)
        assert pair.copy(new, [0]).result(timeout=60) == -1
        old.close()
        new.close()
        pair.wait_closed()

    def test_close_of_the_backend_closes_what_is_still_mapped(self, pair: Pair) -> None:
        pair.reader.map_pool(pair.src.export())
        pair.reader.map_pool(pair.src.export())
        pair.reader.close()
        is_empty(pair.driver)

    def test_a_lost_context_ends_copies_and_close_returns(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        pair.driver.hold(pair.stream.handle)
        copied = pair.copy(mapped, [2])
        pair.driver.wait_for(lambda: pair.driver.num_waiting(pair.stream.handle) > 0)
        pair.driver.fail()
        with pytest.raises(DeviceFailed):
            copied.result(timeout=60)
        mapped.close()
        pair.reader.close()


class TestOrderBetweenProcesses:
    def test_a_copy_waits_for_what_the_owner_has_not_finished(self, pair: Pair) -> None:
        """Checksums that have come back are followed by the event; a reader asks for it before it launches."""
        mapped = pair.reader.map_pool(pair.src.export())
        owner_stream = pair.owner.open_stream("owner")
        pair.owner_driver.hold(pair.src.stream)
        sums = owner_stream.submit(pair.src.checksum, [0, 1]).result(timeout=60)
        copied = pair.copy(mapped, [0, 1])
        with pytest.raises(TimeoutError):
            copied.result(timeout=0.05)
        assert pair.driver.num_waiting(pair.stream.handle) == 0
        pair.owner_driver.release()
        assert copied.result(timeout=60) == -1
        assert sums == pair.checksums[:2]

    def test_an_owner_that_dies_before_its_event_does_not_hold_the_reader_up(self, pair: Pair) -> None:
        mapped = pair.reader.map_pool(pair.src.export())
        owner_stream = pair.owner.open_stream("owner")
        pair.owner_driver.hold(pair.src.stream)
        owner_stream.submit(pair.src.checksum, [0, 1]).result(timeout=60)
        copied = pair.copy(mapped, [0, 1])
        pair.kill_owner()
        with pytest.raises(PoolClosed, match="has ended"):
            copied.result(timeout=60)
        assert pair.stream.submit(int, "3").result(timeout=60) == 3
