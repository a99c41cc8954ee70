"""The vision tower of Qwen3-VL on a device: grey levels of several images in, rows of embedding out, in few and large kernels.

Knows the tower's layers, and what follows from the place of a patch. Does not know files, requests or pools. All images of a
batch go through every linear layer together; attention stays within an image. What would need memory for four neighbours of each
patch (position embedding) or for numbers in place of grey levels (patch embedding) is done a part of the batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epd.model.config import ImageConfig, VisionConfig
from epd.model.device.layers import TensorSource
from epd.model.device.vision_attention import Kernel, Sequences, dense
from epd.model.preprocess import normalized_levels

_LAYER_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0
_PART = 8192  # patches that are embedded at a time

Store = Callable[[int, Tensor], None]
"""Takes the rows [num_tokens, out_hidden_size] of the main embedding (0) or of deepstack feature i (i + 1), in order."""


@dataclass(frozen=True, slots=True)
class Patches:
    """A batch on the device; images follow each other by rising number of patches, patches in merge-block order."""

    pixels: Tensor  # uint8 [num_patches, channels * patch * patch]
    row: Tensor  # int32 [num_patches]
    column: Tensor
    last_row: Tensor  # float32 [num_patches]: of the patch's image, at least 1
    last_column: Tensor
    frames: Sequences


class DeviceVisionModel:
    """Immutable after construction but for the choice of `attention`; may be shared by runners."""

    def __init__(
        self, config: VisionConfig, image: ImageConfig, weights: TensorSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Weights that are on the device in the dtype are used where they are."""
        self.config = config
        self.device = device
        self.dtype = dtype
        self.attention: Kernel = dense
        tensors = _Tensors(weights, device, dtype)
        self._patch_embed = tensors.linear("patch_embed.proj")
        self._positions = tensors["pos_embed.weight"].float()
        self._levels = torch.from_numpy(normalized_levels(image)).flatten().to(device, dtype)  # [channels * 256]
        self._channels = torch.arange(config.in_channels, dtype=torch.int32, device=device)[:, None] * 256
        self._blocks = [_Block(tensors, f"blocks.{i}.") for i in range(config.depth)]
        self._merger = _Merger(tensors, "merger.", config, norm_after_join=False)
        self._deepstack = {
            layer: _Merger(tensors, f"deepstack_merger_list.{i}.", config, norm_after_join=True)
            for i, layer in enumerate(config.deepstack_layers)
        }
        pairs = config.hidden_size // config.num_heads // 2  # frequencies: half for the height, half for the width
        exponents = torch.arange(0, pairs, 2, dtype=torch.float32) / pairs
        self._frequencies = (1.0 / _ROPE_THETA**exponents).to(device)

    @torch.inference_mode()
    def forward(self, patches: Patches, store: Store) -> None:
        """Launches the tower and hands each part of the embedding to `store` as soon as it is there. Waits for nothing."""
        x = self._embed(patches)
        angles = torch.stack([patches.row, patches.column], dim=1)[:, :, None] * self._frequencies
        cosine, sine = angles.flatten(1).cos(), angles.flatten(1).sin()  # float32 [num_patches, head_dim / 2]
        features = 0
        for layer, block in enumerate(self._blocks):
            block.forward(x, cosine, sine, patches.frames, self.config.num_heads, self.attention)
            if layer in self._deepstack:
                features += 1
                store(features, self._deepstack[layer](x))
        store(0, self._merger(x))

    def _embed(self, patches: Patches) -> Tensor:
        """Patch and position embedding, [num_patches, hidden]."""
        x = torch.empty(len(patches.pixels), self.config.hidden_size, dtype=self.dtype, device=self.device)
        for start in range(0, len(x), _PART):
            part = slice(start, start + _PART)
            torch.addmm(self._patch_embed.bias, self._numbers(patches.pixels[part]), self._patch_embed.weight.t(), out=x[part])
            x[part] += self._position_embedding(patches, part)
        return x

    def _numbers(self, pixels: Tensor) -> Tensor:
        """Grey levels as what they stand for, the still repeated over the temporal patch: [n, patch_width]."""
        config = self.config
        channels = pixels.view(len(pixels), config.in_channels, config.patch_size**2)
        numbers = self._levels[channels.int() + self._channels]
        frames = numbers[:, :, None].expand(-1, -1, config.temporal_patch_size, -1)
        return frames.reshape(len(pixels), config.patch_width)

    def _position_embedding(self, patches: Patches, part: slice) -> Tensor:
        """Bilinear with aligned corners out of a square table: float32 [n, hidden]."""
        side = round(self.config.num_position_embeddings**0.5)
        rows, row_weights = _taps(patches.row[part], patches.last_row[part], side)
        columns, column_weights = _taps(patches.column[part], patches.last_column[part], side)
        taps = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
        weights = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
        return F.embedding_bag(taps, self._positions, per_sample_weights=weights, mode="sum")


