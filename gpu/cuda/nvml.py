"""An accelerator's utilisation, memory and power, from the driver's management library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gpu.utilisation import DeviceUsage

T = TypeVar("T")


class NvmlMeter:
    """Of one device, by its uuid: NVML numbers all devices of the machine, CUDA those that the process may see."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        name = nvml.nvmlDeviceGetName(self._handle)
        self._name = name.decode() if isinstance(name, bytes) else str(name)

    def read(self) -> DeviceUsage:
        nvml, handle = self._nvml, self._handle
        rates = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return DeviceUsage(
            name=self._name,
            utilisation=None if rates is None else rates.gpu / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
        )

    def close(self) -> None:
        self._ask(self._nvml.nvmlShutdown)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Not every device answers everything, and none does while it is being reset."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def open_device_meter(device: str) -> NvmlMeter | None:
    """Of "cuda:N"; None where the library is not installed or the driver does not let us."""
    try:
        import pynvml
        import torch
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(int(device.partition(":")[2] or 0)).uuid)
        return NvmlMeter(pynvml, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except (pynvml.NVMLError, RuntimeError, AssertionError):  # torch: no CUDA in this build, or no such device
        return None
