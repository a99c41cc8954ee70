"""The way from a shard to a device: pieces of any size and place, readers side by side, files that go away under way."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import epd.model.upload
from epd.errors import BadCheckpoint
from epd.model.checkpoint import Checkpoint, Entry
from epd.model.upload import upload

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
Written = dict[str, torch.Tensor]


def _write(folder: Path, tensors: Written, *, shards: int = 1, lead: int = 0) -> Written:
    """A checkpoint whose header is `lead` bytes longer than it need be, so that numbers begin where they like."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        header: dict[str, object] = {}
        data = b""
        for name in names[shard::shards]:
            raw = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
            header[name] = {
                "dtype": NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
            weight_map[name] = f"{shard}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 8 + lead)
        (folder / f"{shard}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def _random(seed: int, sizes: list[tuple[int, torch.dtype]]) -> Written:
    random = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(size, generator=random).to(dtype) for i, (size, dtype) in enumerate(sizes)}


def _entries(folder: Path, names: list[str]) -> dict[str, Entry]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.entry(name) for name in names}


def _upload(entries: dict[str, Entry], dtype: torch.dtype, **options: int) -> Written:
    targets = {name: torch.full(entry.shape, torch.nan, dtype=dtype) for name, entry in entries.items()}
    upload(entries, targets.__getitem__, lambda done, total: None, **options)
    return targets


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.one_of(st.integers(1, 40), st.integers(1, 9000)), st.sampled_from(list(NAMES))), min_size=1, max_size=12
    ),
    wanted=st.sets(st.integers(0, 11)),
    shards=st.integers(1, 3),
    lead=st.integers(0, 9),
    staging=st.sampled_from([4104, 4999, 8192, 40000, 1 << 20]),
    readers=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_number_arrives(
    sizes: list[tuple[int, torch.dtype]],
    wanted: set[int],
    shards: int,
    lead: int,
    staging: int,
    readers: int,
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    written = _write(folder, _random(len(sizes), sizes), shards=min(shards, len(sizes)), lead=lead)
    names = [name for i, name in enumerate(written) if i in wanted] or ["t0"]
    read = _upload(_entries(folder, names), dtype, num_readers=readers, staging_bytes=staging)
    for name in names:
        assert torch.equal(read[name], written[name].to(dtype))


def test_what_nobody_wants_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors between wanted ones are passed over, small ones are read along."""
    large, small = 600_000, 1000
    kinds = [
        (small, torch.float32),
        (large, torch.float32),
        (small, torch.float32),
        (small, torch.float32),
        (small, torch.float32),
    ]
    _write(tmp_path, _random(1, kinds))
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, len(buffers[0])))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    _upload(_entries(tmp_path, ["t0", "t2", "t4"]), torch.float32)
    assert len(reads) == 2
    assert all(offset % 4096 == 0 for offset, _ in reads)
    assert sum(num_bytes for _, num_bytes in reads) < 4 * 4 * small + 3 * 4096


def test_reads_are_large_and_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four readers are in the middle of a read at once, no read is larger than a staging buffer, and few are needed."""
    _write(tmp_path, _random(1, [(100_000, torch.bfloat16)] * 8))
    staging, together = 1 << 17, threading.Barrier(4, timeout=30)
    sizes: list[int] = []
    preadv = os.preadv

    def met(file: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        if len(sizes) <= 4:
            together.wait()
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", met)
    _upload(_entries(tmp_path, [f"t{i}" for i in range(8)]), torch.bfloat16, num_readers=4, staging_bytes=staging)
    assert max(sizes) <= staging
    assert len(sizes) == -(-1_600_000 // (staging - 4096))


def test_a_short_read_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _write(tmp_path, _random(1, [(5000, torch.float32)]))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:777]], offset))
    assert torch.equal(_upload(_entries(tmp_path, ["t0"]), torch.float32)["t0"], written["t0"])


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, _random(1, [(9000, torch.float32)] * 3))
    entries = _entries(tmp_path, ["t0", "t1", "t2"])
    os.truncate(tmp_path / "0.safetensors", 50_000)
    with pytest.raises(BadCheckpoint, match=r"0\.safetensors is cut off: it ends at byte 50000"):
        _upload(entries, torch.float32, staging_bytes=8192)


def test_a_file_that_has_gone_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, _random(1, [(10, torch.float32)]))
    entries = _entries(tmp_path, ["t0"])
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"0\.safetensors cannot be read: .*No such file"):
        _upload(entries, torch.float32)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("the device is gone")])
def test_a_failed_read_ends_all_readers_and_closes_the_files(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, _random(1, [(5000, torch.float32)] * 20))
    entries = _entries(tmp_path, [f"t{i}" for i in range(20)])
    calls = itertools.count()
    preadv = os.preadv

    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        if next(calls) == 3:
            raise error
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BadCheckpoint if isinstance(error, OSError) else RuntimeError, match=str(error.args[-1])):
        _upload(entries, torch.float32, num_readers=2, staging_bytes=8192)
    assert set(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_host_memory_is_the_staging_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, _random(1, [(5000, torch.float32)] * 20))
    taken: list[int] = []
    plain = epd.model.upload.staging_memory

    def counted(num_bytes: int, device: torch.device) -> torch.Tensor:
        taken.append(num_bytes)
        return plain(num_bytes, device)

    monkeypatch.setattr(epd.model.upload, "staging_memory", counted)
    _upload(_entries(tmp_path, [f"t{i}" for i in range(20)]), torch.float32, num_readers=3, staging_bytes=8192)
    assert taken == [8192] * 3


def test_tensors_may_share_their_bytes(tmp_path: Path) -> None:
    """Some writers store tied tensors once, under two names."""
    written = _write(tmp_path, _random(1, [(5000, torch.float32)]))
    file = tmp_path / "0.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["again"] = header["t0"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    (tmp_path / "model.safetensors.index.json").unlink()
    file.rename(tmp_path / "model.safetensors")
    for staging in (8192, 1 << 20):
        read = _upload(_entries(tmp_path, ["t0", "again"]), torch.float32, staging_bytes=staging)
        assert torch.equal(read["t0"], written["t0"])
        assert torch.equal(read["again"], written["t0"])


@pytest.mark.gpu
@pytest.mark.parametrize("stored", list(NAMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_arrives_on_a_gpu(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    written = _write(tmp_path, _random(3, [(1 + 40_000 * (i % 5), stored) for i in range(24)]), shards=3, lead=3)
    entries = _entries(tmp_path, list(written))
    targets = {name: torch.empty(entry.shape, dtype=dtype, device="cuda") for name, entry in entries.items()}
    upload(entries, targets.__getitem__, lambda done, total: None, staging_bytes=1 << 16)
    for name in written:
        np.testing.assert_array_equal(targets[name].cpu().float().numpy(), written[name].to(dtype).float().numpy())


@pytest.mark.gpu
def test_device_memory_is_the_tensors_and_one_staging_buffer(tmp_path: Path) -> None:
    _write(tmp_path, _random(3, [(400_000, torch.float32)] * 24))
    entries = _entries(tmp_path, [f"t{i}" for i in range(24)])
    targets = {name: torch.empty(entry.shape, dtype=torch.bfloat16, device="cuda") for name, entry in entries.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    upload(entries, targets.__getitem__, lambda done, total: None, staging_bytes=4 << 20)
    assert torch.cuda.max_memory_allocated() - before <= 4 << 20
