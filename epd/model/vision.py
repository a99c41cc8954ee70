"""The vision tower of Qwen3-VL: patches of several images in, rows of embedding out.

Knows the tower's layers. Does not know files, requests or pools. The images of a batch go through every linear layer together;
attention stays within an image (images of one size share one call).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from epd.model.config import VisionConfig
from epd.model.linear import Linear
from epd.model.preprocess import Grid
from epd.model.weights import Weights
from gpu.team import Team

_LAYER_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0


class VisionModel:
    """Immutable after construction; may be shared by runners and threads."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        self.config = config
        tensors = _Prefixed(weights, "model.visual.")
        self._patch_embed = tensors.linear("patch_embed.proj")
        self._position_table = tensors["pos_embed.weight"]
        self._blocks = [_Block(tensors, f"blocks.{i}.") for i in range(config.depth)]
        self._merger = _Merger(tensors, "merger.")
        self._deepstack = {
            layer: _Merger(tensors, f"deepstack_merger_list.{i}.") for i, layer in enumerate(config.deepstack_layers)
        }

    @torch.inference_mode()
    def forward(
        self, patches: Sequence[npt.NDArray[np.float32]], grids: Sequence[Grid], team: Team | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Per image, from patches [t * h * w, patch_width] (in merge-block order) and grid (t, h, w), the rows
        [t * h * w / merge**2, (1 + num_deepstack) * out_hidden_size] float32: main embedding, then the deepstack features.
        """
        order = sorted(range(len(grids)), key=lambda i: grids[i])  # equal sizes side by side
        geometries = [_geometry(grids[i], self.config) for i in order]
        x = self._patch_embed(torch.from_numpy(np.concatenate([patches[i] for i in order])), team=team)
        x += torch.cat([self._position_embedding(geometry) for geometry in geometries])
        cosine = torch.cat([geometry.cosine for geometry in geometries])[:, None]  # [num_patches, 1, head_dim / 2]
        sine = torch.cat([geometry.sine for geometry in geometries])[:, None]
        # Frames attend within themselves; images of one size are one batch of attention.
        lengths = [grids[i][1] * grids[i][2] for i in order for _ in range(grids[i][0])]
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        features: list[Tensor] = []
        for layer, block in enumerate(self._blocks):
            block.forward(x, cosine, sine, runs, self.config.num_heads, team)
            if layer in self._deepstack:
                features.append(self._deepstack[layer](x, self.config.merge_size**2, team, norm_after_join=True))
        main = self._merger(x, self.config.merge_size**2, team, norm_after_join=False)
        rows = torch.cat([main, *features], dim=1).numpy()
        result: list[npt.NDArray[np.float32]] = [rows] * len(order)
        start = 0
        for i in order:
            end = start + grids[i][0] * grids[i][1] * grids[i][2] // self.config.merge_size**2
            result[i] = rows[start:end]
            start = end
        return result

    def _position_embedding(self, geometry: _Geometry) -> Tensor:
        taps = F.embedding(geometry.taps, self._position_table)  # [num_patches, 4, hidden]
        return torch.einsum("ptd,pt->pd", taps, geometry.tap_weights)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _LAYER_NORM_EPS)


class _Prefixed:
    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.tensor(self._prefix + name)

    def linear(self, name: str) -> Linear:
        return Linear(self._weights, [self._prefix + name], bias=True)

    def norm(self, name: str) -> _Norm:
        return _Norm(self[f"{name}.weight"], self[f"{name}.bias"])


class _Block:
    def __init__(self, tensors: _Prefixed, prefix: str) -> None:
        self._norm1, self._norm2 = tensors.norm(f"{prefix}norm1"), tensors.norm(f"{prefix}norm2")
        self._qkv, self._proj = tensors.linear(f"{prefix}attn.qkv"), tensors.linear(f"{prefix}attn.proj")
        self._fc1, self._fc2 = tensors.linear(f"{prefix}mlp.linear_fc1"), tensors.linear(f"{prefix}mlp.linear_fc2")

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, runs: list[tuple[int, int]], num_heads: int, team: Team | None
    ) -> None:
        """x [num_patches, hidden], in place. `runs`: (patches per image, images) of neighbours of one size."""
        num_patches, hidden = x.shape
        qkv = self._qkv(self._norm1(x), team=team).view(num_patches, 3, num_heads, hidden // num_heads)
        _rotate(qkv[:, :2], cosine[:, None], sine[:, None])
        attended = torch.empty(num_patches, num_heads, hidden // num_heads)
        start = 0
        for length, count in runs:
            end = start + length * count
            # [images, heads, patches, head_dim]
            q, k, v = qkv[start:end].view(count, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            attended[start:end] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(end - start, num_heads, -1)
            start = end
        x += self._proj(attended.view(num_patches, hidden), team=team)
        inner = F.gelu(self._fc1(self._norm2(x), team=team), approximate="tanh")
        x += self._fc2(inner, team=team)


class _Merger:
    """Joins merge_size**2 neighbouring patches to one row. The main one normalizes each patch, deepstack ones the joined row."""

    def __init__(self, tensors: _Prefixed, prefix: str) -> None:
        self._norm = tensors.norm(f"{prefix}norm")
        self._fc1, self._fc2 = tensors.linear(f"{prefix}linear_fc1"), tensors.linear(f"{prefix}linear_fc2")

    def __call__(self, x: Tensor, num_joined: int, team: Team | None, *, norm_after_join: bool) -> Tensor:
        joined = x.view(-1, x.shape[1] * num_joined)
        normed = self._norm(joined) if norm_after_join else self._norm(x).view_as(joined)
        return self._fc2(F.gelu(self._fc1(normed, team=team)), team=team)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotary embedding in place on x [..., head_dim], whose pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    turned = first * cosine - second * sine
    second.mul_(cosine).addcmul_(first, sine)
    first.copy_(turned)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What follows from an image's grid alone; patches in merge-block order."""

    taps: Tensor  # int64 [num_patches, 4] into the position table
    tap_weights: Tensor  # [num_patches, 4]
    cosine: Tensor  # [num_patches, head_dim / 2]: height frequencies, then width frequencies
    sine: Tensor


@lru_cache(maxsize=64)
def _geometry(grid: Grid, config: VisionConfig) -> _Geometry:
    frames, rows, columns = grid
    merge = config.merge_size
    blocks = (rows // merge, merge, columns // merge, merge)
    row, column = (
        torch.from_numpy(np.tile(index.reshape(blocks).transpose(0, 2, 1, 3).ravel(), frames))
        for index in np.indices((rows, columns), np.int64)
    )
    side = round(config.num_position_embeddings**0.5)
    row_taps, row_weights = _taps(row, rows, side)
    column_taps, column_weights = _taps(column, columns, side)
    pairs = config.hidden_size // config.num_heads // 2  # frequencies: half for the height, half for the width
    frequencies = 1.0 / (_ROPE_THETA ** (torch.arange(0, pairs, 2, dtype=torch.float32) / pairs))
    angles = torch.cat([row[:, None].float() * frequencies, column[:, None].float() * frequencies], dim=1)
    return _Geometry(
        taps=(row_taps[:, :, None] * side + column_taps[:, None, :]).flatten(1),
        tap_weights=(row_weights[:, :, None] * column_weights[:, None, :]).flatten(1),
        cosine=angles.cos(),
        sine=angles.sin(),
    )


def _taps(index: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Bilinear with aligned corners: the two neighbours of each index in a table of `side`, and their weights. [n, 2] each."""
    source = index.float() * (side - 1) / max(size - 1, 1)
    low = source.floor()
    share = source - low
    taps = torch.stack([low, low + 1], dim=1).long().clamp(0, side - 1)
    return taps, torch.stack([1 - share, share], dim=1)
