"""Whether there is a GPU, and which: asked in a process of its own, so that whoever asks holds nothing on it.

`python -m tools.gpu_check.device` prints what it found as JSON. CUDA's simulator is no GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from tools.gpu_check.supervise import end, popen

NEEDED = (
    *("torch", "numpy", "numba", "uvloop", "msgspec", "aiohttp", "xxhash", "tokenizers", "safetensors", "jinja2", "PIL"),
    *("prometheus_client", "tqdm", "llguidance"),
)
PACKAGES = (
    *("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numba", "numba-cuda", "cuda-bindings", "nvidia-ml-py", "numpy"),
    *("msgspec", "transformers", "accelerate"),
)
SIMULATOR = "NUMBA_ENABLE_CUDASIM"
_OPEN_S = 90.0


class NoGpu(Exception):
    """There is none that can be used, and why."""


def find_gpu(*, timeout_s: float = _OPEN_S) -> dict[str, Any]:
    """Name, uuid, driver, memory, versions of the first device, as JSON values. Raises NoGpu."""
    if os.environ.get(SIMULATOR, "0") not in ("", "0"):
        raise NoGpu(f"{SIMULATOR} is set: Numba's simulator is no GPU; unset it")
    if lacking := [name for name in NEEDED if not find_spec(name)]:
        raise NoGpu(f"{', '.join(lacking)} cannot be imported by {sys.executable}: install epd's own requirements")
    process = popen([sys.executable, "-m", "tools.gpu_check.device"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NoGpu(f"the device could not be opened within {timeout_s:.0f} s") from None
    finally:
        end(process)
    answer = _last_object(output)
    if "name" not in answer:
        raise NoGpu(answer.get("error") or f"opening it ended with status {process.returncode}: {errors.strip()[-800:]}")
    return answer


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Opens the device as the product does. Raises gpu.errors.UnknownDevice."""
    import uuid

    import torch

    from gpu.cuda.backend import open_cuda

    backend = open_cuda(0)
    info = backend.driver.info
    capability = ".".join(map(str, info.capability))
    found = {
        "name": info.name,
        "uuid": f"GPU-{uuid.UUID(bytes=info.uuid)}",
        "capability": capability,
        "num_multiprocessors": info.num_multiprocessors,
        "total_bytes": info.total_bytes,
        "free_bytes": backend.memory_budget(),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "kernels": backend.kernels.name,
        "dtype": backend.dtype,
        "versions": versions(),
    }
    backend.close()
    return found


def lines(gpu: dict[str, Any]) -> list[str]:
    """For people."""
    memory = f"{gpu['free_bytes'] / 2**30:.1f} of {gpu['total_bytes'] / 2**30:.1f} GiB free"
    packages = ", ".join(f"{name} {version}" for name, version in gpu["versions"].items())
    return [
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['num_multiprocessors']} multiprocessors, {memory}",
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}, {gpu['kernels']} kernels, {gpu['dtype']}",
        packages,
    ]


def _driver_version() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    except Exception:  # not installed, or it may not be asked: nvidia-smi may
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            return "unknown"


def _last_object(output: str) -> dict[str, Any]:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    return {}


if __name__ == "__main__":
    try:
        print(json.dumps(describe()), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        sys.exit(1)
