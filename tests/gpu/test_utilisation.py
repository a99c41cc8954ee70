"""What a process says of itself, and what becomes of an accelerator that does not answer."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gpu import utilisation
from gpu.cuda.nvml import NvmlMeter, open_device_meter
from gpu.utilisation import DeviceUsage, Meter, open_meter


class _Refused(Exception):
    pass


class _Nvml:
    """Stands in for the library: one device, which answers what `refuses` does not name."""

    NVMLError = _Refused

    def __init__(self, *refuses: str) -> None:
        self.refuses = refuses
        self.is_open = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise _Refused(uuid)
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return self._answer("utilisation", SimpleNamespace(gpu=42, memory=7))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return self._answer("memory", SimpleNamespace(total=1000, used=10, free=990))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> SimpleNamespace | int:
        if "power" in self.refuses:
            raise _Refused
        return 250_500

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def _answer(self, what: str, value: SimpleNamespace) -> SimpleNamespace:
        if what in self.refuses:
            raise _Refused(what)
        return value


def test_a_process_knows_its_time_and_memory() -> None:
    meter = open_meter("cpu")
    before = meter.read()
    held = mmap.mmap(-1, 64 * 2**20)  # memory that nobody had before, and written to: else there may be nothing of it
    for place in range(0, len(held), mmap.PAGESIZE):
        held[place] = 1
    sum(range(200_000))
    after = meter.read()
    assert after.cpu_s > before.cpu_s
    assert after.rss_bytes - before.rss_bytes > 32 * 2**20
    held.close()
    assert after.device is None
    assert after.host_busy is None or 0.0 <= after.host_busy <= 1.0
    meter.close()


@pytest.mark.parametrize(
    ("before", "after", "busy"),
    [("cpu  10 0 10 70 10 0 0 0 0 0", "cpu  40 0 40 90 30 0 0 0 0 0", 0.6), ("cpu  1 0 0 0 0 0 0 0 0 0",) * 2 + (None,)],
)
def test_how_busy_the_host_is(
    before: str, after: str, busy: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(f"{before}\ncpu0 1 2 3\n")
    monkeypatch.setattr(utilisation, "_STAT", stat)
    meter = Meter()
    stat.write_text(f"{after}\ncpu0 1 2 3\n")
    assert meter.read().host_busy == (busy if busy is None else pytest.approx(busy))


def test_a_host_that_tells_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "_STAT", tmp_path / "nothing")
    assert Meter().read().host_busy is None


def test_a_device_is_read_through_the_driver() -> None:
    nvml = _Nvml()
    meter = Meter(NvmlMeter(nvml, "GPU-1"))
    assert meter.read().device == DeviceUsage("NVIDIA H200", 0.42, 10, 1000, 250.5)
    meter.close()
    assert not nvml.is_open


@pytest.mark.parametrize("what", ["utilisation", "memory", "power"])
def test_what_a_device_does_not_tell_is_none(what: str) -> None:
    usage = NvmlMeter(_Nvml(what), "GPU-1").read()
    assert (usage.utilisation is None, usage.memory_used_bytes is None, usage.power_w is None) == (
        what == "utilisation",
        what == "memory",
        what == "power",
    )


def test_without_the_library_or_the_device_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_device_meter("cuda:0") is None
    refusing = ModuleType("pynvml")
    refusing.NVMLError = _Refused  # type: ignore[attr-defined]

    def refuse() -> None:
        raise _Refused("no driver")

    refusing.nvmlInit = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", refusing)
    assert open_device_meter("cuda:0") is None


@pytest.mark.parametrize("device", ["cpu", "emulated:profile.json"])
def test_only_a_real_accelerator_brings_its_libraries_in(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpu.cuda.nvml", None)
    assert open_meter(device).read().device is None
