"""Blocks at addresses: hash_rows, and copy_and_hash_rows, which copies in the same pass.

The hash is XXH3-64 (Yann Collet, xxHash 0.8, the branch for inputs over 240 bytes). Why not the library's: it hashes what has
already been copied, in pieces, taking the interpreter's lock between them, and a busy event loop gives that lock back after five
milliseconds. Here one call copies and hashes any number of blocks without the lock: a stripe of 64 bytes is loaded once, stored,
and added to the hash from the register that it is in. The eight lanes of the hash are one LLVM vector, which becomes as many
registers as the processor needs.

A store may be non-temporal: it goes to memory without first reading the destination's lines into the cache. That is faster for
what is too large to be read from the cache afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature

from gpu.kernels.compiler import emitted, inlined, kernel

Ids = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]

MIN_HASHED_BYTES = 241  # shorter inputs are hashed in other ways

_STRIPE = 64
_STRIPES = 16  # in one of the hash's own blocks, which have nothing to do with a pool's
_LAST_STRIPE_KEY = 192 - _STRIPE - 7  # where in the secret the keys of the last stripe, of the scramble and of the merge begin
_SCRAMBLE_KEY = 192 - _STRIPE
_MERGE_KEY = 11
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_AVALANCHE = np.uint64(0x165667919E3779F9)
_LENGTH_PRIME = np.uint64(_PRIME64_1)
_START = np.array(
    [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1],
    dtype=np.uint64,
)
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    dtype=np.uint8,
)
_MERGE_SECRET = np.frombuffer(_SECRET[_MERGE_KEY : _MERGE_KEY + 64].tobytes(), dtype=np.uint64)
_LANES = ir.VectorType(ir.IntType(64), 8)
_NEIGHBOURS = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])

# What is done with a stripe beside hashing it.
_NO_STORE, _STORE, _STREAM = 0, 1, 2


def hash_rows(src: int, src_ids: Ids, block_bytes: int, sums: Sums) -> None:
    """sums[i] = XXH3-64 of the block_bytes (>= MIN_HASHED_BYTES) at address src + src_ids[i] * block_bytes."""
    _hash_rows(src, src_ids, block_bytes, sums)


def copy_and_hash_rows(src: int, src_ids: Ids, dst: int, dst_ids: Ids, block_bytes: int, sums: Sums, streaming: bool) -> None:
    """hash_rows of rows `src_ids`, which are copied to address dst + dst_ids[i] * block_bytes on the way.

    `streaming` asks for non-temporal stores; then `dst` and `block_bytes` are multiples of 64. Addresses are trusted.
    """
    _copy_and_hash_rows(src, src_ids, dst, dst_ids, block_bytes, sums, streaming)


def _stripes(num_stripes: int, storing: int) -> Callable[[int, int, int, int], None]:
    """An operation that adds `num_stripes` stripes at `src` to the lanes at `lanes`, with keys from `key`, storing to `dst`."""

    @emitted
    def add_stripes(_context: Any, lanes: Any, src: Any, key: Any, dst: Any) -> tuple[Signature, Callable[..., Any]]:
        def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
            lanes_at = _vector_at(builder, args[0], 0)
            lanes = builder.load(lanes_at, align=8)
            for stripe in range(num_stripes):
                data = builder.load(_vector_at(builder, args[1], stripe * _STRIPE), align=1)
                if storing != _NO_STORE:
                    _emit_store(builder, data, _vector_at(builder, args[3], stripe * _STRIPE), storing)
                keyed = builder.xor(data, builder.load(_vector_at(builder, args[2], stripe * 8), align=1))
                product = builder.mul(builder.and_(keyed, _every(0xFFFFFFFF)), builder.lshr(keyed, _every(32)))
                swapped = builder.shuffle_vector(data, data, _NEIGHBOURS)
                lanes = builder.add(lanes, builder.add(swapped, product))
            builder.store(lanes, lanes_at, align=8)
            return ir.Constant(ir.IntType(1), 0)

        return types.boolean(types.int64, types.int64, types.int64, types.int64), emit

    return add_stripes


def _emit_store(builder: ir.IRBuilder, data: ir.Value, at: ir.Value, storing: int) -> None:
    if storing == _STORE:
        builder.store(data, at, align=1)
        return
    store = builder.store(data, at, align=_STRIPE)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@emitted
def _scramble(_context: Any, lanes: Any, key: Any) -> tuple[Signature, Callable[..., Any]]:
    """What is done to the lanes at `lanes` after every block of the hash."""

    def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
        lanes_at = _vector_at(builder, args[0], 0)
        lanes = builder.load(lanes_at, align=8)
        key = builder.load(_vector_at(builder, args[1], 0), align=1)
        mixed = builder.xor(builder.xor(lanes, builder.lshr(lanes, _every(47))), key)
        builder.store(builder.mul(mixed, _every(_PRIME32_1)), lanes_at, align=8)
        return ir.Constant(ir.IntType(1), 0)

    return types.boolean(types.int64, types.int64), emit


@emitted
def _fold(_context: Any, left: Any, right: Any) -> tuple[Signature, Callable[..., Any]]:
    """The two halves of the 128 bit product of two uint64, xored."""

    def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
        wide, narrow = ir.IntType(128), ir.IntType(64)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.xor(builder.trunc(product, narrow), builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), narrow))

    return types.uint64(types.uint64, types.uint64), emit


@emitted
def _fence(_context: Any) -> tuple[Signature, Callable[..., Any]]:
    """Non-temporal stores are in order with what follows only after a fence."""

    def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
        builder.fence("seq_cst")
        return ir.Constant(ir.IntType(1), 0)

    return types.boolean(), emit


def _vector_at(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    return builder.inttoptr(builder.add(address, ir.Constant(ir.IntType(64), offset)), _LANES.as_pointer())


def _every(value: int) -> ir.Constant:
    return ir.Constant(_LANES, [value] * 8)


_hash_block = _stripes(_STRIPES, _NO_STORE)
_hash_stripe = _stripes(1, _NO_STORE)
_copy_block = _stripes(_STRIPES, _STORE)
_copy_stripe = _stripes(1, _STORE)
_stream_block = _stripes(_STRIPES, _STREAM)


@inlined
def _merge(lanes: Sums, num_bytes: int) -> np.uint64:
    """The lanes as one number."""
    result = np.uint64(num_bytes) * _LENGTH_PRIME
    for pair in range(4):
        result += _fold(lanes[2 * pair] ^ _MERGE_SECRET[2 * pair], lanes[2 * pair + 1] ^ _MERGE_SECRET[2 * pair + 1])
    result ^= result >> np.uint64(37)
    result *= _AVALANCHE
    mixed: np.uint64 = result ^ (result >> np.uint64(32))
    return mixed


@kernel("void(int64, int64[::1], int64, uint64[::1])")
def _hash_rows(src: int, src_ids: Ids, block_bytes: int, sums: Sums) -> None:
    lanes = np.empty(8, np.uint64)
    secret = _SECRET.copy()
    lanes_at, key = lanes.ctypes.data, secret.ctypes.data
    num_blocks = (block_bytes - 1) // (_STRIPE * _STRIPES)
    num_stripes = (block_bytes - 1) // _STRIPE - num_blocks * _STRIPES
    for row in range(src_ids.shape[0]):
        start = src + src_ids[row] * block_bytes
        at = start
        lanes[:] = _START
        for _ in range(num_blocks):
            _hash_block(lanes_at, at, key, 0)
            _scramble(lanes_at, key + _SCRAMBLE_KEY)
            at += _STRIPE * _STRIPES
        for stripe in range(num_stripes):
            _hash_stripe(lanes_at, at, key + stripe * 8, 0)
            at += _STRIPE
        _hash_stripe(lanes_at, start + block_bytes - _STRIPE, key + _LAST_STRIPE_KEY, 0)
        sums[row] = _merge(lanes, block_bytes)


@kernel("void(int64, int64[::1], int64, int64[::1], int64, uint64[::1], boolean)")
def _copy_and_hash_rows(src: int, src_ids: Ids, dst: int, dst_ids: Ids, block_bytes: int, sums: Sums, streaming: bool) -> None:
    lanes = np.empty(8, np.uint64)
    secret = _SECRET.copy()
    lanes_at, key = lanes.ctypes.data, secret.ctypes.data
    num_blocks = (block_bytes - 1) // (_STRIPE * _STRIPES)
    num_stripes = (block_bytes - 1) // _STRIPE - num_blocks * _STRIPES
    for row in range(src_ids.shape[0]):
        start = src + src_ids[row] * block_bytes
        end = start + block_bytes
        shift = dst + dst_ids[row] * block_bytes - start
        at = start
        lanes[:] = _START
        for _ in range(num_blocks):
            if streaming:
                _stream_block(lanes_at, at, key, at + shift)
            else:
                _copy_block(lanes_at, at, key, at + shift)
            _scramble(lanes_at, key + _SCRAMBLE_KEY)
            at += _STRIPE * _STRIPES
        for stripe in range(num_stripes):
            _copy_stripe(lanes_at, at, key + stripe * 8, at + shift)
            at += _STRIPE
        _copy_stripe(lanes_at, end - _STRIPE, key + _LAST_STRIPE_KEY, end - _STRIPE + shift)
        sums[row] = _merge(lanes, block_bytes)
    _fence()
