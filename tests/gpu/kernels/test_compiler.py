from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpu.kernels.compiler import Kernel, declared, warm_up
from tests.gpu.processes import ROOT, run_python

# Compiles one kernel and says whether it came from the cache.
_COMPILE_ONE = """
from gpu.kernels import store_kv
from gpu.kernels.compiler import declared
one = next(each for each in declared() if each.name == "store_kv")
one.compile()
print(one.was_cached)
"""


def test_types_that_were_not_declared_are_refused_not_compiled() -> None:
    def first(array: npt.NDArray[np.float32]) -> np.float32:
        value: np.float32 = array[0]
        return value

    first_of = Kernel(first, "float32(float32[::1])")
    values = np.arange(4, dtype=np.float32)
    assert first_of(values) == 0
    wrongs: list[npt.NDArray[Any]] = [values.astype(np.float64), values[::2], values.reshape(2, 2)]
    for wrong in wrongs:
        with pytest.raises(TypeError, match="No matching definition"):
            first_of(wrong)


def test_warm_up_says_what_it_does_and_leaves_nothing_to_do() -> None:
    calls: list[tuple[str, int, int]] = []
    warm_up(lambda name, done, total: calls.append((name, done, total)))
    dones = [done for _, done, _ in calls]
    assert dones == sorted(dones)
    assert calls[-1] == ("", len(declared()), len(declared()))
    assert {each.name for each in declared()} <= {name for name, _, _ in calls}
    assert all(isinstance(each, Kernel) and each.is_compiled for each in declared())


def test_a_kernel_that_another_process_compiles_is_left_for_later() -> None:
    def second(array: npt.NDArray[np.float32]) -> np.float32:
        value: np.float32 = array[1]
        return value

    second_of = Kernel(second, "float32(float32[::1])")
    with open(__file__) as source:
        fcntl.flock(source, fcntl.LOCK_EX)  # as another process would: a lock belongs to an open file
        assert not second_of.compile(wait=False)
        assert not second_of.is_compiled
    assert second_of.compile(wait=False)
    assert second_of(np.arange(4, dtype=np.float32)) == 1


class TestCache:
    def test_processes_that_start_together_compile_once(self, tmp_path: Path) -> None:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        processes = [
            subprocess.Popen([sys.executable, "-c", _COMPILE_ONE], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [process.communicate()[0].strip() for process in processes]
        assert sorted(said) == ["False", "True", "True"]

    def test_a_read_only_installation_uses_the_user_s_folder(self, tmp_path: Path) -> None:
        root = self.installation(tmp_path)
        user = {"XDG_CACHE_HOME": str(tmp_path / "user")}
        assert [self.was_cached(root, user) for _ in range(2)] == [False, True]
        assert list((tmp_path / "user").rglob("*.nbi"))

    def test_without_any_folder_it_works_uncached(self, tmp_path: Path) -> None:
        root = self.installation(tmp_path)
        (tmp_path / "user").write_text("not a folder")
        nowhere = {"XDG_CACHE_HOME": str(tmp_path / "user")}
        assert [self.was_cached(root, nowhere) for _ in range(2)] == [False, False]

    def installation(self, folder: Path) -> Path:
        """A copy of the package that cannot be written to. Permissions would not hold root: a file takes the cache's place."""
        shutil.copytree(ROOT / "gpu", folder / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "gpu/kernels/__pycache__").write_text("not a folder")
        return folder

    def was_cached(self, root: Path, environment: dict[str, str]) -> bool:
        cleared = {"NUMBA_CACHE_DIR": "", "PYTHONPATH": ""}
        return {"True": True, "False": False}[run_python(_COMPILE_ONE, environment=cleared | environment, root=root).strip()]
