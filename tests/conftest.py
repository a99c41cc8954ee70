"""What all tests share: the product's event loop, properties whose examples are not timed, and a GPU only where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

# A machine that is busy makes any single example slow; `timeout` in setup.cfg finds what hangs.
settings.register_profile("epd", deadline=None)
settings.load_profile("epd")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; deselected on a machine without one")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a device node the tests that need a GPU are not there. With one that does not work, they fail."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        return
    if there := [item for item in items if item.get_closest_marker("gpu")]:
        config.hook.pytest_deselected(items=there)
        items[:] = [item for item in items if item not in set(there)]
