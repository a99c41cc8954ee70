from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.errors import StaleHandle
from epd.transfer.plan import Rung, best_rung, check_handle, kind_of, pieces
from protocol.messages import EmbeddingRef, Endpoint, KVRef, PoolRef, RequestId, WorkerId


def _endpoint(worker: str, host_id: str) -> Endpoint:
    return Endpoint(WorkerId(worker), "127.0.0.1", 1, "", host_id)


@pytest.mark.parametrize(
    ("own", "source", "allowed", "cannot_map", "rung"),
    [
        (("a", "h"), ("a", "h"), "auto", False, Rung.LOCAL),
        (("a", "h"), ("a", "h"), "socket", False, Rung.LOCAL),
        (("a", "h"), ("b", "h"), "auto", False, Rung.MAPPED),
        (("a", "h"), ("b", "h"), "mapped", False, Rung.MAPPED),
        (("a", "h"), ("b", "h"), "socket", False, Rung.SOCKET),
        (("a", "h"), ("b", "h"), "auto", True, Rung.SOCKET),
        (("a", "h"), ("b", "i"), "auto", False, Rung.SOCKET),
        (("a", ""), ("b", ""), "auto", False, Rung.SOCKET),  # a host that cannot tell who it is shares nothing
    ],
)
def test_best_rung(own: tuple[str, str], source: tuple[str, str], allowed: str, cannot_map: bool, rung: Rung) -> None:
    assert best_rung(_endpoint(*own), _endpoint(*source), allowed=allowed, cannot_map=cannot_map) is rung


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
