"""What an embedding has to be before it is fetched."""

from __future__ import annotations

from typing import NoReturn

import msgspec
import pytest

from epd.clock import monotonic
from epd.errors import StaleHandle
from epd.prefill.embeddings import EmbeddingFetcher
from epd.transfer.receiver import Receiver
from gpu.cpu import CpuBackend
from protocol.messages import EmbeddingRef, MMItem, WorkerId
from tests.support.systems import running

ITEM = MMItem("one", offset=0, num_tokens=5, grid_t=1, grid_h=5, grid_w=1)
REF = EmbeddingRef(
    WorkerId("encode"), generation=1, layout=8, lease_id=1, mm_hash="one", num_tokens=5, block_ids=(0, 1, 2), checksums=(7, 8, 9)
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": 9}, "another model"),
        ({"mm_hash": "other"}, "the embedding of other, not of one"),
        ({"num_tokens": 6}, "6 rows for an image of 5 tokens"),
        ({"block_ids": (0, 1)}, "5 rows for an image of 5 tokens"),
    ],
)
async def test_what_is_not_the_item_s_embedding_is_refused_before_anything_is_fetched(
    changes: dict[str, object], reason: str
) -> None:
    def allocate(num_blocks: int) -> NoReturn:
        raise AssertionError(f"{num_blocks} blocks were to be fetched")

    backend = CpuBackend()
    try:
        async with running("prefill") as (system,):
            receiver = Receiver(system, backend, backend.open_stream("in"), allowed="auto", local_pools=[], clock=monotonic)
            fetcher = EmbeddingFetcher(system, receiver, allocate=allocate, block_rows=2, width=6, layout=8)
            with pytest.raises(StaleHandle, match=reason):
                await fetcher.fetch(msgspec.structs.replace(REF, **changes), system.endpoint, ITEM)
            receiver.close()
    finally:
        backend.close()
