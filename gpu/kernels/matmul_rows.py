"""matmul_rows: rows times a matrix as checkpoints store it, out = x @ weight.T.

A decode step multiplies one to some tens of rows with every weight of the model, and reading the weights is most of the work.
BLAS libraries rearrange the matrix first, which pays for hundreds of rows. Here a tile of some matrix rows goes straight through
the vector registers against 4 rows of x, while the next tile is fetched into the cache. (The loop order of Goto and van de Geijn,
ACM TOMS 2008, without their packing.)

Each output is summed in the same order whatever the number of rows: lanes of k, then a tree over the lanes, then what is left of
k. So a row's result is the same to the last bit, alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils as _untyped
from numba.core.typing.templates import Signature

from gpu.kernels.checks import expect
from gpu.kernels.compiler import emitted, kernel

Float = npt.NDArray[np.float32]
cgutils: Any = _untyped

_NUM_LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_FLOAT, _NUM_LANES)
# Numbers of x that stay in the second-level cache while the matrix passes by.
_PANEL_NUMBERS = 128 * 3072
# Matrix rows in a tile, against 4 rows of x: as many sums as fit the 32 or 16 vector registers.
_TILE = 6 if _NUM_LANES == 16 else 3


def matmul_rows(x: Float, weight: Float, out: Float, column: int = 0) -> None:
    """out[:, column : column + len(weight)] = x @ weight.T.

    x: float32 [n, width]; weight: float32 [num_outputs, width]; out: float32 [n, >= column + num_outputs]; all contiguous.
    Raises ValueError for shapes and layouts.
    """
    expect(weight, (len(weight), x.shape[1]), "weight")
    expect(out, (len(x), out.shape[1]), "out")
    if not (x.flags.c_contiguous and weight.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("x, weight and out must be contiguous")
    if x.dtype != np.float32 or weight.dtype != np.float32 or out.dtype != np.float32:
        raise ValueError("x, weight and out must be float32")
    if not 0 <= column <= out.shape[1] - len(weight):
        raise ValueError(f"{len(weight)} outputs from column {column} do not fit rows of {out.shape[1]}")
    matmul_rows_at(x.ctypes.data, weight.ctypes.data, out.ctypes.data + 4 * column, len(x), len(weight), x.shape[1], out.shape[1])


def matmul_rows_at(x: int, weight: int, out: int, num_rows: int, num_outputs: int, width: int, out_width: int) -> None:
    """As matmul_rows, by addresses, which are trusted; out_width: distance of out's rows in numbers."""
    _matmul_rows(x, weight, out, num_rows, num_outputs, width, out_width)


def _tile(num_rows: int, num_outputs: int, *, fetch: bool) -> Callable[[int, int, int, int, int], bool]:
    """An operation: num_rows x num_outputs results from x and weight, rows of `width` numbers, to out, rows of `out_width`."""

    @emitted
    def tile(_context: Any, x: Any, weight: Any, out: Any, width: Any, out_width: Any) -> tuple[Signature, Callable[..., Any]]:
        def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
            _emit_tile(builder, args, num_rows, num_outputs, fetch)
            return ir.Constant(ir.IntType(1), 0)

        return types.boolean(types.int64, types.int64, types.int64, types.int64, types.int64), emit

    return tile


def _emit_tile(builder: ir.IRBuilder, args: tuple[ir.Value, ...], num_rows: int, num_outputs: int, fetch: bool) -> None:
    x, weight, out, width, out_width = args
    row_bytes = builder.mul(width, _int(4))
    xs = [builder.add(x, builder.mul(row_bytes, _int(i))) for i in range(num_rows)]
    ws = [builder.add(weight, builder.mul(row_bytes, _int(i))) for i in range(num_outputs)]
    cells = [(i, j) for i in range(num_rows) for j in range(num_outputs)]
    sums = {cell: cgutils.alloca_once_value(builder, ir.Constant(_LANES, [0.0] * _NUM_LANES)) for cell in cells}
    tile_bytes = builder.mul(row_bytes, _int(num_outputs))
    with cgutils.for_range(builder, builder.udiv(width, _int(_NUM_LANES))) as loop:
        at = builder.mul(loop.index, _int(4 * _NUM_LANES))
        w_lanes = [_load(builder, _LANES, builder.add(w, at)) for w in ws]
        if fetch:
            for w in ws:
                _emit_fetch(builder, builder.add(builder.add(w, at), tile_bytes))
        for i, row in enumerate(xs):
            x_lanes = _load(builder, _LANES, builder.add(row, at))
            for j in range(num_outputs):
                builder.store(_multiply_add(builder, x_lanes, w_lanes[j], builder.load(sums[i, j])), sums[i, j])
    totals = {cell: cgutils.alloca_once_value(builder, _across(builder, builder.load(sums[cell]))) for cell in cells}
    done = builder.mul(builder.udiv(width, _int(_NUM_LANES)), _int(_NUM_LANES))
    with cgutils.for_range(builder, builder.sub(width, done)) as loop:
        at = builder.mul(builder.add(done, loop.index), _int(4))
        for i, j in cells:
            left, right = _load(builder, _FLOAT, builder.add(xs[i], at)), _load(builder, _FLOAT, builder.add(ws[j], at))
            builder.store(_multiply_add(builder, left, right, builder.load(totals[i, j])), totals[i, j])
    for i, j in cells:
        at = builder.add(out, builder.mul(builder.add(builder.mul(out_width, _int(i)), _int(j)), _int(4)))
        builder.store(builder.load(totals[i, j]), builder.inttoptr(at, _FLOAT.as_pointer()), align=4)


