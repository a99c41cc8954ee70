"""The working memory of steps: what a forward pass writes between the layers' weights and the pool, by number of rows.

Owns the memory and how it is cut. Does not know what is computed in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epd.model.config import TextConfig
from gpu.cuda.kernels import Kernels


@dataclass(frozen=True, slots=True)
class Rows:
    """The working memory of a step with so many rows."""

    x: Tensor  # [n, hidden]
    normed: Tensor  # [n, hidden]
    delta: Tensor  # [n, hidden]
    cosine: Tensor  # float32 [n, head_dim / 2]
    sine: Tensor  # float32 [n, head_dim / 2]
    # These three share memory with the two below: attention is over when the feed-forward begins.
    qkv: Tensor  # [n, (heads + 2 * kv_heads) * head_dim]
    q: Tensor  # [n, heads, head_dim]
    attended: Tensor  # [n, heads * head_dim]
    gate_up: Tensor  # [n, 2 * intermediate]
    inner: Tensor  # [n, intermediate]

    @property
    def attended_heads(self) -> Tensor:
        return self.attended.view(self.q.shape)


class Buffers:
    """The working memory of one runner. It grows to the largest step seen, unless `max_rows` says how large that will be.

    With `max_rows` it never moves, so that a graph can be captured that writes to it.
    """

    _KEPT = 64  # steps of up to this many rows have their views kept

    def __init__(
        self,
        config: TextConfig,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_rows: int = 0,
        attends: bool = True,
    ) -> None:
        """`attends`: False for memory of rows that attention has been over for."""
        text = self._config = config
        self._kernels, self._device, self._dtype = kernels, device, dtype
        heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        self._attention = {"qkv": heads + 2 * kv_heads, "q": heads, "attended": heads} if attends else {"attended": heads}
        self._feed_forward = {"gate_up": 2 * text.dense_size, "inner": text.dense_size}
        self._is_fixed = max_rows > 0
        self._capacity = self._num_workspace_rows = 0
        self._rows: dict[int, Rows] = {}
        self._sampled: Buffers | None = None
        self._logits = torch.empty(0, text.vocab_size, device=device)
        self.workspace = torch.empty(0, device=device)
        if max_rows:
            self._grow(max_rows)
            self._logits = torch.empty(max_rows, text.vocab_size, device=device)
            self.reserve_workspace(max_rows)

    def rows(self, num_rows: int) -> Rows:
        """Raises ValueError for more than `max_rows` where that is given."""
        if num_rows > self._capacity:
            if self._is_fixed:
                raise ValueError(f"a step of {num_rows} rows in memory for {self._capacity}")
            self._grow(max(num_rows, min(2 * self._capacity, 1024)))
        rows = self._rows.get(num_rows)
        if rows is None:
            rows = self._views(num_rows)
            if num_rows <= self._KEPT:
                self._rows[num_rows] = rows
        return rows

    def sampled_rows(self, num_rows: int) -> Rows:
        """Other memory than that of `rows`, for the rows that are left when only some are sampled."""
        if self._sampled is None:
            self._sampled = Buffers(self._config, self._kernels, self._device, self._dtype, attends=False)
        return self._sampled.rows(num_rows)

    def logits(self, num_rows: int) -> Tensor:
        """float32 [num_rows, vocab_size]"""
        if len(self._logits) < num_rows:
            self._logits = torch.empty(num_rows, self._config.vocab_size, device=self._device)
        return self._logits[:num_rows]

    def reserve_workspace(self, num_sequences: int) -> None:
        """Make `workspace` large enough for paged attention of so many sequences."""
        if num_sequences > self._num_workspace_rows:
            text = self._config
            num_floats = self._kernels.workspace_floats(num_sequences, text.num_heads, text.num_kv_heads, text.head_dim)
            self.workspace = torch.empty(num_floats, device=self._device)
            self._num_workspace_rows = num_sequences

    def _grow(self, num_rows: int) -> None:
        width, pairs = self._config.hidden_size, self._config.head_dim // 2
        shared = max(sum(self._attention.values()), sum(self._feed_forward.values()))
        self._rows.clear()
        self._capacity = num_rows
        self._hidden = torch.empty(3, num_rows, width, dtype=self._dtype, device=self._device)
        self._angles = torch.empty(2, num_rows, pairs, device=self._device)
        self._shared = torch.empty(num_rows * shared, dtype=self._dtype, device=self._device)

    def _views(self, n: int) -> Rows:
        x, normed, delta = (each[:n] for each in self._hidden)
        cosine, sine = (each[:n] for each in self._angles)
        attention, feed_forward = self._cut(n, self._attention), self._cut(n, self._feed_forward)
        nothing = self._shared[:0]
        text = self._config
        return Rows(
            x=x,
            normed=normed,
            delta=delta,
            cosine=cosine,
            sine=sine,
            qkv=attention.get("qkv", nothing),
            q=attention["q"].view(n, text.num_heads, text.head_dim) if "q" in attention else nothing,
            attended=attention["attended"],
            **feed_forward,
        )

    def _cut(self, n: int, widths: dict[str, int]) -> dict[str, Tensor]:
        parts = torch.split(self._shared[: n * sum(widths.values())], [n * width for width in widths.values()])
        return {name: part.view(n, width) for (name, width), part in zip(widths.items(), parts, strict=True)}
