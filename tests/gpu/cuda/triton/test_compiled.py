"""What is launched for Qwen3-VL-8B, compiled for Hopper without one: it fits, spills nothing and uses what the chip is fast with.

The product's own functions launch on tensors without memory, and what would be launched is compiled and kept instead.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gpu.cuda.kernels import Chunks, ExpertGeometry, Geometry
from gpu.cuda.triton import TritonKernels
from gpu.cuda.triton.fused_linear import TritonFusedLinear

_NUM_SMS, _SHARED_BYTES = 132, 227 << 10  # of an H100 or H200; shared memory that one program can have
_REGISTERS = 64 << 10  # of one multiprocessor
_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

GEOMETRY = Geometry(
    dtype=torch.bfloat16,
    hidden_size=4096,
    intermediate_size=12288,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
)
# Qwen3-VL-30B-A3B's.
EXPERTS = ExpertGeometry(num_experts=128, num_chosen=8, intermediate_size=768, normalizes=True, is_turned=True)
EXPERTS_WIDTH = 2048
NUM_LAYERS, BLOCK_BYTES = 36, 36 * 2 * 8 * 16 * 128 * 2


@dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, ...]
    compiled: Any

    @property
    def shared_bytes(self) -> int:
        return int(self.compiled.metadata.shared)

    def sass(self, path: Path) -> str:
        return self._dump(path, "-sass")

    def local_bytes(self, path: Path) -> int:
        """Of memory that registers were spilled to, or arrays put into, per thread."""
        found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", self._dump(path, "-res-usage"))
        assert found
        return int(found[1]) + int(found[2])

    def registers(self, path: Path) -> int:
        """Per thread."""
        found = re.search(r"REG:(\d+)", self._dump(path, "-res-usage"))
        assert found
        return int(found[1])

    def _dump(self, path: Path, what: str) -> str:
        path.write_bytes(self.compiled.asm["cubin"])
        ended = subprocess.run([_DUMP, what, path], capture_output=True, text=True, check=True, timeout=60)
        return ended.stdout + ended.stderr


class Hopper:
    """Stands in for a device: launches are compiled for it and go no further."""

    def get_current_device(self) -> int:
        return -1  # so that nothing of it is ever taken for a real device's

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Grows with every launch."""
    made: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        made.append(Launch(self.__name__, grid, compiled))
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return made