def _across(builder: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    """The sum of all lanes: the upper half is added to the lower until one is left."""
    count = _NUM_LANES
    while count > 1:
        count //= 2
        upper = [ir.Constant(_INT32, count + i) for i in range(count)]
        lower = [ir.Constant(_INT32, i) for i in range(count)]
        picks = [ir.Constant(ir.VectorType(_INT32, count), half) for half in (lower, upper)]
        lanes = builder.fadd(builder.shuffle_vector(lanes, lanes, picks[0]), builder.shuffle_vector(lanes, lanes, picks[1]))
    return builder.extract_element(lanes, ir.Constant(_INT32, 0))


def _emit_fetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    fetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    read, keep, data = 0, 3, 1
    builder.call(fetch, [builder.inttoptr(address, pointer), *(ir.Constant(_INT32, each) for each in (read, keep, data))])


def _multiply_add(builder: ir.IRBuilder, left: ir.Value, right: ir.Value, addend: ir.Value) -> ir.Value:
    kind = left.type
    name = f"llvm.fma.v{_NUM_LANES}f32" if kind == _LANES else "llvm.fma.f32"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(fma, [left, right, addend])


def _load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


_first_tile_4 = _tile(4, _TILE, fetch=True)
_tile_4 = _tile(4, _TILE, fetch=True)
_first_tile_3 = _tile(3, _TILE, fetch=True)
_first_tile_2 = _tile(2, _TILE, fetch=True)
_tile_4 = _tile(4, _TILE, fetch=False)
_tile_3 = _tile(3, _TILE, fetch=True)
_tile_2 = _tile(2, _TILE, fetch=True)
_tile_1 = _tile(1, _TILE, fetch=False)
_one = _tile(1, 1, fetch=False)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def _matmul_rows(x: int, weight: int, out: int, num_rows: int, num_outputs: int, width: int, out_width: int) -> None:
    row_bytes = 4 * width
    if num_rows == 1 or num_outputs < _TILE:
        # One after the other, so that the matrix is read from its beginning to its end: the processor sees that coming.
        for j in range(num_outputs):
            for i in range(num_rows):
                _one(x + i * row_bytes, weight + j * row_bytes, out + 4 * (i * out_width + j), width, out_width)
        return
    panel = max(4, min(128, _PANEL_NUMBERS // width // 4 * 4))
    for start in range(0, num_rows, panel):
        end = min(start + panel, num_rows)
        for tile in range((num_outputs + _TILE - 1) // _TILE):
            j = min(tile * _TILE, num_outputs - _TILE)  # the last tile overlaps the one before
            w, o = weight + j * row_bytes, out + 4 * j
            i = start
            if end - i >= 4:
                _first_tile_4(x + i * row_bytes, w, o + 4 * i * out_width, width, out_width)
                i += 4
            while end - i >= 4:
                _tile_4(x + i * row_bytes, w, o + 4 * i * out_width, width, out_width)
                i += 4
            if end - i == 3:
                _tile_3(x + i * row_bytes, w, o + 4 * i * out_width, width, out_width)
            elif end - i == 2:
                _tile_2(x + i * row_bytes, w, o + 4 * i * out_width, width, out_width)
            elif end - i == 1:
                _tile_1(x + i * row_bytes, w, o + 4 * i * out_width, width, out_width)
