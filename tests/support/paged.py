"""A toy of paged KV memory: a cell holds what its KV would depend on, so that a wrong block shows as a wrong content."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from epd.step import Int32Array
from protocol.messages import MMItem, Sampling

Cell = tuple[object, ...]


class PagedMemory:
    """[num_blocks, block_size] cells."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._cells: list[list[Cell]] = [[("never written",)] * block_size for _ in range(num_blocks)]

    def write(self, table: Sequence[int], start: int, cells: Sequence[Cell]) -> None:
        for place, cell in enumerate(cells, start):
            self._cells[table[place // self.block_size]][place % self.block_size] = cell

    def read(self, table: Sequence[int], num_tokens: int) -> list[Cell]:
        return [self._cells[table[place // self.block_size]][place % self.block_size] for place in range(num_tokens)]

    def copy_block(self, block_id: int, to: PagedMemory, to_id: int) -> None:
        to._cells[to_id] = list(self._cells[block_id])


def cells_of(token_ids: Sequence[int] | Int32Array, items: Sequence[MMItem]) -> list[Cell]:
    """Per token what its own KV comes from: its id, and behind a placeholder the row of which image."""
    cells: list[Cell] = [(int(token_id),) for token_id in token_ids]
    for item in items:
        for row in range(item.num_tokens):
            cells[item.offset + row] += (item.mm_hash, item.grid_t, item.grid_h, item.grid_w, row)
    return cells


def draw(cells: Sequence[Cell], num_ids: int) -> int:
    """The token that comes after a context: any function of all of it will do."""
    return zlib.crc32(repr(list(cells)).encode()) % num_ids


def generate(
    prompt: Sequence[int], items: Sequence[MMItem], sampling: Sampling, *, num_ids: int, max_model_len: int
) -> list[int]:
    """The output that any way of scheduling must come to. Token 0 ends it."""
    token_ids = list(prompt)
    while True:
        token_id = draw(cells_of(token_ids, items), num_ids)
        token_ids.append(token_id)
        num_output = len(token_ids) - len(prompt)
        is_stop = token_id in sampling.stop_token_ids or (token_id == 0 and not sampling.ignore_eos)
        if is_stop or num_output == sampling.max_tokens or len(token_ids) == max_model_len:
            return token_ids[len(prompt) :]


def an_item(mm_hash: str, offset: int, num_tokens: int) -> MMItem:
    return MMItem(mm_hash, offset, num_tokens, grid_t=1, grid_h=2, grid_w=2 * num_tokens)


def ids(*token_ids: int) -> Int32Array:
    return np.array(token_ids, dtype=np.int32)


def ramp(num_tokens: int, start: int = 100) -> Int32Array:
    """Token ids that no other start gives."""
    return np.arange(start, start + num_tokens, dtype=np.int32)
