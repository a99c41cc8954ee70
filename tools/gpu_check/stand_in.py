"""For pytest where its plugins are not installed: knows their options and hooks, runs `async def` tests, bounds nothing.

A plugin of pytest, given by `-p`. It does for the GPU's tests, none of which has asynchronous fixtures.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest
import uvloop

Factories = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]


class _Hooks:
    @pytest.hookspec(firstresult=True)
    def pytest_asyncio_loop_factories(self, config: pytest.Config, item: pytest.Item) -> Factories | None:
        """As pytest-asyncio asks."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    if not find_spec("pytest_asyncio"):
        pluginmanager.add_hookspecs(_Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    if not find_spec("pytest_asyncio"):
        for name in ("asyncio_mode", "asyncio_default_fixture_loop_scope"):
            parser.addini(name, "of pytest-asyncio, which is not installed")
    if not find_spec("pytest_timeout"):
        for name in ("timeout", "timeout_method"):
            parser.addini(name, "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for plugin, marker in (("pytest_asyncio", "asyncio"), ("pytest_timeout", "timeout")):
        if not find_spec(plugin):
            config.addinivalue_line("markers", f"{marker}: of a plugin that is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if find_spec("pytest_asyncio") or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(pyfuncitem.obj(**arguments))
    return True
