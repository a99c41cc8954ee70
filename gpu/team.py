"""Several threads for one call: a caller and its helpers share out the parts of a kernel that holds no interpreter lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpu.stream import HostStream


class Team:
    """`num_threads` threads, the caller's included, owned by one caller at a time. Made once: threads are slow to start."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"a team has at least its caller, not {num_threads} threads")
        self.num_threads = num_threads
        self._helpers = [HostStream(f"team-{i}") for i in range(1, num_threads)]

    def run(self, fn: Callable[..., Any], parts: Iterable[tuple[Any, ...]]) -> list[Any]:
        """fn(*part) for every part, in no particular order; what they returned, likewise. Raises what a part raised."""
        waiting = list(parts)

        def work() -> list[Any]:
            done = []
            while waiting:
                try:
                    part = waiting.pop()
                except IndexError:  # another thread was faster
                    break
                done.append(fn(*part))
            return done

        helping = [helper.submit(work) for helper in self._helpers[: len(waiting) - 1]]
        try:
            results = work()
        finally:
            waiting.clear()
            others = [future.exception() or future.result() for future in helping]  # none may outlive the call
        for other in others:
            if isinstance(other, BaseException):
                raise other
            results += other
        return results

    def close(self) -> None:
        for helper in self._helpers:
            helper.close()
