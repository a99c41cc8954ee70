"""Throw-away heads: they ask inner layers for what an answer will need, and the checkpoint leaves them out.

Answers alone teach slowly: a vision tower learns little from text that cannot see yet, and of a long count only a few tokens
tell where to stop. Asked directly, both come within some hundred steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny_model.batches import Batch, Pictures
from tools.tiny_model.network import WIDTH, Forward, ImageFeatures
from tools.tiny_model.scenes import COLOURS, KINDS

_END_LAYER = 2  # after this text layer each number should know the digits of the count's end
_DISTANCE_LAYER = 3  # and after this one how far that end is
_DISTANCES = 12  # 0 to 10 numbers to go, and more


class Heads(nn.Module):
    """Both kinds of heads."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.cells = CellHeads(num_features)
        self.counts = CountHeads()

    def loss(self, batch: Batch, result: Forward) -> Tensor | None:
        """What the batch's kind of head has to complain of; None if the batch shows and counts nothing."""
        if batch.pictures is not None and result.features is not None:
            return self.cells.loss(batch.pictures, result.features)
        return self.counts.loss(batch, result) if (batch.count_ends >= 0).any() else None


class CellHeads(nn.Module):
    """Colour and kind of what each image token shows, from the merged features and each deepstack level."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_colours = len(COLOURS) + 1
        self.heads = nn.ModuleList(nn.Linear(WIDTH, self.num_colours + len(KINDS) + 1) for _ in range(num_features))

    def loss(self, pictures: Pictures, features: ImageFeatures) -> Tensor:
        """Mean cross entropy over cells that show something certain."""
        losses = []
        for head, feature in zip(self.heads, [features.merged, *features.deepstack], strict=True):
            logits = head(feature).flatten(0, 1)
            losses.append(F.cross_entropy(logits[:, : self.num_colours], pictures.colours.flatten()))
            losses.append(F.cross_entropy(logits[:, self.num_colours :], pictures.kinds.flatten()))
        return torch.stack(losses).mean()


class CountHeads(nn.Module):
    """Where a count ends and how far that is, from each number of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.digits = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in range(3))
        self.distance = nn.Linear(WIDTH, _DISTANCES)

    def loss(self, batch: Batch, result: Forward) -> Tensor:
        """Mean cross entropy over the last digits of all numbers."""
        where = batch.count_ends >= 0
        ends = batch.count_ends[where]
        left = batch.counts_left[where].clamp(max=_DISTANCES - 1)
        knows_end = result.hidden[_END_LAYER][where]
        losses = [F.cross_entropy(head(knows_end), ends // 10**i % 10) for i, head in enumerate(self.digits)]
        losses.append(F.cross_entropy(self.distance(result.hidden[_DISTANCE_LAYER][where]), left))
        return torch.stack(losses).mean()
