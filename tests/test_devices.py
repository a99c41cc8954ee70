from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.devices import (
    Seat,
    check_device,
    parse_workers,
    seats,
    step_limits,
    tokens_beside_decode,
    workers_text,
)
from epd.errors import BadConfig

COUNTS = {"encode": 2, "prefill": 1, "decode": 1}


@pytest.mark.parametrize("text", ["cpu", "cuda:3", "emulated:h200.json"])
def test_a_device_keeps_its_name(text: str) -> None:
    assert check_device(text) == text


def test_cuda_alone_is_the_first_one() -> None:
    assert check_device("cuda") == "cuda:0"


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "emulated:", "cpu,cpu", "cpu:1"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="choose cpu, cuda"):
        check_device(text)


@pytest.mark.parametrize(
    ("devices", "placed"),
    [
        ("cpu", ["cpu", "cpu", "cpu", "cpu"]),
        ("cuda", ["cuda:0"] * 4),
        ("cuda:0, cuda:1, cuda:2", ["cuda:0", "cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:0,cuda:1,cuda:2,cuda:3", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
    ],
)
def test_one_device_for_all_for_each_stage_or_for_each_worker(devices: str, placed: list[str]) -> None:
    assert [seat.device for role in COUNTS for seat in seats(devices, COUNTS, 0.9)[role]] == placed


@pytest.mark.parametrize("devices", ["cuda:0,cuda:1", "cuda:0,cuda:1,cuda:2,cuda:3,cuda:4", "cuda:0,,cuda:1"])
def test_another_number_of_devices_is_refused(devices: str) -> None:
    with pytest.raises(BadConfig):
        seats(devices, COUNTS, 0.9)


@pytest.mark.parametrize(
    ("device", "active_share", "tokens"),
    [
        ("cuda", 1.0, 512),
        ("cuda", 0.5, 1024),
        ("cuda", 0.1, 2048),  # no longer than one request's chunk
        ("cpu", 1.0, 2048),
        ("cpu", 0.1, 2048),
    ],
)
def test_beside_decode_few_tokens_unless_they_read_far_more_than_they_use(device: str, active_share: float, tokens: int) -> None:
    assert tokens_beside_decode(step_limits(device), active_share) == tokens


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("encode:2,prefill:1,decode:1", {"encode": 2, "prefill": 1, "decode": 1}),
        ("prefill + encode:7, decode:1", {"encode+prefill": 7, "decode": 1}),
        ("decode+prefill+encode:8", {"encode+prefill+decode": 8}),
        ("prefill+decode:1,decode:1,decode+prefill:2", {"prefill+decode": 3, "decode": 1}),
    ],
)
def test_workers_of_any_stages(text: str, counts: dict[str, int]) -> None:
    assert parse_workers(text) == counts
    assert parse_workers(workers_text(counts)) == counts


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("encode:1,prefill:1", "nobody has the stage decode, which"),
        ("encode:1", "nobody has the stage decode and prefill"),
        ("gateway:1,prefill+decode:1", "expected STAGE"),
        ("prefill+prefill+decode:1", "expected STAGE"),
        ("prefill+decode:0", "expected STAGE"),
        ("prefill+decode:-1", "expected STAGE"),
        ("prefill+decode", "expected STAGE"),
        ("prefill+decode:1,", "expected STAGE"),
    ],
)
def test_what_are_no_workers_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadConfig, match=why):
        parse_workers(text)


def test_processes_on_one_card_share_it() -> None:
    found = seats("cuda", {"encode": 1, "prefill": 1, "decode": 1}, 0.8)
    assert found == {
        "encode": (Seat("cuda:0", 0.1),),
        "prefill": (Seat("cuda:0", 0.3),),
        "decode": (Seat("cuda:0", 0.4),),
    }


def test_a_host_is_not_shared_out() -> None:
    assert seats("cpu", COUNTS, 0.9)["decode"] == (Seat("cpu", 0.9),)


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.floats(0.1, 1.0), st.data())
def test_no_card_is_given_away_twice(counts: list[int], fraction: float, data: st.DataObject) -> None:
    named = data.draw(st.lists(st.sampled_from(["cuda:0", "cuda:1"]), min_size=sum(counts), max_size=sum(counts)))
    found = seats(",".join(named), dict(zip(COUNTS, counts, strict=True)), fraction)
    for device in set(named):
        taken = sum(seat.memory_fraction for role in found.values() for seat in role if seat.device == device)
        assert taken <= fraction + 1e-3 * len(named)