def empty(*shape: int, dtype: torch.dtype = GEOMETRY.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_step(num_seqs: int, max_blocks: int) -> None:
    """What a decode step of the 8B model launches, by layer."""
    g, kernels = GEOMETRY, TritonKernels(_NUM_SMS)
    x, pool = empty(num_seqs, g.hidden_size), empty(20_000, NUM_LAYERS, 2, g.num_kv_heads, g.block_size, g.head_dim)
    q = empty(num_seqs, g.num_heads, g.head_dim)
    angles = empty(num_seqs, g.head_dim // 2, dtype=torch.float32)
    qkv = empty(num_seqs, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim)
    norm = empty(g.head_dim)
    workspace = empty(kernels.workspace_floats(num_seqs, g.num_heads, g.num_kv_heads, g.head_dim), dtype=torch.float32)
    tables, lens = empty(num_seqs, max_blocks, dtype=torch.int32), empty(num_seqs, dtype=torch.int32)
    kernels.rms_norm(x, x[0], 1e-6, empty(num_seqs, g.hidden_size))
    kernels.add_rms_norm(x, empty(num_seqs, g.hidden_size), x[0], 1e-6, x)
    kernels.rope_store(qkv, norm, norm, 1e-6, angles, angles, pool, 35, empty(num_seqs, dtype=torch.int64), q)
    kernels.paged_attention(q, pool, 1, tables, lens, 0.09, q, workspace)
    kernels.silu_mul(empty(num_seqs, 2 * g.intermediate_size), empty(num_seqs, g.intermediate_size))


def launch_linear(num_rows: int) -> None:
    """The linear layers of a decode step of few rows, and the output layer."""
    g, fused = GEOMETRY, TritonFusedLinear()
    x, inner = empty(num_rows, g.hidden_size), empty(num_rows, g.intermediate_size)
    heads = g.num_heads * g.head_dim
    num_qkv = heads + 2 * g.num_kv_heads * g.head_dim
    fused.norm_linear(x, x[0], 1e-6, empty(num_qkv, g.hidden_size), empty(num_rows, num_qkv))
    fused.linear_add(empty(num_rows, heads), empty(g.hidden_size, heads), x)
    fused.norm_silu_mul(x, x[0], 1e-6, empty(2 * g.intermediate_size, g.hidden_size), inner)
    fused.linear_add(inner, empty(g.hidden_size, g.intermediate_size), x)
    logits = empty(num_rows, 151_936, dtype=torch.float32)
    fused.norm_linear(x, x[0], 1e-6, empty(151_936, g.hidden_size), logits)


def launch_chunk(num_tokens: int, context_len: int) -> None:
    g, kernels = GEOMETRY, TritonKernels(_NUM_SMS)
    pool = empty(20_000, NUM_LAYERS, 2, g.num_kv_heads, g.block_size, g.head_dim)
    q, table = empty(num_tokens, g.num_heads, g.head_dim), empty(context_len, dtype=torch.int32)
    kernels.chunk_attention(q, pool, 1, table, context_len, 0.09, q)
    tables, spans = empty(2, context_len, dtype=torch.int32), empty(3, 2, dtype=torch.int32)
    chunks = Chunks((num_tokens - 1, 1), (context_len, context_len), spans, tables)
    kernels.varlen_chunk_attention(q, pool, 1, chunks, 0.09, q)
    rows = empty(2, g.num_kv_heads, context_len, g.head_dim)
    kernels.gather_kv(pool, 1, table, context_len, rows[0], rows[1])


def launch_transfer(num_blocks: int) -> None:
    kernels = TritonKernels(_NUM_SMS)
    blocks, ids = empty(20_000, BLOCK_BYTES, dtype=torch.uint8), empty(num_blocks, dtype=torch.int64)
    kernels.copy_blocks(blocks, ids, blocks, ids, ids)
    kernels.copy_blocks(blocks, ids, blocks, ids, None)
    kernels.hash_blocks(blocks, ids, ids)


def launch_experts(num_rows: int, experts: ExpertGeometry = EXPERTS) -> None:
    e, kernels, width = experts, TritonKernels(_NUM_SMS), EXPERTS_WIDTH
    x, logits = empty(num_rows, width), empty(num_rows, e.num_experts, dtype=torch.float32)
    if e.is_turned:
        gate_up = empty(e.num_experts, width, 2 * e.intermediate_size).transpose(1, 2)
        down = empty(e.num_experts, e.intermediate_size, width).transpose(1, 2)
    else:
        gate_up, down = empty(e.num_experts, 2 * e.intermediate_size, width), empty(e.num_experts, width, e.intermediate_size)
    kernels.experts(x, logits, gate_up, down, e.num_chosen, e.normalizes, empty(num_rows, width))


def launch_model() -> None:
    for num_seqs, max_blocks in [(1, 64), (3, 2048), (64, 512), (256, 512)]:
        launch_step(num_seqs, max_blocks)
    for num_tokens, context_len in [(8192, 8192), (2048, 9000), (513, 1025), (300, 300), (7, 3000)]:
        launch_chunk(num_tokens, context_len)
    launch_transfer(455)
    for num_rows in (1, 2, 3, 4):
        launch_linear(num_rows)


def test_everything_fits_and_spills_nothing(launches: list[Launch], tmp_path: Path) -> None:
    launch_model()
    distinct = {launch.compiled.hash: launch for launch in launches}
    assert len(distinct) < len(launches)
    for launch in distinct.values():
        assert launch.shared_bytes <= _SHARED_BYTES, launch
        assert launch.local_bytes(tmp_path / "kernel") == 0, launch


def test_after_the_warm_up_nothing_is_compiled(launches: list[Launch]) -> None:
    TritonKernels(_NUM_SMS).warm_up(GEOMETRY, torch.device("meta"))
    warm = {launch.compiled.hash for launch in launches}
    launches.clear()
    launch_model()
    assert launches
    assert {launch.name for launch in launches if launch.compiled.hash not in warm} == set()


@pytest.mark.parametrize("is_turned", [False, True], ids=["as transformers saves them", "as published"])
def test_experts_fit_spill_nothing_and_use_the_tensor_cores(launches: list[Launch], tmp_path: Path, is_turned: bool) -> None:
    """After the warm-up nothing is compiled."""
    experts = replace(EXPERTS, is_turned=is_turned)
    TritonKernels(_NUM_SMS).warm_up(replace(GEOMETRY, hidden_size=EXPERTS_WIDTH, experts=experts), torch.device("meta"))
    warm = {launch.compiled.hash for launch in launches}
    launches.clear()
    for num_rows in (1, 8, 64, 256, 300, 700, 1500, 8192):
        launch_experts(num_rows, experts)
    distinct = {launch.compiled.hash: launch for launch in launches}
    assert distinct.keys() <= warm
    for launch in distinct.values():
        assert launch.shared_bytes <= _SHARED_BYTES, launch
        assert launch.local_bytes(tmp_path / "kernel") == 0, launch
    products = [launch for launch in distinct.values() if launch.name == "_multiply_tile"]
    assert len(products) == 8
    for launch in products:
        code = launch.sass(tmp_path / "kernel")
        assert re.search(r"HGMMA|HMMA", code), launch
        assert re.search(r"LDGSTS\S*\.128", code), "weights do not come sixteen bytes at a time"


def test_a_set_whose_fused_layers_cannot_be_compiled_goes_without(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(TritonFusedLinear, "linear_add", fail)
    kernels = TritonKernels(_NUM_SMS)
    with pytest.warns(RuntimeWarning, match="no fused linear layers: no such instruction"):
        kernels.warm_up(GEOMETRY, torch.device("meta"))
    assert kernels.fused is None
    assert "_attend_part" in {launch.name for launch in launches}


def test_float32_fits(launches: list[Launch]) -> None:
    TritonKernels(_NUM_SMS).warm_up(replace(GEOMETRY, dtype=torch.float32), torch.device("meta"))
    assert max(launch.shared_bytes for launch in launches) <= _SHARED_BYTES


def test_long_chunks_use_the_matrix_units_and_load_ahead(launches: list[Launch], tmp_path: Path) -> None:
    launch_chunk(8192, 8192)
    sass = launches[0].sass(tmp_path / "kernel")
    assert "HGMMA.64x" in sass
    assert "LDGSTS.E.BYPASS.128" in sass


def test_decode_attention_loads_sixteen_bytes_at_a_time_far_ahead(launches: list[Launch], tmp_path: Path) -> None:
    launch_step(64, 512)
    launch = next(launch for launch in launches if launch.name == "_attend_part")
    sass = launch.sass(tmp_path / "kernel")
    assert "HMMA" in sass
    assert "LDGSTS.E.BYPASS.128" in sass
    assert 2 * launch.shared_bytes <= _SHARED_BYTES  # two programs are resident, as the number of parts reckons with
    assert launch.shared_bytes > 3 * 2 * 64 * 128 * 2  # three tiles of keys and values are on their way


def test_one_long_context_fills_the_device(launches: list[Launch]) -> None:
    launch_step(1, 2048)
    launch = next(launch for launch in launches if launch.name == "_attend_part")
    assert 2 * _NUM_SMS - 8 < launch.grid[0] * launch.grid[1] * launch.grid[2] <= 2 * _NUM_SMS


def test_linear_layers_of_a_few_rows_keep_the_memory_busy(launches: list[Launch], tmp_path: Path) -> None:
    """Weights come sixteen bytes at a time, past what is kept, enough of them at once for the chip's latency; no thread waits."""
    for num_rows in (1, 2, 4):
        launches.clear()
        launch_linear(num_rows)
        for launch in launches:
            loop = _loop(launch.sass(tmp_path / "kernel"))
            num_loads = len(re.findall(r"LDG\.E\.EF\.128", loop))
            resident = min(_REGISTERS // (launch.registers(tmp_path / "kernel") * 128), launch.grid[0] // _NUM_SMS)
            assert num_loads == 4, launch
            assert resident * num_loads * 128 * 16 >= 40 << 10, (launch, resident)
            assert not re.search(r"BAR|STS|LDS|SHFL", loop), launch


def _loop(sass: str) -> str:
    """From where the only jump back goes to, to that jump."""
    places = {int(found[1], 16): found.start() for found in re.finditer(r"/\*([0-9a-f]{4})\*/ ", sass)}
    jumps = [
        (int(found[1], 16), int(found[2], 16)) for found in re.finditer(r"/\*([0-9a-f]{4})\*/ .*\bBRA 0x([0-9a-f]+) ;", sass)
    ]
    ((end, start),) = ((at, to) for at, to in jumps if to < at)
    return sass[places[start] : places[end]]


def test_copies_move_sixteen_bytes_at_a_time(launches: list[Launch], tmp_path: Path) -> None:
    launch_transfer(3)
    sass = launches[0].sass(tmp_path / "kernel")
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) == 8
    assert len(re.findall(r"STG\.E\.EF\.128", sass)) == 8
