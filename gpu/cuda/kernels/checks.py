"""What every set of kernels checks before it launches anything: shapes, dtypes, strides, devices. Facts of the host only.

The values in device memory are never looked at: that would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.cuda.kernels import Chunks

FLOATS = (torch.bfloat16, torch.float32)


def expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str, *, like: Tensor) -> None:
    """Raises unless `tensor` is contiguous, of this shape and dtype, and on the device of `like`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} and not {shape}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype} and not {dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and not on {like.device}")


def check_rms_norm(x: Tensor, weight: Tensor, out: Tensor, delta: Tensor | None = None) -> None:
    _expect_dims(x, 2, "x")
    _expect_float(x, "x")
    shape = (x.shape[0], x.shape[1])
    expect(x, shape, x.dtype, "x", like=x)
    expect(weight, shape[1:], x.dtype, "weight", like=x)
    expect(out, shape, x.dtype, "out", like=x)
    if delta is not None:
        expect(delta, shape, x.dtype, "delta", like=x)


def check_linear(
    x: Tensor, weight: Tensor, out: Tensor, *, norm: Tensor | None = None, is_gated: bool = False, max_rows: int
) -> None:
    """One of `FusedLinear`: `norm` where there is one, `is_gated` where two rows of the weights make one column of `out`."""
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        _expect_dims(tensor, 2, name)
    _expect_float(x, "x")
    num_rows, width = x.shape
    num_outs = out.shape[1]
    if num_rows > max_rows:
        raise ValueError(f"{num_rows} rows, where {max_rows} are the most")
    expect(x, (num_rows, width), x.dtype, "x", like=x)
    expect(weight, (2 * num_outs if is_gated else num_outs, width), x.dtype, "weight", like=x)
    is_wider = norm is not None and not is_gated and out.dtype == torch.float32
    expect(out, (num_rows, num_outs), torch.float32 if is_wider else x.dtype, "out", like=x)
    if norm is not None:
        expect(norm, (width,), x.dtype, "norm", like=x)


def check_rope_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots: Tensor,
    q_out: Tensor,
) -> None:
    check_pool(kv_pool, layer)
    _expect_dims(q_out, 3, "q_out")
    num_tokens, num_heads, head_dim = q_out.shape
    dtype, num_kv_heads = kv_pool.dtype, kv_pool.shape[3]
    if head_dim % 2:
        raise ValueError(f"a head of {head_dim} has no halves to rotate")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("queries and keys are both normalised or neither is")
    expect(q_out, (num_tokens, num_heads, kv_pool.shape[5]), dtype, "q_out", like=kv_pool)
    expect(qkv, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype, "qkv", like=kv_pool)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            expect(norm, (head_dim,), dtype, name, like=kv_pool)
    expect(cos, (num_tokens, head_dim // 2), torch.float32, "cos", like=kv_pool)
    expect(sin, (num_tokens, head_dim // 2), torch.float32, "sin", like=kv_pool)
    expect(slots, (num_tokens,), torch.int64, "slots", like=kv_pool)


def check_silu_mul(gate_up: Tensor, out: Tensor) -> None:
    _expect_dims(out, 2, "out")
    _expect_float(out, "out")
    expect(out, (out.shape[0], out.shape[1]), out.dtype, "out", like=out)
    expect(gate_up, (out.shape[0], 2 * out.shape[1]), out.dtype, "gate_up", like=out)


def check_experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, num_chosen: int, out: Tensor) -> None:
    for tensor, dims, name in ((x, 2, "x"), (logits, 2, "logits"), (gate_up, 3, "gate_up"), (down, 3, "down")):
        _expect_dims(tensor, dims, name)
    _expect_float(x, "x")
    (num_rows, width), num_experts, inner = x.shape, logits.shape[1], down.shape[2]
    expect(x, (num_rows, width), x.dtype, "x", like=x)
    expect(out, (num_rows, width), x.dtype, "out", like=x)
    expect(logits, (num_rows, num_experts), torch.float32, "logits", like=x)
    if not 1 <= num_chosen <= num_experts:
        raise ValueError(f"{num_chosen} of {num_experts} experts")
    for name, weight, shape in (("gate_up", gate_up, (2 * inner, width)), ("down", down, (width, inner))):
        if tuple(weight.shape) != (num_experts, *shape):
            raise ValueError(f"{name} is {tuple(weight.shape)} and not {(num_experts, *shape)}")
        one = weight[0] if weight[0].is_contiguous() else weight[0].t()
        expect(one, tuple(one.shape), x.dtype, f"one expert's {name}", like=x)


def check_paged_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Tensor,
    workspace_floats: int,
) -> None:
    check_pool(kv_pool, layer)
    _check_queries(q, kv_pool, out)
    num_seqs = q.shape[0]
    _check_tables(block_tables, num_seqs, kv_pool)
    expect(context_lens, (num_seqs,), torch.int32, "context_lens", like=kv_pool)
    expect(workspace, (workspace.numel(),), torch.float32, "workspace", like=kv_pool)
    if workspace.numel() < workspace_floats:
        raise ValueError(f"the workspace has {workspace.numel()} floats and not {workspace_floats}")


def check_chunk_attention(q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, out: Tensor) -> None:
    check_pool(kv_pool, layer)
    _check_queries(q, kv_pool, out)
    if context_len < len(q):
        raise ValueError(f"a context of {context_len} cannot end with {len(q)} tokens")
    _check_table(block_table, kv_pool, context_len)


def check_varlen_chunk_attention(q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, out: Tensor) -> None:
    check_pool(kv_pool, layer)
    _check_queries(q, kv_pool, out)
    lens, context_lens, tables = chunks.lens, chunks.context_lens, chunks.block_tables
    if sum(lens) != len(q):
        raise ValueError(f"{sum(lens)} tokens in chunks, and {len(q)} queries")
    for num_tokens, context_len in zip(lens, context_lens, strict=True):
        if context_len < num_tokens:
            raise ValueError(f"a context of {context_len} cannot end with {num_tokens} tokens")
    expect(chunks.spans, (3, len(lens)), torch.int32, "spans", like=kv_pool)
    _check_tables(tables, len(lens), kv_pool)
    if tables.shape[1] * kv_pool.shape[4] < max(context_lens, default=0):
        raise ValueError(f"{max(context_lens)} tokens do not lie in {tables.shape[1]} blocks of {kv_pool.shape[4]}")


def check_gather_kv(kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
    check_pool(kv_pool, layer)
    _check_table(block_table, kv_pool, num_tokens)
    shape = (kv_pool.shape[3], num_tokens, kv_pool.shape[5])
    expect(k_out, shape, kv_pool.dtype, "k_out", like=kv_pool)
    expect(v_out, shape, kv_pool.dtype, "v_out", like=kv_pool)


def check_copy_blocks(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
    _check_blocks(src, "src", like=dst)
    _check_blocks(dst, "dst", like=dst)
    if src.shape[1] != dst.shape[1]:
        raise ValueError(f"blocks of {src.shape[1]} bytes do not fit into blocks of {dst.shape[1]}")
    expect(src_ids, (src_ids.numel(),), torch.int64, "src_ids", like=dst)
    expect(dst_ids, tuple(src_ids.shape), torch.int64, "dst_ids", like=dst)
    if sums is not None:
        expect(sums, tuple(src_ids.shape), torch.int64, "sums", like=dst)


def check_hash_blocks(src: Tensor, ids: Tensor, sums: Tensor) -> None:
    _check_blocks(src, "src", like=src)
    expect(ids, (ids.numel(),), torch.int64, "ids", like=src)
    expect(sums, tuple(ids.shape), torch.int64, "sums", like=src)


def check_pool(kv_pool: Tensor, layer: int) -> None:
    """A contiguous [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] with such a layer."""
    _expect_dims(kv_pool, 6, "kv_pool")
    _expect_float(kv_pool, "kv_pool")
    if kv_pool.shape[2] != 2 or not kv_pool.is_contiguous():
        raise ValueError(f"no pool of keys and values: {tuple(kv_pool.shape)} with strides {kv_pool.stride()}")
    if not 0 <= layer < kv_pool.shape[1]:
        raise IndexError(f"layer {layer} of a pool with {kv_pool.shape[1]}")


def _check_queries(q: Tensor, kv_pool: Tensor, out: Tensor) -> None:
    _expect_dims(q, 3, "q")
    num_queries, num_heads, _ = q.shape
    num_kv_heads, head_dim = kv_pool.shape[3], kv_pool.shape[5]
    expect(q, (num_queries, num_heads, head_dim), kv_pool.dtype, "q", like=kv_pool)
    expect(out, (num_queries, num_heads, head_dim), kv_pool.dtype, "out", like=kv_pool)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")


def _check_table(block_table: Tensor, kv_pool: Tensor, num_tokens: int) -> None:
    expect(block_table, (block_table.numel(),), torch.int32, "block_table", like=kv_pool)
    if num_tokens < 0 or block_table.numel() * kv_pool.shape[4] < num_tokens:
        raise ValueError(f"{num_tokens} tokens do not lie in {block_table.numel()} blocks of {kv_pool.shape[4]}")


def _check_tables(block_tables: Tensor, num_seqs: int, kv_pool: Tensor) -> None:
    _expect_dims(block_tables, 2, "block_tables")
    if len(block_tables) != num_seqs:
        raise ValueError(f"{len(block_tables)} block tables for {num_seqs} sequences")
    if block_tables.numel():
        expect(block_tables[:1], (1, block_tables.shape[1]), torch.int32, "a row of block_tables", like=kv_pool)


def _check_blocks(blocks: Tensor, name: str, *, like: Tensor) -> None:
    _expect_dims(blocks, 2, name)
    expect(blocks, (blocks.shape[0], blocks.shape[1]), torch.uint8, name, like=like)
    if blocks.shape[1] % 16:
        raise ValueError(f"{name} has blocks of {blocks.shape[1]} bytes, no multiple of 16")


def _expect_dims(tensor: Tensor, dims: int, name: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} has {tensor.dim()} dimensions and not {dims}")


def _expect_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, neither bfloat16 nor float32")
