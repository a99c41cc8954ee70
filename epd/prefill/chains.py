"""Which blocks are on their way into the prefix cache, and through whom: who needs one waits and does not compute it twice.

Owns: the hashes that running requests are going to publish. The first who computes a block is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from epd.prefill.request import PrefillRequest


class Chains:
    def __init__(self) -> None:
        self._computing: dict[int, PrefillRequest] = {}

    def begin(self, request: PrefillRequest, hashes: Iterable[int]) -> None:
        """A request is going to compute these blocks."""
        for block_hash in hashes:
            self._computing.setdefault(block_hash, request)

    def end(self, request: PrefillRequest, hashes: Iterable[int]) -> None:
        """It has, or it will not."""
        for block_hash in hashes:
            if self._computing.get(block_hash) is request:
                del self._computing[block_hash]

    def is_coming(self, block_hash: int, num_tokens: int) -> bool:
        """Whether somebody computes this block, the one that ends after `num_tokens` tokens, and can get there."""
        request = self._computing.get(block_hash)
        return request is not None and request.runnable_until(request.num_computed_tokens) >= num_tokens

    def requests(self) -> tuple[PrefillRequest, ...]:
        return tuple(self._computing.values())
