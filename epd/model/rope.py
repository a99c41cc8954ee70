"""Rotary position embedding of the language model, with one position per token or interleaved M-RoPE."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from epd.model.config import TextConfig

FloatArray = npt.NDArray[np.float32]
_FIRST_POSITIONS = 4096


class RopeTable:
    """Cosines and sines of every position seen so far, by frequency. Grows by doubling; readers keep the tables they hold."""

    def __init__(self, config: TextConfig) -> None:
        pairs = config.head_dim // 2
        self._frequencies, self._axis = rope_frequencies(config)
        self._columns = np.arange(pairs)
        self._limit = config.max_position_embeddings
        self._tables = self._compute(min(_FIRST_POSITIONS, self._limit))

    def rotations(self, positions: npt.NDArray[np.int32]) -> tuple[FloatArray, FloatArray]:
        """(cosine, sine), each [n, head_dim / 2] float32 contiguous, for positions [3, n]."""
        highest = int(positions.max(initial=0))
        tables = self._tables
        if highest >= len(tables[0]):
            tables = self._tables = self._compute(max(highest + 1, min(2 * highest, self._limit)))
        if (positions[0] == positions[1:]).all():
            return tables[0][positions[0]], tables[1][positions[0]]
        index = positions[self._axis].T  # [n, pairs]
        return np.ascontiguousarray(tables[0][index, self._columns]), np.ascontiguousarray(tables[1][index, self._columns])

    def _compute(self, num_positions: int) -> tuple[FloatArray, FloatArray]:
        angles = np.arange(num_positions, dtype=np.float32)[:, None] * self._frequencies
        return np.cos(angles), np.sin(angles)


def rope_frequencies(config: TextConfig) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Radians per position and the axis of the position (0 time, 1 height, 2 width), each [head_dim / 2].

    Frequency j turns by theta**(-2j / head_dim) per position (Su et al., arXiv 2104.09864). Of Qwen3-VL's frequencies
    1, 4, 7, ... follow the height (up to three times its section), 2, 5, 8, ... the width, and the rest the time.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    axes = np.zeros(config.head_dim // 2, np.int64)
    for axis, count in enumerate(config.mrope_section or ()):
        if axis:
            axes[axis : 3 * count : 3] = axis
    return (np.float32(1) / np.float32(config.rope_theta) ** exponents).astype(np.float32), axes
