"""What an emulated model says: tokens that are a function of the prompt, its images, the seed and the position, and nothing else.

Each token of a sequence adds a number to a running sum, and the sum after a token is what its KV slot holds. The next token
follows from the last slot. So whoever attends to a wrong block says something else than `expected_tokens`, at the price of one
look-up a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

Words = npt.NDArray[np.uint64]

FIRST_TOKEN, NUM_TOKENS = 64, 26  # the letters a to z in byte-level vocabularies, which begin with the printable ASCII characters

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def terms(values: Words, positions: Words) -> Words:
    """What tokens (or embedding rows) at these positions add to the sum. All [n]."""
    return _mix(values + np.uint64(1) + _mix((positions + np.uint64(1)) * _ODD))


def drawn(sums: Words, seeds: Words) -> npt.NDArray[np.int64]:
    """The tokens that follow sequences with these sums. [n]"""
    mixed = _mix(sums ^ (seeds * _ODD))
    return (mixed % np.uint64(NUM_TOKENS)).astype(np.int64) + FIRST_TOKEN


def embedding_rows(mm_hash: str, num_tokens: int) -> Words:
    """Rows [num_tokens, 1] that an image of this name is encoded to."""
    start = np.uint64(xxhash.xxh3_64_intdigest(mm_hash.encode()))
    return _mix(start + np.arange(num_tokens, dtype=np.uint64) * _ODD)[:, None]


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, *, seed: int = 0, images: Sequence[tuple[int, str, int]] = ()
) -> list[int]:
    """What an emulated cluster answers. `images`: (offset, mm_hash, num_tokens) of each placeholder range."""
    values = np.asarray(prompt, dtype=np.int64).astype(np.uint64)
    for offset, mm_hash, count in images:
        values[offset : offset + count] = embedding_rows(mm_hash, count)[:, 0]
    total = terms(values, np.arange(len(values), dtype=np.uint64)).sum(dtype=np.uint64, keepdims=True)
    seeds = np.array([seed & (2**64 - 1)], np.uint64)
    output: list[int] = []
    for position in range(len(prompt), len(prompt) + num_tokens):
        output += drawn(total, seeds).tolist()
        total = total + terms(np.array(output[-1:], np.uint64), np.array([position], np.uint64))
    return output


def _mix(words: Words) -> Words:
    """SplitMix-like finisher (two rounds of multiply and xor-shift)."""
    words = words ^ (words >> _SHIFT)
    words = words * _MIX
    words = words ^ (words >> _SHIFT)
    words = words * _MIX
    return words ^ (words >> _SHIFT)
