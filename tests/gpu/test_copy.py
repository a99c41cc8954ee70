from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.copy import checksum_blocks, copy_checked

Bytes = npt.NDArray[np.uint8]
# Around every change of branch: the hash's short inputs, its stripes of 64, its blocks of 1,024, and streaming above 1 MiB.
SIZES = [
    1,
    63,
    64,
    65,
    240,
    241,
    255,
    256,
    257,
    1023,
    1024,
    1025,
    1088,
    2048,
    2049,
    65536,
    (2 << 20) - 1,
    2 << 20,
    (2 << 20) + 64,
]


def blocks(num_blocks: int, block_bytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)


def ids(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def sums(array: Bytes) -> npt.NDArray[np.uint64]:
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in array], dtype=np.uint64)


@pytest.mark.parametrize("block_bytes", SIZES)
def test_sizes_at_the_edges(block_bytes: int) -> None:
    src = blocks(3, block_bytes)
    dst = np.zeros((4, block_bytes), np.uint8)
    assert copy_checked(src, ids(2, 0), dst, ids(1, 3), sums(src[[2, 0]])) == -1
    np.testing.assert_array_equal(dst[[1, 3]], src[[2, 0]])
    assert not dst[[0, 2]].any()
    assert checksum_blocks(src, ids(1, 1, 2)) == sums(src[[1, 1, 2]]).tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=1, max_size=5000))
def test_the_checksum_is_xxh3(data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)[None]
    dst = np.zeros_like(array)
    assert checksum_blocks(array, ids(0)) == [xxhash.xxh3_64_intdigest(data)]
    assert copy_checked(array, ids(0), dst, ids(0), sums(array)) == -1
    assert dst.tobytes() == data


def test_memory_that_is_not_aligned_is_copied_too() -> None:
    size = 3 << 20
    src = blocks(1, size + 1)[:, 1:].copy()
    memory = np.zeros(size + 1, np.uint8)
    dst = memory[1:].reshape(1, size)
    assert copy_checked(src, ids(0), dst, ids(0), sums(src)) == -1
    np.testing.assert_array_equal(dst, src)


@pytest.mark.parametrize("block_bytes", [200, 3000, 2 << 20])
def test_the_first_wrong_block_is_named(block_bytes: int) -> None:
    src = blocks(4, block_bytes)
    expected = sums(src)
    expected[[1, 3]] += np.uint64(1)
    assert copy_checked(src, ids(0, 1, 2, 3), np.zeros_like(src), ids(0, 1, 2, 3), expected) == 1


def test_nothing_to_copy() -> None:
    src = blocks(2, 300)
    assert copy_checked(src, ids(), src.copy(), ids(), sums(src[:0])) == -1
    assert checksum_blocks(src, ids()) == []


def test_what_would_touch_other_memory_is_refused() -> None:
    src, dst = blocks(3, 300), blocks(3, 300)
    before = dst.copy()
    wide = blocks(3, 600)
    bad: list[tuple[type[Exception], Bytes, npt.NDArray[np.int64], Bytes, npt.NDArray[np.int64]]] = [
        (IndexError, src, ids(3), dst, ids(0)),
        (IndexError, src, ids(-1), dst, ids(0)),
        (IndexError, src, ids(0), dst, ids(3)),
        (ValueError, src, ids(0, 1), dst, ids(0)),
        (ValueError, wide[:, ::2], ids(0), dst, ids(0)),
        (ValueError, src, ids(0), wide[:, :300], ids(0)),
        (ValueError, wide, ids(0), dst, ids(0)),
        (ValueError, src[0], ids(0), dst, ids(0)),
    ]
    for error, source, source_ids, target, target_ids in bad:
        with pytest.raises(error):
            copy_checked(source, source_ids, target, target_ids, np.zeros(len(source_ids), np.uint64))
    with pytest.raises(ValueError, match="2 checksums for 1"):
        copy_checked(src, ids(0), dst, ids(0), np.zeros(2, np.uint64))
    np.testing.assert_array_equal(dst, before)


def test_a_read_only_destination_is_refused_and_a_read_only_source_is_not() -> None:
    src = blocks(2, 300)
    src.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_checked(src, ids(0), src, ids(1), sums(src[:1]))
    assert checksum_blocks(src, ids(1)) == sums(src[1:]).tolist()
