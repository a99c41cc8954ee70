"""What all tests share: the event loop that the product runs on, and that no example of a property is timed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

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
