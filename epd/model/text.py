"""The language model of Qwen3 and Qwen3-VL over a paged KV pool: a batch of tokens in, logits of the sampled rows out.

Knows the layers and how a batch that mixes prompt chunks and single tokens goes through them. Does not know requests, schedulers
or sampling. Weights may be shared by runners; buffers may not, each runner has its own `Buffers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epd.model.batch import Batch
from epd.model.config import ModelConfig, TextConfig
from epd.model.experts import ExpertMemory, Experts
from epd.model.linear import Linear
from epd.model.rope import RopeTable
from epd.model.shapes import text_prefix
from epd.model.weights import Weights
from gpu.kernels.chunk_attention import chunk_attention
from gpu.kernels.norm import add_rms_norm, rms_norm
from gpu.kernels.paged_attention import paged_attention
from gpu.kernels.rope_store import rope_store
from gpu.kernels.silu_mul import silu_mul
from gpu.team import Team

FloatArray = npt.NDArray[np.float32]


class TextModel:
    """Immutable after construction."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        text, prefix = config.text, text_prefix(config)
        self.config = text
        self.num_deepstack = config.num_deepstack
        self._embed = weights.tensor(f"{prefix}embed_tokens.weight")
        self._norm = weights.tensor(f"{prefix}norm.weight").numpy()
        self._head = Linear(weights, [f"{prefix}embed_tokens" if text.tie_word_embeddings else "lm_head"])
        self._layers = [_Layer(text, i, weights, f"{prefix}layers.{i}.") for i in range(text.num_layers)]
        self._rope = RopeTable(text)
        self._scale = text.head_dim**-0.5

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_pool: FloatArray, buffers: Buffers, team: Team | None = None) -> FloatArray:
        """Logits [num_sampled, vocab_size] of `batch.sampled_rows`, valid until the next call with these buffers.

        Writes the KV of all tokens into kv_pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        rows = buffers.rows(batch.num_tokens)
        torch.index_select(self._embed, 0, torch.from_numpy(batch.token_ids), out=rows.x)
        width = self.config.hidden_size
        for row, span in batch.embeddings:
            rows.x_array[row : row + len(span.rows)] = span.rows[:, :width]
        cosine, sine = self._rope.rotations(batch.positions)
        eps = self.config.rms_norm_eps
        last = len(self._layers) - 1
        rms_norm(rows.x_array, self._layers[0].input_norm, eps, rows.normed_array)
        for i, layer in enumerate(self._layers):
            layer.qkv(rows.normed, rows.qkv, team)
            rope_store(rows.qkv_array, layer.q_norm, layer.k_norm, eps, cosine, sine, kv_pool, i, batch.slots, rows.q_array)
            if i == last:
                break
            self._attend(batch, i, kv_pool, rows, team)
            layer.feed_forward(rows, buffers.experts, eps, team)
            if i < self.num_deepstack:
                np.add(rows.x_array, rows.delta_array, out=rows.x_array)
                for row, span in batch.embeddings:
                    rows.x_array[row : row + len(span.rows)] += span.rows[:, (i + 1) * width : (i + 2) * width]
                rms_norm(rows.x_array, self._layers[i + 1].input_norm, eps, rows.normed_array)
            else:
                add_rms_norm(rows.delta_array, rows.x_array, self._layers[i + 1].input_norm, eps, rows.normed_array)
        return self._finish(batch, kv_pool, buffers, rows, team)

    def _finish(self, batch: Batch, kv_pool: FloatArray, buffers: Buffers, rows: _Rows, team: Team | None) -> FloatArray:
        """The last layer, its KV stored. Only rows that sample matter from here on; a chunk amid a prompt has none."""
        num_sampled = len(batch.sampled_rows)
        if num_sampled == 0:
            return np.empty((0, self.config.vocab_size), np.float32)
        last, eps, width = len(self._layers) - 1, self.config.rms_norm_eps, self.config.hidden_size
        self._attend(batch, last, kv_pool, rows, team, only_sampled=True)
        chosen = rows
        if num_sampled < batch.num_tokens or not _is_range(batch.sampled_rows):
            chosen = buffers.sampled_rows(num_sampled)
            index = torch.from_numpy(batch.sampled_rows)
            torch.index_select(rows.x, 0, index, out=chosen.x)
            torch.index_select(rows.attended, 0, index, out=chosen.attended)
        self._layers[last].feed_forward(chosen, buffers.experts, eps, team)
        if last < self.num_deepstack:
            self._deepstack_sampled(batch, chosen, (last + 1) * width)
        add_rms_norm(chosen.delta_array, chosen.x_array, self._norm, eps, chosen.normed_array)
        logits = buffers.logits(num_sampled)
        self._head(chosen.normed, logits, team)
        return logits.numpy()

    def _deepstack_sampled(self, batch: Batch, chosen: _Rows, column: int) -> None:
        for place, sampled_row in enumerate(batch.sampled_rows.tolist()):
            for row, span in batch.embeddings:
                if row <= sampled_row < row + len(span.rows):
                    chosen.x_array[place] += span.rows[sampled_row - row, column : column + self.config.hidden_size]

    def _attend(
        self, batch: Batch, layer: int, kv_pool: FloatArray, rows: _Rows, team: Team | None, *, only_sampled: bool = False
    ) -> None:
        """`only_sampled`: of chunks, no more than the rows that sample, which are their last ones."""
        q, attended, scale = rows.q_array, rows.attended_array, self._scale
        if count := batch.num_single:
            tables, lengths = batch.block_tables, batch.context_lens
            paged_attention(q[:count], kv_pool, layer, tables, lengths, scale, attended[:count], team)
        for chunk in batch.chunks:
            start = chunk.start
            if only_sampled:
                start = chunk.end - 1
                if start not in batch.sampled_rows:
                    continue
            part = slice(start, chunk.end)
            chunk_attention(q[part], kv_pool, layer, chunk.block_table, chunk.context_len, scale, attended[part], team)


class _Layer:
    def __init__(self, config: TextConfig, layer: int, weights: Weights, prefix: str) -> None:
        self.input_norm = weights.tensor(f"{prefix}input_layernorm.weight").numpy()
        self.post_norm = weights.tensor(f"{prefix}post_attention_layernorm.weight").numpy()
        self.q_norm = weights.tensor(f"{prefix}self_attn.q_norm.weight").numpy()
        self.k_norm = weights.tensor(f"{prefix}self_attn.k_norm.weight").numpy()
        self.qkv = Linear(
            weights, [f"{prefix}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")], bias=config.attention_bias
        )
        self._output = Linear(weights, [f"{prefix}self_attn.o_proj"], bias=config.attention_bias)
        experts = config.experts_of(layer)
        self._mlp = _Mlp(weights, prefix) if experts is None else Experts(experts, weights, prefix)

    def feed_forward(self, rows: _Rows, memory: ExpertMemory, eps: float, team: Team | None) -> None:
        """From attended heads to the layer's end: x gains the attention's output, `delta` holds what x is still to gain."""
        self._output(rows.attended, rows.delta, team)
        add_rms_norm(rows.delta_array, rows.x_array, self.post_norm, eps, rows.normed_array)
        if isinstance(self._mlp, _Mlp):
            self._mlp(rows, team)
        else:
            self._mlp(rows.normed, rows.delta, memory, team)


class _Mlp:
    """A dense feed-forward layer, from `normed` to `delta`."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._gate_up = Linear(weights, [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"])
        self._down = Linear(weights, [f"{prefix}mlp.down_proj"])

    def __call__(self, rows: _Rows, team: Team | None) -> None:
        self._gate_up(rows.normed, rows.gate_up, team)
        silu_mul(rows.gate_up_array, rows.inner_array)
        self._down(rows.inner, rows.delta, team)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The buffers of a step with so many rows, each as torch tensor (for matrix products) and NumPy array (for kernels)."""

    x: Tensor  # [n, hidden]
    normed: Tensor  # [n, hidden]
    delta: Tensor  # [n, hidden]
    qkv: Tensor  # [n, (heads + 2 * kv_heads) * head_dim]
    q: Tensor  # [n, heads, head_dim]
    attended: Tensor  # [n, heads * head_dim]
    gate_up: Tensor  # [n, 2 * intermediate]
    inner: Tensor  # [n, intermediate]
    x_array: FloatArray
    normed_array: FloatArray
    delta_array: FloatArray
    qkv_array: FloatArray
    q_array: FloatArray
    attended_array: FloatArray  # [n, heads, head_dim]
    gate_up_array: FloatArray
    inner_array: FloatArray


class Buffers:
    """The working memory of one runner: grows to the largest step seen, and keeps the views of small steps ready-made."""

    _KEPT = 64  # steps of up to this many rows have their views kept

    def __init__(self, config: TextConfig) -> None:
        self._config = config
        self._views: dict[int, _Rows] = {}
        self._capacity = 0
        self._memory: dict[str, Tensor] = {}
        self._sampled: Buffers | None = None
        self._logits = torch.empty(0, config.vocab_size)
        self.experts = ExpertMemory()

    def rows(self, num_rows: int) -> _Rows:
        if num_rows > self._capacity:
            self._grow(num_rows)
        rows = self._views.get(num_rows)
        if rows is None:
            rows = self._slice(num_rows)
            if num_rows <= self._KEPT:
                self._views[num_rows] = rows
        return rows

    def sampled_rows(self, num_rows: int) -> _Rows:
        """Other memory than that of `rows`, for the rows that are left when only some are sampled."""
        if self._sampled is None:
            self._sampled = Buffers(self._config)
        return self._sampled.rows(num_rows)

    def logits(self, num_rows: int) -> Tensor:
        if len(self._logits) < num_rows:
            self._logits = torch.empty(num_rows, self._config.vocab_size)
        return self._logits[:num_rows]

    def _grow(self, num_rows: int) -> None:
        config = self._config
        heads = config.num_heads * config.head_dim
        widths = {
            "x": config.hidden_size,
            "normed": config.hidden_size,
            "delta": config.hidden_size,
            "qkv": heads + 2 * config.num_kv_heads * config.head_dim,
            "q": heads,
            "attended": heads,
            "gate_up": 2 * config.dense_size,
            "inner": config.dense_size,
        }
        self._capacity = max(num_rows, 2 * self._capacity if self._capacity < 1024 else num_rows)
        self._memory = {name: torch.empty(self._capacity, width) for name, width in widths.items()}
        self._views.clear()

    def _slice(self, n: int) -> _Rows:
        part = {name: memory[:n] for name, memory in self._memory.items()}
        heads = (n, self._config.num_heads, self._config.head_dim)
        part["q"] = part["q"].view(heads)
        return _Rows(
            **part,
            x_array=part["x"].numpy(),
            normed_array=part["normed"].numpy(),
            delta_array=part["delta"].numpy(),
            qkv_array=part["qkv"].numpy(),
            q_array=part["q"].numpy(),
            attended_array=part["attended"].numpy().reshape(heads),
            gate_up_array=part["gate_up"].numpy(),
            inner_array=part["inner"].numpy(),
        )


def _is_range(rows: npt.NDArray[np.int64]) -> bool:
    return bool((rows == np.arange(len(rows))).all())
