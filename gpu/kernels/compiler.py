"""How the CPU kernels are compiled: ahead of their first use, once per machine, for exactly the types they are written for.

A `Kernel` is a Python function with one explicit signature. Types that differ (another dtype, a strided view, read-only memory)
are a TypeError, never a second compilation in the middle of a request. Kernels release the interpreter's lock and have no
parallelism of their own: numba's default threading layer must not be entered from two threads at once, and a stage's stream is a
thread. Those who want more than one core split a call's work over a `gpu.team.Team`.

The machine code is cached by numba: in NUMBA_CACHE_DIR if set, else beside the source, else (an installation that is read-only)
in the user's cache folder, keyed by source and processor. Processes that start together take turns under a lock, so that the
first compiles and the others load. No file is made for the lock: it is taken on the kernel's source file.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numba
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")

# What float32 sums may have done to them so that they vectorise. Infinities keep their meaning.
_FLOAT_RULES = {"reassoc", "contract", "arcp", "nsz"}

_kernels: list[Kernel[..., Any]] = []
_compiling = threading.Lock()


class Kernel(Generic[P, R]):
    """A compiled function. Called before `compile`, it compiles itself first."""

    def __init__(self, function: Callable[P, R], signature: str) -> None:
        self.name = function.__name__.strip("_")
        self._function = function
        self._signature = signature
        self._dispatcher: Callable[P, R] | None = None
        self.was_cached = False  # known once it is compiled

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._dispatcher is None:
            self.compile()
        return cast("Callable[P, R]", self._dispatcher)(*args, **kwargs)

    @property
    def is_compiled(self) -> bool:
        return self._dispatcher is not None

    def compile(self, *, wait: bool = True) -> bool:
        """Compile, or load what an earlier run compiled. Safe to call from several threads and processes.

        Without `wait`, leave it and answer False while another process is at the same source file.
        """
        with _compiling:
            if self._dispatcher is not None:
                return True
            with _alone(self._function.__code__.co_filename, wait=wait) as is_alone:
                if is_alone:
                    self._dispatcher, self.was_cached = _compiled(self._function, self._signature)
                return is_alone


def kernel(signature: str) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Declare a kernel with its types as numba writes them, for example "int64(float32[:,::1], int64)"."""

    def declare(function: Callable[P, R]) -> Kernel[P, R]:
        made = Kernel(function, signature)
        _kernels.append(made)
        return made

    return declare


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Declare a helper that kernels of the same file call; the cache notices changes to a kernel's own file only."""
    return cast("Callable[P, R]", numba.njit(fastmath=_FLOAT_RULES, inline="always")(function))


def emitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare an operation that is written in LLVM's own terms: `function` answers its signature and a builder of its code."""
    return cast("Callable[..., Any]", intrinsic(function))


def warm_up(progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile or load every kernel that has been imported. `progress(name, done, total)` is called before each and at the end.

    Processes that do this at the same time share the work: what another is compiling is left for last.
    """
    total, left = len(_kernels), list(_kernels)
    for wait in (False, True):
        for each in list(left):
            if progress is not None:
                progress(each.name, total - len(left), total)
            if each.compile(wait=wait):
                left.remove(each)
    if progress is not None:
        progress("", total, total)


def declared() -> Sequence[Kernel[..., Any]]:
    return tuple(_kernels)


def _compiled(function: Callable[P, R], signature: str) -> tuple[Callable[P, R], bool]:
    """The machine code and whether it was loaded."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FLOAT_RULES, "boundscheck": False}
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that numba may write to: compile anew in every process
        dispatcher = numba.njit(**options)(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return cast("Callable[P, R]", dispatcher), bool(dispatcher.stats.cache_hits)


@contextmanager
def _alone(source_file: str, *, wait: bool) -> Iterator[bool]:
    """Whether no other process compiles kernels of this file meanwhile."""
    descriptor = os.open(source_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: the cache stays whole, work may be done twice
            pass
        yield True
    finally:
        os.close(descriptor)
