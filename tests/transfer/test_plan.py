from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.errors import StaleHandle
from epd.transfer.plan import check_handle, kind_of, may_map, pieces
from protocol.messages import EmbeddingRef, Endpoint, KVRef, PoolRef, RequestId, WorkerId


def _endpoint(worker: str, host_id: str) -> Endpoint:
    return Endpoint(WorkerId(worker), "127.0.0.1", 1, "", host_id)


@pytest.mark.parametrize(
    ("own_host", "source_host", "allowed", "is_due"),
    [
        ("h", "h", "auto", True),
        ("h", "h", "mapped", True),
        ("h", "h", "socket", False),
        ("h", "i", "auto", False),
        ("h", "i", "mapped", False),
        ("", "", "auto", False),  # a host that cannot tell who it is shares nothing
    ],
)
def test_may_map(own_host: str, source_host: str, allowed: str, is_due: bool) -> None:
    assert may_map(_endpoint("a", own_host), _endpoint("b", source_host), allowed=allowed) is is_due


def _ref(**changes: object) -> KVRef:
    fields: dict[str, object] = {
        "worker": WorkerId("w"),
        "generation": 1,
        "layout": 2,
        "lease_id": 3,
        "request_id": RequestId("r"),
        "epoch": 1,
        "first_block": 0,
        "block_ids": (0, 4),
        "checksums": (7, 8),
    }
    return KVRef(**{**fields, **changes})  # type: ignore[arg-type]


_POOL = PoolRef(WorkerId("w"), "kv", generation=1, layout=2, num_blocks=5, block_bytes=16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation": 9}, "gone"),
        ({"layout": 9}, "layout"),
        ({"block_ids": (0, 5)}, "outside"),
        ({"block_ids": (-1, 0)}, "outside"),
        ({"checksums": (7,)}, "checksums"),
    ],
)
def test_a_handle_that_does_not_fit_is_refused(changes: dict[str, object], reason: str) -> None:
    check_handle(_ref(), _POOL)
    with pytest.raises(StaleHandle, match=reason):
        check_handle(_ref(**changes), _POOL)


def test_kind_of() -> None:
    assert kind_of(_ref()) == "kv"
    assert kind_of(EmbeddingRef(WorkerId("w"), 1, 2, 3, "h", 1, (0,), (1,))) == "embedding"


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 100))
def test_pieces_cover_everything_once_within_the_bound(num_blocks: int, block_bytes: int, max_bytes: int) -> None:
    block_ids = list(range(num_blocks))
    parts = [block_ids[piece] for piece in pieces(block_ids, block_bytes, max_bytes=max_bytes)]
    assert [block_id for part in parts for block_id in part] == block_ids
    assert all(len(part) * block_bytes <= max(max_bytes, block_bytes) and part for part in parts)
