"""Tell, ask and stream, the same for a local and a remote actor; and that each is answered exactly once whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from epd.errors import (
    BadRequest,
    BodyTooLarge,
    Cancelled,
    CorruptTransfer,
    DeadlineExceeded,
    EpdError,
    InternalError,
    Overloaded,
    PeerLost,
    Unavailable,
)
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from protocol.messages import Address, Drain, Message, ReleaseLease, WorkerId
from tests.support.systems import WAIT_S, Echo, Gate, Recorder, at, idle, media, running, until

MIB = 1 << 20
PLACES = ["local", "unix", "tcp"]


@asynccontextmanager
async def asker_and_host(place: str) -> AsyncIterator[tuple[System, System]]:
    """Whoever asks, and the system where the actor lives: the same one, or one behind a Unix or TCP socket."""
    names = ("a",) if place == "local" else ("a", "b")
    async with running(*names, unix=place == "unix") as systems:
        yield systems[0], systems[-1]
        assert set(media(systems[0]).values()) <= {place}


async def fill(asker: System, to: Address) -> None:
    """Tell until there is no room."""
    try:
        while True:
            await asker.tell(to, Drain(), timeout_s=0.05)
    except Overloaded:
        pass


class Failing(Actor):
    """Fails as the message says: even lease ids on purpose, odd ones by crashing."""

    async def receive(self, mail: Mail) -> None:
        assert isinstance(mail.message, ReleaseLease)
        if mail.message.lease_id % 2 == 0:
            raise BadRequest("not like this")
        raise ZeroDivisionError("a bug")


class Counting(Actor):
    """Streams `lease_id` items; keeps how many it sent and whether it was cancelled."""

    def __init__(self, size: int = 10) -> None:
        self.size = size
        self.num_sent = 0
        self.was_cancelled = asyncio.Event()

    async def receive(self, mail: Mail) -> None:
        assert isinstance(mail.message, ReleaseLease)
        self.spawn(self._produce(mail, mail.message.lease_id), name="produce")

    async def _produce(self, mail: Mail, count: int) -> None:
        mail.reply.on_cancel(self.was_cancelled.set)
        try:
            for index in range(count):
                await mail.reply.item(ReleaseLease(index), [bytes([index % 256]) * self.size])
                self.num_sent += 1
        except Cancelled:
            return
        mail.reply.end()


@pytest.mark.parametrize("place", PLACES)
async def test_an_ask_brings_message_and_buffers(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("echo", Echo())
        answer = await asker.ask(to, ReleaseLease(7), [b"abc", b"", memoryview(b"defg")], timeout_s=WAIT_S)
        assert answer.message == ReleaseLease(7)
        assert [bytes(buffer) for buffer in answer.buffers] == [b"abc", b"", b"defg"]


@pytest.mark.parametrize("place", PLACES)
async def test_answers_go_to_whoever_asked(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("echo", Echo())
        answers = await asyncio.gather(*(asker.ask(to, ReleaseLease(i), timeout_s=WAIT_S) for i in range(200)))
        assert [answer.message for answer in answers] == [ReleaseLease(i) for i in range(200)]


@pytest.mark.parametrize("place", PLACES)
async def test_large_buffers_arrive_in_the_given_memory(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("echo", Echo())
        sent = [bytes([i]) * (i * MIB + i) for i in (1, 3, 2)]
        room = [bytearray(len(buffer)) for buffer in sent]
        answer = await asker.ask(to, ReleaseLease(1), sent, timeout_s=WAIT_S, into=[memoryview(view) for view in room])
        assert room == sent
        assert [bytes(buffer) for buffer in answer.buffers] == sent


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sizes", [(3,), (4, 4), (), (MIB,)])
async def test_memory_of_another_size_is_refused(place: str, sizes: tuple[int, ...]) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("echo", Echo())
        room = [bytearray(size) for size in sizes]
        with pytest.raises(CorruptTransfer):
            await asker.ask(to, ReleaseLease(1), [b"xxxx"], timeout_s=WAIT_S, into=[memoryview(view) for view in room])
        assert not any(any(view) for view in room)
        large = bytes(MIB + 1)
        with pytest.raises(CorruptTransfer):
            await asker.ask(to, ReleaseLease(1), [large], timeout_s=WAIT_S, into=[memoryview(view) for view in room])


@pytest.mark.parametrize("place", PLACES)
async def test_an_error_on_purpose_is_raised_at_the_asker_and_the_actor_lives_on(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("failing", Failing())
        for _ in range(2):
            with pytest.raises(BadRequest, match="not like this"):
                await asker.ask(to, ReleaseLease(2), timeout_s=WAIT_S)


@pytest.mark.parametrize("place", PLACES)
async def test_a_crash_answers_the_asker_and_stops_the_actor(place: str) -> None:
    crashes: list[Exception] = []
    async with asker_and_host(place) as (asker, host):
        to = await host.register("failing", Failing(), on_crash=crashes.append)
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            await asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S)
        await until(lambda: bool(crashes))
        assert isinstance(crashes[0], ZeroDivisionError)
        with pytest.raises(Unavailable):
            await asker.ask(to, ReleaseLease(2), timeout_s=WAIT_S)


@pytest.mark.parametrize("place", PLACES)
async def test_a_crashing_task_fails_what_the_actor_owes(place: str) -> None:
    class Crashing(Recorder):
        async def receive(self, mail: Mail) -> None:
            await super().receive(mail)
            if len(self.mails) == 2:
                self.spawn(self._crash(), name="crash")

        async def _crash(self) -> None:
            raise ZeroDivisionError

    async with asker_and_host(place) as (asker, host):
        actor = Crashing()
        to = await host.register("crashing", actor)
        asks = [asker.ask(to, ReleaseLease(i), timeout_s=WAIT_S) for i in range(2)]
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
        assert actor.is_stopped


@pytest.mark.parametrize("place", PLACES)
async def test_stopping_an_actor_answers_everything_it_owes(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        gate = Gate()
        to = await host.register("gate", gate)
        asks = asyncio.gather(*(asker.ask(to, ReleaseLease(i), timeout_s=WAIT_S) for i in range(5)), return_exceptions=True)
        items = asker.stream(to, ReleaseLease(9), timeout_s=WAIT_S)
        stream = asyncio.ensure_future(anext(items))
        await until(lambda: len(host._cells["gate"].unanswered) == 6)
        await host.unregister("gate")
        assert {type(outcome) for outcome in await asks} == {Unavailable}
        with pytest.raises(Unavailable):
            await stream


@pytest.mark.parametrize("place", PLACES)
async def test_nobody_there_is_said(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        with pytest.raises(Unavailable, match="no actor 'nobody'"):
            await asker.ask(at(host, "nobody"), ReleaseLease(1), timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await anext(asker.stream(at(host, "nobody"), ReleaseLease(1), timeout_s=WAIT_S))


@pytest.mark.parametrize("place", PLACES)
async def test_a_time_out_is_raised_and_cancels_at_the_other_end(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        with pytest.raises(DeadlineExceeded):
            await asker.ask(to, ReleaseLease(1), timeout_s=0.05)
        mail = await recorder.mail()
        await until(lambda: mail.reply.cancelled)
        mail.reply.send(ReleaseLease(1))  # too late is no error


@pytest.mark.parametrize("place", PLACES)
async def test_cancelling_an_ask_reaches_the_other_end(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        task = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S))
        mail = await recorder.mail()
        told: list[str] = []
        mail.reply.on_cancel(lambda: told.append("cancelled"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bool(told))
        mail.reply.on_cancel(lambda: told.append("late"))
        assert told == ["cancelled", "late"]


@pytest.mark.parametrize("place", PLACES)
async def test_an_ask_can_be_answered_once_only(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S))
        mail = await recorder.mail()
        mail.reply.send(ReleaseLease(2))
        with pytest.raises(InternalError, match="twice"):
            mail.reply.send(ReleaseLease(3))
        with pytest.raises(InternalError, match="twice"):
            mail.reply.fail(Overloaded("no"))
        with pytest.raises(InternalError, match="kind"):
            mail.reply.end()
        assert (await ask).message == ReleaseLease(2)


@pytest.mark.parametrize("place", PLACES)
async def test_tells_arrive_in_order_and_wait_for_room(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        gate = Gate()
        to = await host.register("gate", gate, mailbox=8)
        count = 1000

        async def tell_all() -> None:
            for i in range(count):
                await asker.tell(to, ReleaseLease(i), timeout_s=WAIT_S)

        task = asyncio.ensure_future(tell_all())
        await fill(asker, to)
        assert not task.done()
        gate.opened.set()
        await task
        await until(lambda: ReleaseLease(count - 1) in gate.messages)
        leases = [message for message in gate.messages if isinstance(message, ReleaseLease)]
        assert leases == [ReleaseLease(i) for i in range(count)]


async def test_a_slow_actor_does_not_hold_up_another_on_the_same_link() -> None:
    async with asker_and_host("tcp") as (asker, host):
        gate = Gate()
        slow = await host.register("gate", gate)
        quick = await host.register("echo", Echo())
        await fill(asker, slow)
        assert (await asker.ask(quick, ReleaseLease(2), timeout_s=WAIT_S)).message == ReleaseLease(2)
        gate.opened.set()


async def test_an_ask_of_a_full_mailbox_is_refused() -> None:
    async with asker_and_host("tcp") as (asker, host):
        gate = Gate()
        to = await host.register("gate", gate, mailbox=2)
        asks = [asyncio.ensure_future(asker.ask(to, ReleaseLease(i), timeout_s=WAIT_S)) for i in range(10)]
        await until(lambda: sum(ask.done() for ask in asks) >= 7)
        gate.opened.set()
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes if isinstance(outcome, EpdError)} == {Overloaded}
        assert any(not isinstance(outcome, BaseException) for outcome in outcomes)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_stream_brings_all_items_in_order(place: str, size: int) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("counting", Counting(size))
        items = [item async for item in asker.stream(to, ReleaseLease(40), timeout_s=WAIT_S, window=4)]
        assert [item.message for item in items] == [ReleaseLease(i) for i in range(40)]
        assert [bytes(item.buffers[0]) for item in items] == [bytes([i]) * size for i in range(40)]


@pytest.mark.parametrize("place", PLACES)
async def test_a_slow_consumer_holds_the_producer_back(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        actor = Counting()
        to = await host.register("counting", actor)
        items = asker.stream(to, ReleaseLease(100), timeout_s=WAIT_S, window=4)
        await anext(items)
        await until(lambda: actor.num_sent >= 4)
        for _ in range(50):
            await asyncio.sleep(0)
        await asker.ask(await host.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)  # the link is not blocked
        assert actor.num_sent <= 5
        assert len([item async for item in items]) == 99


@pytest.mark.parametrize("place", PLACES)
async def test_a_consumer_that_leaves_cancels_the_producer(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        actor = Counting()
        to = await host.register("counting", actor)
        items = asker.stream(to, ReleaseLease(1000), timeout_s=WAIT_S, window=4)
        await anext(items)
        await items.aclose()
        async with asyncio.timeout(WAIT_S):
            await actor.was_cancelled.wait()
        with pytest.raises(StopAsyncIteration):
            await anext(items)


@pytest.mark.parametrize("place", PLACES)
async def test_a_stream_ends_badly_by_error_or_deadline(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        to = await host.register("failing", Failing())
        with pytest.raises(BadRequest):
            await anext(asker.stream(to, ReleaseLease(2), timeout_s=WAIT_S))
        recorder = Recorder()
        silent = await host.register("recorder", recorder)
        with pytest.raises(DeadlineExceeded):
            await anext(asker.stream(silent, ReleaseLease(2), timeout_s=0.05))
        mail = await recorder.mail()
        await until(lambda: mail.reply.cancelled)


@pytest.mark.parametrize("place", PLACES)
async def test_items_before_a_failure_are_given_out_first(place: str) -> None:
    class Half(Actor):
        async def receive(self, mail: Mail) -> None:
            await mail.reply.item(ReleaseLease(1))
            raise Unavailable("half way")

    async with asker_and_host(place) as (asker, host):
        to = await host.register("half", Half())
        items = asker.stream(to, ReleaseLease(0), timeout_s=WAIT_S)
        await idle(host)
        assert (await anext(items)).message == ReleaseLease(1)
        with pytest.raises(Unavailable, match="half way"):
            await anext(items)


@pytest.mark.parametrize("place", ["unix", "tcp"])
async def test_an_ask_that_leaves_midway_does_not_write_to_its_memory_any_more(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        echo = await host.register("echo", Echo())
        room = bytearray(64 * MIB)
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S, into=[memoryview(room)]))
        mail = await recorder.mail()
        mail.reply.send(ReleaseLease(1), [b"\xff" * len(room)])
        await until(lambda: room[0] == 0xFF)
        ask.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ask
        assert room[-1] == 0, "the whole buffer had arrived: this test shows nothing"
        frozen = bytes(room)
        await asker.ask(echo, ReleaseLease(2), timeout_s=WAIT_S)
        await idle(asker, host)
        assert room == frozen


@pytest.mark.parametrize("place", ["unix", "tcp"])
async def test_small_messages_pass_a_large_one(place: str) -> None:
    async with asker_and_host(place) as (asker, host):
        recorder, echo = Recorder(), Echo()
        to = await host.register("recorder", recorder)
        quick = await host.register("echo", echo)
        room = bytearray(96 * MIB)
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S, into=[memoryview(room)]))
        mail = await recorder.mail()
        mail.reply.send(ReleaseLease(1), [b"\xff" * len(room)])
        num_passed = 0
        while room[-1] == 0:
            await asker.ask(quick, ReleaseLease(2), timeout_s=WAIT_S)
            num_passed += 1
        assert num_passed > 10
        await ask


async def test_losing_the_link_answers_both_ends() -> None:
    async with running("a", "b") as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        lost: list[WorkerId] = []
        asker.watch(host.worker, lost.append)
        unwatch = asker.watch(host.worker, lambda worker: lost.append(WorkerId("unwatched")))
        unwatch()
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S))
        stream = asyncio.ensure_future(anext(asker.stream(to, ReleaseLease(2), timeout_s=WAIT_S)))
        mails = [await recorder.mail(0), await recorder.mail(1)]
        link = host._open_links.get(asker.worker)
        assert link is not None
        link.abort()
        for waiting in (ask, stream):
            with pytest.raises(PeerLost):
                await waiting
        assert all(mail.reply.cancelled for mail in mails)
        assert lost == [host.worker]
        # The next use dials again.
        assert isinstance(await asker.ask(await host.register("e", Echo()), ReleaseLease(3), timeout_s=WAIT_S), tuple)


async def test_a_message_that_is_too_large_fails_its_sender_only() -> None:
    async with running("a", "b") as (asker, host):
        to = await host.register("echo", Echo())
        buffers = [b"x"] * 10_000
        with pytest.raises(BodyTooLarge):
            await asker.ask(to, ReleaseLease(1), buffers, timeout_s=WAIT_S)

        class TooMuch(Actor):
            async def receive(self, mail: Mail) -> None:
                mail.reply.send(mail.message, buffers)

        with pytest.raises(BodyTooLarge):
            await asker.ask(await host.register("much", TooMuch()), ReleaseLease(1), timeout_s=WAIT_S)
        assert (await asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S)).message == ReleaseLease(1)


async def test_a_tell_to_nobody_is_counted() -> None:
    async with running("a", "b") as (asker, host):
        for _ in range(600):  # more than the window: credit comes back for these too
            await asker.tell(at(host, "nobody"), ReleaseLease(1), timeout_s=WAIT_S)
        await until(lambda: host.num_dropped_tells == 600)
        with pytest.raises(Unavailable):
            await asker.tell(at(asker, "nobody"), ReleaseLease(1))


async def test_local_mail_is_handed_off_by_reference() -> None:
    async with running("a") as (system,):
        recorder = Recorder()
        to = await system.register("recorder", recorder)
        message: Message = ReleaseLease(1)
        buffer = bytearray(b"abc")
        await system.tell(to, message, [buffer])
        mail = await recorder.mail()
        assert mail.message is message
        buffer[0] = 0
        assert bytes(mail.buffers[0]) == b"\0bc"


async def test_check_integrity_tells_what_is_unfinished() -> None:
    async with running("a", "b") as (asker, host):
        recorder = Recorder()
        to = await host.register("recorder", recorder)
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(1), timeout_s=WAIT_S))
        mail = await recorder.mail()
        for system in (asker, host):
            with pytest.raises(InternalError, match="not idle"):
                system.check_integrity()
        mail.reply.send(ReleaseLease(1))
        await ask
        await idle(asker, host)


async def test_names_are_unique_and_a_failed_start_leaves_nothing() -> None:
    class Stillborn(Actor):
        async def started(self) -> None:
            self.spawn(asyncio.Event().wait(), name="forever")
            raise ZeroDivisionError

    async with running("a") as (system,):
        await system.register("echo", Echo())
        with pytest.raises(InternalError, match="already"):
            await system.register("echo", Echo())
        with pytest.raises(ZeroDivisionError):
            await system.register("stillborn", Stillborn())
        with pytest.raises(Unavailable):
            await system.ask(at(system, "stillborn"), ReleaseLease(1), timeout_s=WAIT_S)


async def test_an_unknown_worker_is_lost() -> None:
    async with running("a") as (system,):
        with pytest.raises(PeerLost, match="not known"):
            await system.ask(Address(WorkerId("zz"), "x"), ReleaseLease(1), timeout_s=WAIT_S)
