"""In the place of `gpu.cuda.cupy_driver`: every process sees a fake device of 32 GiB, of which it takes what it uses.

The device is one from before bfloat16, so that what it says can be compared with what the CPU says. SIGUSR1 has it fail.
"""

from __future__ import annotations

from tests.gpu.cuda.fake_driver import FakeDriver


class CupyDriver(FakeDriver):
    def __init__(self, index: int) -> None:
        super().__init__(total_bytes=32 << 30, capability=(7, 5))
        _made.append(self)


_made: list[CupyDriver] = []


def fail_all() -> None:
    """The devices of this process are lost."""
    for driver in _made:
        driver.fail()