class _Tensors:
    """The tower's weights by their names in it, on the device."""

    def __init__(self, weights: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.tensor(f"model.visual.{name}").to(self._device, self._dtype)

    def linear(self, name: str) -> _Linear:
        return _Linear(self[f"{name}.weight"].flatten(1), self[f"{name}.bias"])

    def norm(self, name: str) -> _Norm:
        return _Norm(self[f"{name}.weight"], self[f"{name}.bias"])


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _LAYER_NORM_EPS)


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # [out, in]
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def tanh_gelu(self, x: Tensor) -> Tensor:
        """On a GPU the product's own kernel adds the bias and applies the function before it rounds and writes."""
        if x.is_cuda:
            return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)
        return F.gelu(self(x), approximate="tanh")

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += x @ weight.T + bias, the sum within the product's kernel."""
        total += self.bias
        total.addmm_(x, self.weight.t())


class _Block:
    def __init__(self, tensors: _Tensors, prefix: str) -> None:
        self._norm1, self._norm2 = tensors.norm(f"{prefix}norm1"), tensors.norm(f"{prefix}norm2")
        self._qkv, self._proj = tensors.linear(f"{prefix}attn.qkv"), tensors.linear(f"{prefix}attn.proj")
        self._fc1, self._fc2 = tensors.linear(f"{prefix}mlp.linear_fc1"), tensors.linear(f"{prefix}mlp.linear_fc2")

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, frames: Sequences, num_heads: int, attention: Kernel) -> None:
        """x [num_patches, hidden], in place."""
        self._attend(x, cosine, sine, frames, num_heads, attention)
        self._fc2.add_to(x, self._fc1.tanh_gelu(self._norm2(x)))

    def _attend(self, x: Tensor, cosine: Tensor, sine: Tensor, frames: Sequences, num_heads: int, attention: Kernel) -> None:
        qkv = self._qkv(self._norm1(x)).view(len(x), 3, num_heads, x.shape[1] // num_heads)
        q, k = _rotated(qkv[:, :2], cosine, sine).unbind(1)
        self._proj.add_to(x, attention(q, k, qkv[:, 2], frames).reshape(x.shape))


class _Merger:
    """Joins merge_size**2 neighbouring patches to one row. The main one normalizes each patch, deepstack ones the joined row."""

    def __init__(self, tensors: _Tensors, prefix: str, config: VisionConfig, *, norm_after_join: bool) -> None:
        self._norm = tensors.norm(f"{prefix}norm")
        self._fc1, self._fc2 = tensors.linear(f"{prefix}linear_fc1"), tensors.linear(f"{prefix}linear_fc2")
        self._joined_width = config.hidden_size * config.merge_size**2
        self._norm_after_join = norm_after_join

    def __call__(self, x: Tensor) -> Tensor:
        joined = x.view(-1, self._joined_width)
        normed = self._norm(joined) if self._norm_after_join else self._norm(x).view_as(joined)
        return self._fc2(F.gelu(self._fc1(normed)))


def _rotated(qk: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of qk [num_patches, 2, heads, head_dim] on pairs (i, i + head_dim / 2); angles in float32."""
    pairs = qk.view(*qk.shape[:3], 2, -1)
    rotated = torch.empty(pairs.shape, dtype=qk.dtype, device=qk.device)
    torch.mul(pairs, cosine[:, None, None, None, :], out=rotated)
    sine = sine[:, None, None, :]
    rotated[:, :, :, 0].addcmul_(pairs[:, :, :, 1], sine, value=-1)
    rotated[:, :, :, 1].addcmul_(pairs[:, :, :, 0], sine)
    return rotated.view(qk.shape)


def _taps(index: Tensor, last: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two neighbours of each index in a table of `side`, int64 [n, 2], and their weights."""
    source = index.float() * (side - 1) / last
    low = source.floor()
    share = source - low
    taps = torch.stack([low, low + 1], dim=1).long().clamp(0, side - 1)
    return taps, torch.stack([1 - share, share], dim=1)
