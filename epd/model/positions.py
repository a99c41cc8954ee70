"""Positions of tokens: one number per token for text, (time, height, width) for image placeholders (interleaved M-RoPE).

Text moves all three by one. An image whose first placeholder would be at position p has time p, height p + row, width p + column
on the merged grid, and the text after it goes on at p + max(rows, columns). From Qwen2-VL (arXiv 2409.12191) as Qwen3-VL uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epd.errors import BadRequest
from protocol.messages import MMItem


def check_grids(items: Sequence[MMItem], merge_size: int) -> None:
    """Raises BadRequest unless every image takes as many tokens as its merged grid has places."""
    for item in items:
        places = item.grid_t * (item.grid_h // merge_size) * (item.grid_w // merge_size)
        if min(item.grid_t, item.grid_h, item.grid_w) < 1 or item.num_tokens != places:
            grid = f"{item.grid_t} x {item.grid_h} x {item.grid_w}"
            raise BadRequest(f"an image of {item.num_tokens} tokens cannot have a grid of {grid} patches")


def mrope_positions(num_tokens: int, items: Sequence[MMItem], merge_size: int) -> npt.NDArray[np.int32]:
    """Positions [3, num_tokens] of a prompt; `items` are its images in order of offset."""
    positions = np.empty((3, num_tokens), np.int32)
    token, position = 0, 0
    for item in items:
        positions[:, token : item.offset] = np.arange(position, position + item.offset - token, dtype=np.int32)
        position += item.offset - token
        token = item.offset + item.num_tokens
        rows, columns = item.grid_h // merge_size, item.grid_w // merge_size
        image = positions[:, item.offset : token].reshape(3, item.grid_t, rows, columns)
        image[0] = position + np.arange(item.grid_t, dtype=np.int32)[:, None, None]
        image[1] = position + np.arange(rows, dtype=np.int32)[:, None]
        image[2] = position + np.arange(columns, dtype=np.int32)
        position += max(rows, columns)
    positions[:, token:] = np.arange(position, position + num_tokens - token, dtype=np.int32)
    return positions


def mrope_next(num_tokens: int, items: Sequence[MMItem], merge_size: int) -> int:
    """Position of token number `num_tokens`, where every item lies before it and every token after the last item is text."""
    saved = sum(item.num_tokens - max(item.grid_h, item.grid_w) // merge_size for item in items)
    return num_tokens - saved
