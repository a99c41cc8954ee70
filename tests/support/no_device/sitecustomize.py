"""With this folder on PYTHONPATH `--device cuda` is a driver without a device, in a process and in all that it starts. For tests.

Python imports this file by itself when it starts. Nothing in the product knows of it.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_REPLACED = {"gpu.cuda.cupy_driver": "driver.py", "gpu.cuda.choose": "choose.py"}


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if (file := _REPLACED.get(fullname)) is None:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).parent / file)


def _fail(*_: object) -> None:
    sys.modules["gpu.cuda.cupy_driver"].fail_all()


signal.signal(signal.SIGUSR1, _fail)
sys.meta_path.insert(0, _Finder())
sys.path.append(str(Path(__file__).parents[3]))
