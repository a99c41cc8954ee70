"""What the model asks of a CUDA device beyond matrix products: the kernels' one interface.

Sets of kernels: `gpu.cuda.reference.TorchKernels` (plain torch, the twin that tests compare with), `NumbaKernels` here beside,
and whatever else is written behind the same interface. All take torch tensors, run on torch's current stream, check shapes,
dtypes and strides on the host, never read a value of the device, never wait for it, and, but for attention of chunks and experts,
never allocate: so they can be captured in a CUDA graph after one call with the same shapes.

T tokens, S sequences, D head_dim. `dtype` below is one dtype for a whole call: bfloat16 on a device, also float32 in tests.
Sums are float32 (or better), each result is rounded once. Tensors are contiguous unless something else is said. Raises
ValueError for shapes, strides and devices that do not fit together, TypeError for dtypes, IndexError for a layer outside of the
pool: before anything is launched. What only the device knows (slots, block ids, context lengths) is not checked but harmless:
see each method.

KV pool: [num_blocks, num_layers, 2, num_kv_heads, block_size, D] of dtype, keys before values. A token's slot is
block_id * block_size + its place in the block. Block table: the block ids of one sequence in order; entries that no token of the
context lies in are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Chunks", "ExpertGeometry", "FusedLinear", "Geometry", "Kernels"]


@dataclass(frozen=True, kw_only=True)
class ExpertGeometry:
    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalizes: bool
    is_turned: bool  # weights lie [experts, in, out]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What kernels are compiled for ahead of their first use."""

    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    has_qk_norm: bool = True
    experts: ExpertGeometry | None = None  # None: no layer has any


@dataclass(frozen=True, slots=True)
class Chunks:
    """The last tokens of several sequences. The rows of each follow those of the one before it."""

    lens: tuple[int, ...]  # tokens
    context_lens: tuple[int, ...]  # no less than `lens`
    spans: Tensor  # int32 [3, C], the same for the device: where each one's rows begin, lens, context_lens
    block_tables: Tensor  # int32 [C, >= ceil(longest context / block_size)], its rows may lie apart

    def one_by_one(self, q: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, int, Tensor]]:
        """(q, block_table, context_len, out) of each, for `Kernels.chunk_attention`."""
        return zip(q.split(self.lens), self.block_tables, self.context_lens, out.split(self.lens), strict=True)


