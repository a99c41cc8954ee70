"""The language model of Qwen3 and Qwen3-VL over a paged KV pool, launched on a device: device tensors in, logits out.

Knows the layers and how a batch that mixes prompt chunks and single tokens goes through them. Does not know requests, host
arrays, graphs or sampling. A forward pass reads no value of the device and waits for nothing; for a batch of single tokens alone
it launches the same kernels whatever the values are, so that it can be captured in a graph.

The same tokens. A row's logits are those of the same sum in another order when the batch has another number of rows: the library
behind the matrix products chooses its algorithm by shape. They agree within what the dtype justifies and not to the last bit, so
two tokens whose logits lie closer together than that may change places between batches; a batch of the same shape gives the same
bits. That is less than the CPU model promises. Logits are float32 also of bfloat16 weights, without rounding of the sum, so that
it seldom matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epd.model.config import ModelConfig
from epd.model.device.buffers import Buffers, Rows
from epd.model.device.layers import Experts, Layer, Source, TensorSource, project
from epd.model.rope import rope_frequencies
from epd.model.shapes import text_prefix
from gpu.cuda.kernels import Chunks, Geometry, Kernels


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch on the device: rows of sequences with one new token first, then the rows of each chunk."""

    token_ids: Tensor  # int64 [T]; -1 - i is what was drawn as number i in the step before
    positions: Tensor  # int32 [3, T]
    slots: Tensor  # int64 [T]; -1 for a row of padding
    block_tables: Tensor  # int32 [S, max_blocks] of the first S rows
    context_lens: Tensor  # int32 [S]; 0 for a row of padding
    chunks: Chunks | None = None  # of the rows behind those
    embeddings: tuple[tuple[int, Tensor], ...] = ()  # first row, [n, (1 + num_deepstack) * hidden]
    sampled_rows: Tensor | None = None  # int64 [num_sampled]; None: all rows, in order
    has_pending: bool = True  # whether a token id may be below zero

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids if self.sampled_rows is None else self.sampled_rows)


