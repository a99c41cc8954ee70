"""One launch of everything that a model of some geometry launches: a kernel is compiled where it is called first.

Small inputs do: what is compiled depends on widths, dtypes and on the choice of tiles, of which each is asked for here.
"""

from __future__ import annotations

import torch

from gpu.cuda.kernels import Chunks, ExpertGeometry, FusedLinear, Geometry, Kernels
from gpu.cuda.triton.experts import SHAPES

_MAX_CHUNK = 4096  # tokens: longer chunks are cut into the same tiles


def launch_everything(kernels: Kernels, geometry: Geometry, device: torch.device) -> None:
    """Leaves nothing behind but compiled kernels."""
    _launch_rows(kernels, geometry, device)
    if geometry.experts is not None:
        _launch_experts(kernels, geometry, geometry.experts, device)
    _launch_attention(kernels, geometry, device)
    _launch_blocks(kernels, device)


def _launch_rows(kernels: Kernels, geometry: Geometry, device: torch.device) -> None:
    g = geometry
    x = torch.zeros((1, g.hidden_size), dtype=g.dtype, device=device)
    kernels.rms_norm(x, x[0], 1e-6, x)
    kernels.add_rms_norm(x, torch.zeros_like(x), x[0], 1e-6, x)
    gate_up = torch.zeros((1, 2 * g.intermediate_size), dtype=g.dtype, device=device)
    kernels.silu_mul(gate_up, gate_up[:, : g.intermediate_size].contiguous())
    norm = torch.zeros(g.head_dim, dtype=g.dtype, device=device) if g.has_qk_norm else None
    angles = torch.zeros((1, g.head_dim // 2), device=device)
    qkv = torch.zeros((1, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim), dtype=g.dtype, device=device)
    q = torch.zeros((1, g.num_heads, g.head_dim), dtype=g.dtype, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    kernels.rope_store(qkv, norm, norm, 1e-6, angles, angles, _pool(g, 1, device), 0, slots, q)


def _launch_experts(kernels: Kernels, geometry: Geometry, experts: ExpertGeometry, device: torch.device) -> None:
    """All experts lie in the memory of one."""
    e, width = experts, geometry.hidden_size

    def weight(num_columns: int, num_inputs: int) -> torch.Tensor:
        one = torch.zeros((num_columns, num_inputs), dtype=geometry.dtype, device=device)
        return (one.view(num_inputs, num_columns).t() if e.is_turned else one).expand(e.num_experts, -1, -1)

    gate_up, down = weight(2 * e.intermediate_size, width), weight(width, e.intermediate_size)
    for shape in SHAPES:
        num_rows = max(1, shape.rows * e.num_experts // e.num_chosen)
        x = torch.zeros((num_rows, width), dtype=geometry.dtype, device=device)
        logits = torch.zeros((num_rows, e.num_experts), device=device)
        kernels.experts(x, logits, gate_up, down, e.num_chosen, e.normalizes, torch.empty_like(x))


def launch_linear(fused: FusedLinear, geometry: Geometry, device: torch.device) -> None:
    """One column each: how many there are is not compiled."""
    g, num_rows = geometry, 1
    while num_rows <= fused.max_rows:
        x = torch.zeros((num_rows, g.hidden_size), dtype=g.dtype, device=device)
        out = torch.zeros((num_rows, 1), dtype=g.dtype, device=device)
        fused.norm_linear(x, x[0], 1e-6, x[:1], out)
        fused.norm_linear(x, x[0], 1e-6, x[:1], out.float())
        fused.norm_silu_mul(x, x[0], 1e-6, torch.zeros((2, g.hidden_size), dtype=g.dtype, device=device), out)
        for width in (g.num_heads * g.head_dim, g.intermediate_size):
            inner = torch.zeros((num_rows, width), dtype=g.dtype, device=device)
            fused.linear_add(inner, inner[:1], out)
        num_rows *= 2


def _launch_attention(kernels: Kernels, geometry: Geometry, device: torch.device) -> None:
    g = geometry
    max_blocks = -(-_MAX_CHUNK // g.block_size)
    pool = _pool(g, max_blocks, device)
    table = torch.zeros((1, max_blocks), dtype=torch.int32, device=device)
    lens = torch.ones(1, dtype=torch.int32, device=device)
    q = torch.zeros((_MAX_CHUNK, g.num_heads, g.head_dim), dtype=g.dtype, device=device)
    out = torch.zeros_like(q)
    workspace = torch.empty(kernels.workspace_floats(1, g.num_heads, g.num_kv_heads, g.head_dim), device=device)
    for num_blocks in (0, max_blocks):  # in one part, in several
        kernels.paged_attention(q[:1], pool, 0, table[:, :num_blocks], lens, 1.0, out[:1], workspace)
    num_tokens = 1
    while num_tokens <= _MAX_CHUNK:
        kernels.chunk_attention(q[:num_tokens], pool, 0, table[0], num_tokens, 1.0, out[:num_tokens])
        if num_tokens > 1:
            spans = torch.tensor([[0, 1], [1, num_tokens - 1], [1, num_tokens - 1]], dtype=torch.int32, device=device)
            chunks = Chunks((1, num_tokens - 1), (1, num_tokens - 1), spans, table.expand(2, -1))
            kernels.varlen_chunk_attention(q[:num_tokens], pool, 0, chunks, 1.0, out[:num_tokens])
        num_tokens *= 2
    rows = torch.zeros((2, g.num_kv_heads, 1, g.head_dim), dtype=g.dtype, device=device)
    kernels.gather_kv(pool, 0, table[0], 1, rows[0], rows[1])


def _launch_blocks(kernels: Kernels, device: torch.device) -> None:
    blocks = torch.zeros((2, 64), dtype=torch.uint8, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    sums = torch.zeros_like(ids)
    kernels.copy_blocks(blocks[:1], ids, blocks[1:], ids, sums)
    kernels.copy_blocks(blocks[:1], ids, blocks[1:], ids, None)
    kernels.hash_blocks(blocks, ids, sums)


def _pool(geometry: Geometry, num_blocks: int, device: torch.device) -> torch.Tensor:
    g = geometry
    return torch.zeros((num_blocks, 1, 2, g.num_kv_heads, g.block_size, g.head_dim), dtype=g.dtype, device=device)