class FusedLinear(Protocol):
    """Linear layers of a few rows, each one launch with what stands beside it.

    Such a product takes as long as its weights take to be read, and each small kernel before or behind it adds its start and end.
    weight: dtype [N, H], as a checkpoint has it. What stands between two roundings of the separate kernels is not rounded here.
    """

    @property
    def max_rows(self) -> int:
        """The largest T."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        """out = rms_norm(x) @ weight.T

        x: dtype [T, H]; norm: dtype [H]; out: dtype or float32 [T, N].
        """

    def norm_silu_mul(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        """out = silu_mul(rms_norm(x) @ weight.T)

        x: dtype [T, H]; norm: dtype [H]; weight: dtype [2 I, H], gate's rows above up's; out: dtype [T, I].
        """

    def linear_add(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """out += x @ weight.T

        x: dtype [T, H]; out: dtype [T, N], no part of x.
        """


class Kernels(Protocol):
    @property
    def name(self) -> str:
        """ "triton", "numba" or "torch"."""

    @property
    def fused(self) -> FusedLinear | None:
        """None: this set leaves linear layers to torch."""

    def warm_up(self, geometry: Geometry, device: torch.device) -> None:
        """Compile and load all that a model of this geometry calls; blocks. Must come before a graph is captured."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang & Sennrich 2019).

        x, out: dtype [T, H], may be the same tensor; weight: dtype [H].
        """

    def add_rms_norm(self, delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """x += delta, rounded to dtype, then out = rms_norm of that x.

        delta, x, out: dtype [T, H], out may be delta; weight: dtype [H].
        """

    def rope_store(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        kv_pool: Tensor,
        layer: int,
        slots: Tensor,
        q_out: Tensor,
    ) -> None:
        """All between the fused QKV projection and attention: queries to q_out, keys and values to their slots.

        Head-wise RMSNorm of queries and keys where weights are given (both or none), rotary embedding of the pairs (i, i + D/2)
        (Su et al. 2021), values bit by bit as they are.

        qkv: dtype [T, (Hq + 2 Hk) * D], heads of q, then k, then v; q_norm, k_norm: dtype [D]; cos, sin: float32 [T, D/2];
        slots: int64 [T]: a token whose slot is -1 or otherwise outside of the pool is stored nowhere, its query still comes out;
        q_out: dtype [T, Hq, D].
        """

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up, gate the left and up the right half of each row (Shazeer 2020).

        gate_up: dtype [T, 2 I]; out: dtype [T, I].
        """

    def experts(
        self,
        x: Tensor,
        logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        num_chosen: int,
        normalizes: bool,
        out: Tensor,
    ) -> None:
        """out[t] = sum over the experts e that row t finds most probable of share * down[e] @ silu_mul(gate_up[e] @ x[t]).

        Shares are softmax(logits[t]), of which `normalizes` makes those of the `num_chosen` add up to 1 (Shazeer et al. 2017).
        What an expert makes of a row is rounded to dtype, as is what lies between its products; rows that are not numbers make
        no other row wrong. May take temporary memory from torch's allocator.

        x, out: dtype [T, H], not the same tensor; logits: float32 [T, E]; gate_up: dtype [E, 2 I, H], gate's rows above up's;
        down: dtype [E, H, I]; of the two, each expert's matrix is contiguous, or would be if its dimensions changed places.
        """

    def workspace_floats(self, max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
        """How many float32 `paged_attention` needs of a workspace for up to `max_seqs` sequences of any length."""

    def paged_attention(
        self,
        q: Tensor,
        kv_pool: Tensor,
        layer: int,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor,
        workspace: Tensor,
    ) -> None:
        """out[s, h] = softmax(scale * q[s, h] . K) V over the first context_lens[s] tokens of sequence s (Kwon et al. 2023).

        Long contexts are split over thread blocks and merged by their log-sum-exp (Flash-Decoding, Dao et al. 2023).

        q, out: dtype [S, Hq, D], query head h belongs to KV head h // (Hq / Hk); block_tables: int32 [S, max_blocks], its rows
        may lie apart; context_lens: int32 [S], at most max_blocks * block_size, 0 is a row of padding: out is 0, its table is not
        read; workspace: float32 [>= workspace_floats(S, Hq, Hk, D)], nothing is expected in it and nothing kept. A block id
        outside of the pool makes that row wrong and nothing else.
        """

    def chunk_attention(
        self, q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, out: Tensor
    ) -> None:
        """paged_attention for the last T of the context_len tokens of one sequence, each up to and with its own token.

        q, out: dtype [T, Hq, D]; block_table: int32 [>= ceil(context_len / block_size)]; context_len >= T. May take temporary
        memory from torch's allocator.
        """

    def varlen_chunk_attention(self, q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor) -> None:
        """`chunk_attention` of each of any number of sequences, which may be too short to fill a device one by one.

        q, out: dtype [sum of lens, Hq, D]. What `spans` says to the device and `lens` to the host must be the same.
        """

    def gather_kv(self, kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
        """Copy the keys and values of a sequence's first tokens out of their blocks.

        block_table: int32 [>= ceil(num_tokens / block_size)]; k_out, v_out: dtype [Hk, num_tokens, D]. Tokens of a block outside
        of the pool are left as they were.
        """

    def copy_blocks(self, src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
        """dst[dst_ids[i]] = src[src_ids[i]], and in the same pass sums[i] = sum64 of what was read.

        src: uint8 [n, bytes]; dst: uint8 [m, bytes], no block of it read and written in one call, none written twice; src_ids,
        dst_ids: int64 [k]; sums: int64 [k], the bits of the unsigned sum. bytes: a multiple of 16. If either id is out of range,
        nothing is copied and the sum is 0. sum64: see `gpu.cuda.reference.sum64_rows`.
        """

    def hash_blocks(self, src: Tensor, ids: Tensor, sums: Tensor) -> None:
        """sums[i] = sum64 of src[ids[i]]; arguments as in `copy_blocks`."""
