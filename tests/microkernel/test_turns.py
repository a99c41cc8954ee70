"""Tells wait in order; room that is offered is used or passed on."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from epd.microkernel.turns import Turns


class Room(defaultdict[str, int]):
    """Of each actor; nothing until it is given."""

    def __init__(self) -> None:
        super().__init__(int)
        self.turns = Turns(self.__getitem__)
        self.order: list[str] = []

    def give(self, actor: str, count: int = 1) -> None:
        self[actor] += count
        self.turns.offer(actor)

    def waiter(self, name: str, actor: str = "a") -> asyncio.Task[None]:
        async def wait() -> None:
            await self.turns.take(actor)
            self[actor] -= 1
            self.order.append(name)
            self.turns.offer(actor)

        return asyncio.create_task(wait(), name=name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_whoever_waits_longest_goes_first_and_nobody_overtakes() -> None:
    room = Room()
    tasks = [room.waiter(name) for name in "xyz"]
    await settle()
    assert room.turns.num_waiting == 3
    assert not room.turns.is_free("a")
    room.give("a")
    assert not room.turns.is_free("a")  # it is spoken for
    await settle()
    assert room.order == ["x"]
    room.give("a", 2)
    await asyncio.gather(*tasks)
    assert room.order == ["x", "y", "z"]
    assert room.turns.num_waiting == 0


async def test_actors_do_not_wait_for_each_other() -> None:
    room = Room()
    stuck, other = room.waiter("x", "a"), room.waiter("y", "b")
    await settle()
    room.give("b")
    await other
    assert not stuck.done()
    room.give("b")
    assert room.turns.is_free("b")
    room.give("a")
    await stuck


@pytest.mark.parametrize("is_offered", [False, True])
async def test_whoever_leaves_holds_nobody_up(is_offered: bool) -> None:
    room = Room()
    first, second = room.waiter("x"), room.waiter("y")
    await settle()
    if is_offered:
        room.give("a")  # wakes the first, which leaves before it runs
    first.cancel()
    await settle()
    if not is_offered:
        room.give("a")
    await second
    assert first.cancelled()
    assert room.order == ["y"]


async def test_room_that_is_gone_when_its_turn_comes_is_waited_for_again() -> None:
    room = Room()
    task = room.waiter("x")
    await settle()
    room.give("a")
    room["a"] = 0  # somebody who did not have to wait was quicker
    await settle()
    assert not task.done()
    room.give("a")
    await task


async def test_in_the_end_nobody_waits() -> None:
    room = Room()
    tasks = [asyncio.create_task(room.turns.take("a")) for _ in range(2)]
    await settle()
    room.turns.end()
    await asyncio.gather(*tasks)
    assert room.turns.num_waiting == 0