class DeviceTextModel:
    """Immutable after construction: runners may share one."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TensorSource,
        kernels: Kernels,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Weights that are not on `device` in `dtype` yet are brought there."""
        text, prefix = config.text, text_prefix(config)
        source = Source(weights, torch.device(device), dtype)
        self.config = text
        self.num_deepstack = config.num_deepstack
        self.device = torch.device(device)
        self.dtype = dtype
        self.kernels = kernels
        self._embed = source.tensor(f"{prefix}embed_tokens.weight")
        self._norm = source.tensor(f"{prefix}norm.weight")
        self._head = self._embed if text.tie_word_embeddings else source.tensor("lm_head.weight")
        self._layers = [Layer(text, i, source, f"{prefix}layers.{i}.") for i in range(text.num_layers)]
        frequencies, axes = rope_frequencies(text)
        self._frequencies, self._axes = torch.from_numpy(frequencies).to(device), torch.from_numpy(axes).to(device)
        self._scale = text.head_dim**-0.5

    def geometry(self, block_size: int) -> Geometry:
        """What kernels are to be compiled for."""
        text = self.config
        return Geometry(
            dtype=self.dtype,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            block_size=block_size,
            experts=next((layer.mlp.geometry for layer in self._layers if isinstance(layer.mlp, Experts)), None),
        )

    def buffers(self, max_rows: int = 0) -> Buffers:
        """Working memory for one runner, see there."""
        return Buffers(self.config, self.kernels, self.device, self.dtype, max_rows=max_rows)

    @property
    def max_fused_rows(self) -> int:
        """Up to so many rows `forward_fused` takes; 0 where these kernels or these weights are not for it."""
        is_plain = not self.config.attention_bias and self.config.experts is None
        return self.kernels.fused.max_rows if self.kernels.fused is not None and is_plain else 0

    @torch.inference_mode()
    def forward(self, inputs: Inputs, drawn: Tensor, kv_pool: Tensor, buffers: Buffers) -> Tensor:
        """Logits float32 [num_sampled, vocab_size], valid until the next call with these buffers.

        drawn: int64 [>= number of tokens that the step before drew]. kv_pool: [num_blocks, num_layers, 2, num_kv_heads,
        block_size, head_dim], which gets the KV of all tokens.
        """
        rows, kernels, eps = buffers.rows(len(inputs.token_ids)), self.kernels, self.config.rms_norm_eps
        self._begin(inputs, drawn, rows)
        last = len(self._layers) - 1
        kernels.rms_norm(rows.x, self._layers[0].input_norm, eps, rows.normed)
        for i, layer in enumerate(self._layers):
            layer.qkv(rows.normed, rows.qkv)
            kernels.rope_store(
                rows.qkv, layer.q_norm, layer.k_norm, eps, rows.cosine, rows.sine, kv_pool, i, inputs.slots, rows.q
            )
            if i == last:
                break
            self._attend(inputs, i, kv_pool, rows, buffers.workspace)
            self._feed_forward(layer, rows)
            following = self._layers[i + 1].input_norm
            if i < self.num_deepstack and inputs.embeddings:
                rows.x.add_(rows.delta)
                self._add_deepstack(inputs, i, rows.x)
                kernels.rms_norm(rows.x, following, eps, rows.normed)
            else:
                kernels.add_rms_norm(rows.delta, rows.x, following, eps, rows.normed)
        return self._finish(inputs, kv_pool, buffers, rows)

    @torch.inference_mode()
    def forward_fused(self, inputs: Inputs, drawn: Tensor, kv_pool: Tensor, buffers: Buffers) -> Tensor:
        """`forward` of up to `max_fused_rows` single tokens that are all sampled, in two thirds as many kernels.

        Raises ValueError for more of them.
        """
        kernels, fused, eps = self.kernels, self.kernels.fused, self.config.rms_norm_eps
        if fused is None or len(inputs.token_ids) > self.max_fused_rows:
            raise ValueError(f"{len(inputs.token_ids)} rows, where {self.max_fused_rows} can be fused")
        rows = buffers.rows(len(inputs.token_ids))
        self._begin(inputs, drawn, rows)
        for i, layer in enumerate(self._layers):
            fused.norm_linear(rows.x, layer.input_norm, eps, layer.qkv.weight, rows.qkv)
            kernels.rope_store(
                rows.qkv, layer.q_norm, layer.k_norm, eps, rows.cosine, rows.sine, kv_pool, i, inputs.slots, rows.q
            )
            self._attend(inputs, i, kv_pool, rows, buffers.workspace)
            fused.linear_add(rows.attended, layer.output.weight, rows.x)
            fused.norm_silu_mul(rows.x, layer.post_norm, eps, layer.dense.gate_up.weight, rows.inner)
            fused.linear_add(rows.inner, layer.dense.down.weight, rows.x)
        logits = buffers.logits(inputs.num_sampled)
        fused.norm_linear(rows.x, self._norm, eps, self._head, logits)
        return logits

    def _begin(self, inputs: Inputs, drawn: Tensor, rows: Rows) -> None:
        """Embeddings of the tokens and images into x, and the rotations of their positions."""
        token_ids, width = inputs.token_ids, self.config.hidden_size
        if inputs.has_pending:
            known = drawn.index_select(0, token_ids.bitwise_not().clamp_(min=0))  # -1 - i is the complement of i
            token_ids = torch.where(token_ids < 0, known, token_ids)
        torch.index_select(self._embed, 0, token_ids, out=rows.x)
        for row, embedding in inputs.embeddings:
            rows.x[row : row + len(embedding)] = embedding[:, :width]
        positions = inputs.positions.index_select(0, self._axes).t()  # [T, pairs]
        torch.mul(positions, self._frequencies, out=rows.cosine)
        torch.sin(rows.cosine, out=rows.sine)
        rows.cosine.cos_()

    def _attend(self, inputs: Inputs, layer: int, kv_pool: Tensor, rows: Rows, workspace: Tensor) -> None:
        if count := len(inputs.context_lens):
            q, out = rows.q[:count], rows.attended_heads[:count]
            self.kernels.paged_attention(q, kv_pool, layer, inputs.block_tables, inputs.context_lens, self._scale, out, workspace)
        if inputs.chunks is not None:
            q, out = rows.q[count:], rows.attended_heads[count:]
            self.kernels.varlen_chunk_attention(q, kv_pool, layer, inputs.chunks, self._scale, out)

    def _feed_forward(self, layer: Layer, rows: Rows) -> None:
        """From attended heads to the layer's end: x gains the attention's output, `delta` holds what x is still to gain."""
        layer.output(rows.attended, rows.delta)
        self.kernels.add_rms_norm(rows.delta, rows.x, layer.post_norm, self.config.rms_norm_eps, rows.normed)
        layer.mlp(self.kernels, rows)

    def _finish(self, inputs: Inputs, kv_pool: Tensor, buffers: Buffers, rows: Rows) -> Tensor:
        """The last layer, its KV stored. Only rows that sample matter from here on; a chunk amid a prompt has none."""
        logits = buffers.logits(inputs.num_sampled)
        if not inputs.num_sampled:
            return logits
        last = len(self._layers) - 1
        self._attend(inputs, last, kv_pool, rows, buffers.workspace)
        deepstack = self._last_deepstack(inputs, rows)
        chosen = rows
        if inputs.sampled_rows is not None:
            chosen = buffers.sampled_rows(inputs.num_sampled)
            torch.index_select(rows.x, 0, inputs.sampled_rows, out=chosen.x)
            torch.index_select(rows.attended, 0, inputs.sampled_rows, out=chosen.attended)
        self._feed_forward(self._layers[last], chosen)
        if deepstack is not None:
            chosen.x.add_(deepstack)
        self.kernels.add_rms_norm(chosen.delta, chosen.x, self._norm, self.config.rms_norm_eps, chosen.normed)
        project(chosen.normed, self._head, logits)
        return logits

    def _last_deepstack(self, inputs: Inputs, rows: Rows) -> Tensor | None:
        """What the sampled rows gain after the last layer; None where nothing is added so late, as in any real model."""
        last = len(self._layers) - 1
        if last >= self.num_deepstack or not inputs.embeddings:
            return None
        gained = torch.zeros_like(rows.x)
        self._add_deepstack(inputs, last, gained)
        return gained if inputs.sampled_rows is None else gained.index_select(0, inputs.sampled_rows)

    def _add_deepstack(self, inputs: Inputs, layer: int, x: Tensor) -> None:
        width = self.config.hidden_size
        for row, embedding in inputs.embeddings:
            x[row : row + len(embedding)] += embedding[:, (layer + 1) * width : (layer + 2) * width]
