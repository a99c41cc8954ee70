"""An engine that says what a test told it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from epd.errors import EpdError
from epd.request import Delta, GenerateRequest

MODEL = "test-model"


@dataclass(slots=True)
class Pause:
    """The engine goes on when the test says so."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


Step = Delta | EpdError | Exception | Pause
Script = Callable[[GenerateRequest], Sequence[Step]]


def hello(request: GenerateRequest) -> list[Step]:
    """Every choice says the same three words."""
    steps: list[Step] = []
    for index in range(request.n):
        steps += [
            Delta(index, "Hello", 1, num_cached_tokens=4),
            Delta(index, ", wörld", 2),
            Delta(index, "!", 1, finish_reason="stop"),
        ]
    return steps


class ScriptedEngine:
    """Implements epd.gateway.engine.Engine."""

    def __init__(self, script: Script = hello) -> None:
        self.script = script
        self.model_name = MODEL
        self.max_choices = 256
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.num_closed = 0
        self.num_deltas = 0
        self.changed = asyncio.Condition()
        self.is_ready = (True, "")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            for step in self.script(request):
                match step:
                    case Delta():
                        self.num_deltas += 1
                        yield step
                    case Pause():
                        step.reached.set()
                        await step.go_on.wait()
                    case error:
                        raise error
        finally:
            self.num_open -= 1
            self.num_closed += 1
            async with self.changed:
                self.changed.notify_all()

    async def all_closed(self, count: int = 1) -> None:
        """Wait until `count` generators have ended, however they did."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.num_closed >= count)

    @property
    def last(self) -> GenerateRequest:
        return self.requests[-1]

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def cluster(self) -> dict[str, object]:
        return {"workers": [{"worker": "w1", "roles": ["encode"]}]}

    def live(self, *, after_moment: int, after_revision: int) -> dict[str, object]:
        return {**self.cluster(), "after": [after_moment, after_revision]}

    def metrics(self) -> bytes:
        return b"# TYPE epd_test gauge\nepd_test 1.0\n"
