"""Where a figure was measured: processor, memory, versions, the commit. Nothing that names a person or a network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "numpy", "numba", "uvloop", "msgspec", "aiohttp", "transformers", "tokenizers", "nixl-cu12")
_ROOT = Path(__file__).resolve().parents[2]


def describe_machine() -> dict[str, Any]:
    """Facts about this machine and this checkout, as JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "has_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def machine_slug(machine: dict[str, Any]) -> str:
    """A file name's part that tells machines apart, as in "amd-epyc-2-cores"."""
    words = re.sub(r"\(.*?\)|@.*|processor|cpu", " ", str(machine["cpu"]).lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words)[:4], str(machine["cores"]), "cores"])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""  # an unpacked archive
