from __future__ import annotations

import subprocess
from typing import Any

import msgspec
import pytest

from gpu.cpu import CpuBackend
from gpu.pool import PoolExport
from tools.bench import handoff
from tools.bench.handoff import Geometry, exporting, gather_figures
from tools.bench.rows import make_row

SMALL = Geometry("small", 300, 5)


def test_works_are_measured_in_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []
    figures = gather_figures(2, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 3
    assert set(figures) == {"a", "b"}
    assert all(value > 0 for value in figures.values())


def test_the_other_process_shares_what_it_says() -> None:
    backend = CpuBackend()
    with exporting(SMALL) as other:
        mapped = backend.map_pool(msgspec.convert(other["export"], PoolExport))
        own = handoff._own_pool(backend, SMALL)
        handoff.plain_memcpy(mapped, own)
        assert own.checksum(range(5)) == other["checksums"]
    assert len(set(other["checksums"])) == 5
    backend.close()


def test_each_throughput_stands_beside_a_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "_ROUNDS", 1)
    backend = CpuBackend()
    copied, sender = handoff._throughput(backend, SMALL)
    backend.close()
    assert (copied["bar"], sender["bar"]) == (">=0.6", "")
    for row in (copied, sender):
        assert row["baseline"] == copied["baseline"]
        assert row["ratio"] == pytest.approx(row["value"] / (row["baseline"] or 0))


@pytest.mark.parametrize(
    ("returncode", "out", "error", "reason"),
    [
        (1, "", "Traceback\nModuleNotFoundError: No module named 'nixl_cu12'", "No module named 'nixl_cu12'"),
        (0, "", "", "it said nothing"),
        (-11, '{"speed": 1, "fixed_s": 1}', "", "it said nothing"),
    ],
)
def test_a_peer_that_is_not_there_is_said_to_be_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], returncode: int, out: str, error: str, reason: str
) -> None:
    def run(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, returncode, out, error)

    monkeypatch.setattr(subprocess, "run", run)
    assert handoff._beside_nixl([]) == []
    assert reason in capsys.readouterr().err


def test_a_peer_that_is_there_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 0, 'INFO\n{"speed": 2.0, "fixed_s": 0.001}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    copied = make_row("KV between processes, 3.67 MB blocks", 10.0, "GB/s")
    rows = handoff._beside_nixl([copied, make_row("one 32 KiB block, on the calling thread", 0.5, "ms")])
    assert [row["ratio"] for row in rows] == [5.0, 0.5]
