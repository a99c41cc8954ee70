"""Checkpoints are made once per run of the tests, when the first test asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.model.reference import CASES, Engine, Model


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The model of a case, by its name."""
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> Model:
        return Model(next(case for case in CASES if case.name == name), tmp_path_factory.mktemp(name))

    return make


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines and closes them after the test."""
    engines: list[Engine] = []

    def make(model: Model, *, block_size: int = 16, num_blocks: int = 256) -> Engine:
        engines.append(Engine(model, block_size=block_size, num_blocks=num_blocks))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
