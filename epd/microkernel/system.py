"""The actors of one process, and the one way to reach an actor wherever it lives.

Owns: which actors run here, where this worker listens, and the route of every tell, ask and stream: by reference within the
process, over a link otherwise. Does not know what messages mean, nor how links are dialled (`Peers` does).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Final

from epd.errors import DeadlineExceeded, InternalError, Overloaded, Unavailable, from_wire
from epd.log import Log
from epd.microkernel import sockets
from epd.microkernel.actor import Actor, Answer, Buffer, Mail, Reply
from epd.microkernel.cell import Cell
from epd.microkernel.deadlines import Deadlines
from epd.microkernel.itemstream import ItemStream, Source
from epd.microkernel.link import HEARTBEAT_S, Link
from epd.microkernel.local import TOLD, LocalAsk, LocalStream, by_reference, copy_into, mismatch
from epd.microkernel.peers import Peers
from protocol.handshake import Identity
from protocol.messages import Address, Endpoint, Failed, Message, WorkerId

_DEFAULT_MAILBOX: Final = 1024
_STOP_DRAIN_S: Final = 1.0
_log = Log("system")


class System:
    """One per process. `advertise_host` is what other workers are told to dial, where `host` is a wildcard."""

    def __init__(
        self,
        *,
        worker: WorkerId,
        token: str,
        roles: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str = "",
        unix: bool = True,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        if not worker or not token:
            raise InternalError("a system needs a worker id and a token")
        self.worker: Final = worker
        self._token = token.encode()
        self._roles = tuple(roles)
        self._host = host
        self._port = port
        self._advertise_host = advertise_host or host
        self._unix = unix
        self._heartbeat_s = heartbeat_s
        self._cells: dict[str, Cell] = {}
        self._watchers: dict[WorkerId, list[Callable[[WorkerId], None]]] = {}
        self._servers: list[asyncio.AbstractServer] = []
        self._endpoint: Endpoint | None = None
        self._peers: Peers | None = None
        self._open_links: dict[WorkerId, Link] = {}  # the peers' own
        self.num_dropped_tells = 0  # to actors that are not here

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises OSError when the address is taken."""
        if self._peers is not None:
            raise InternalError("a system is started once")
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop)
        tcp = sockets.listen_tcp(self._host, self._port)
        unix, unix_path = sockets.listen_unix() if self._unix else (None, "")
        self._endpoint = Endpoint(
            worker=self.worker,
            host=self._advertise_host,
            port=tcp.getsockname()[1],
            unix_path=unix_path,
            host_id=sockets.host_id(),
        )
        identity = Identity(self.worker, secrets.randbits(63), self._roles, self._endpoint)
        peers = self._peers = Peers(self, identity=identity, token=self._token, heartbeat_s=self._heartbeat_s)
        self._open_links = peers.open_links
        self._servers.append(await self._loop.create_server(lambda: peers.incoming("tcp"), sock=tcp))
        if unix is not None:
            self._servers.append(await self._loop.create_unix_server(lambda: peers.incoming("unix"), sock=unix))

    async def stop(self) -> None:
        """Stop all actors, last registered first, then the links. Whoever still asks is answered. Safe to call twice."""
        for cell in reversed(list(self._cells.values())):
            await self._remove(cell)
        for server in self._servers:
            server.close()
        if self._peers is not None:
            await self._peers.close(drain_s=_STOP_DRAIN_S)
        self._servers.clear()

    @property
    def endpoint(self) -> Endpoint:
        """Where this worker listens; known once started."""
        if self._endpoint is None:
            raise InternalError("the system has not been started")
        return self._endpoint

    # --- actors -----------------------------------------------------------------------------------------------------

    async def register(
        self,
        name: str,
        actor: Actor,
        *,
        mailbox: int = _DEFAULT_MAILBOX,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> Address:
        """Start an actor. `on_crash` is called after a crash has stopped and unregistered it. Raises what started() raises."""
        if name in self._cells:
            raise InternalError(f"there is an actor {name!r} already")
        address = Address(self.worker, name)

        def crashed(error: Exception) -> None:
            if self._cells.get(name) is cell:
                del self._cells[name]
            if on_crash is not None:
                on_crash(error)

        cell = Cell(self, address, actor, capacity=mailbox, on_crash=crashed)
        self._cells[name] = cell
        try:
            await cell.start()
        except BaseException:
            if self._cells.get(name) is cell:
                del self._cells[name]
            raise
        return address

    async def unregister(self, name: str) -> None:
        """Stop an actor; what it still owes is answered Unavailable. An unknown name is no error."""
        cell = self._cells.get(name)
        if cell is not None:
            await self._remove(cell)

    async def _remove(self, cell: Cell) -> None:
        await cell.stop()
        if self._cells.get(cell.address.actor) is cell:
            del self._cells[cell.address.actor]

    # --- other workers ----------------------------------------------------------------------------------------------

    def introduce(self, endpoint: Endpoint) -> None:
        """`endpoint.worker` lives there. It is dialled when it is first needed."""
        self._live_peers().introduce(endpoint)

    async def discover(self, host: str, port: int, *, timeout_s: float) -> Identity:
        """Dial an address, prove each other, and learn who lives there. Raises Refused, PeerLost, DeadlineExceeded."""
        return await self._live_peers().discover(host, port, timeout_s=timeout_s)

    def watch(self, worker: WorkerId, callback: Callable[[WorkerId], None]) -> Callable[[], None]:
        """Call `callback` whenever the link to `worker` is lost. Returns what ends the watch."""
        watchers = self._watchers.setdefault(worker, [])
        watchers.append(callback)

        def unwatch() -> None:
            if callback in watchers:
                watchers.remove(callback)
            if not watchers and self._watchers.get(worker) is watchers:
                del self._watchers[worker]

        return unwatch

    # --- tell, ask, stream ------------------------------------------------------------------------------------------

    async def tell(self, to: Address, message: Message, buffers: Sequence[Buffer] = (), *, timeout_s: float = 5.0) -> None:
        """Hand a message over without an answer; returns once there was room for it, not when it has been read.

        Raises:
            Overloaded: no room within `timeout_s`.
            PeerLost: the worker cannot be reached. Unavailable: it has no such actor (known for local ones only).
        """
        if to.worker == self.worker:
            cell = await self._cell_with_room(to, timeout_s)
            cell.put(Mail(message, by_reference(buffers), TOLD, self.worker))
            return
        deadline = self._loop.time() + timeout_s
        link = await self._ready_link(to.worker, timeout_s)
        await link.tell(to.actor, message, buffers, timeout_s=deadline - self._loop.time())

    async def ask(
        self,
        to: Address,
        message: Message,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Answer:
        """Send a message and wait for its one answer. Cancelling cancels it at the other end too.

        `into`: writable contiguous views that the answer's buffers are received into; they are not touched any more once this
        has returned or raised.

        Raises:
            DeadlineExceeded: no answer within `timeout_s`.
            PeerLost: the worker cannot be reached, or was lost before it answered.
            CorruptTransfer: the answer's buffers do not have the sizes of `into`.
            EpdError: whatever the other end failed with.
        """
        if to.worker == self.worker:
            answer = await self._ask_local(to, message, buffers, timeout_s)
            if into is not None and type(answer.message) is not Failed:
                answer = copy_into(answer, into)
        else:
            views = None if into is None else [view.cast("B") for view in into]
            link = self._open_links.get(to.worker)
            if link is None or (link.is_paused and link.is_choked):
                deadline = self._loop.time() + timeout_s
                link = await self._ready_link(to.worker, timeout_s)
                timeout_s = deadline - self._loop.time()
            ask_id, future = link.ask(to.actor, message, buffers, views)
            due = self._deadlines.add(future, timeout_s)
            try:
                answer = await future
            except BaseException as error:
                link.cancel_ask(ask_id)
                if isinstance(error, TimeoutError):
                    raise _overdue(to, timeout_s) from None
                raise
            finally:
                due.discard(future)
            if views is not None and len(answer.buffers) != len(views) and type(answer.message) is not Failed:
                raise mismatch([len(buffer) for buffer in answer.buffers], views)
        if type(answer.message) is Failed:
            raise from_wire(answer.message)
        return answer

    def stream(
        self, to: Address, message: Message, buffers: Sequence[Buffer] = (), *, timeout_s: float, window: int = 16
    ) -> ItemStream:
        """Items until the other end ends it. At most `window` are on their way or untaken. `timeout_s` bounds all of it.

        Raises, while it is iterated, what ask() raises. `aclose()` it unless it was iterated to its end.
        """

        async def open_source(items: ItemStream) -> Source:
            if to.worker == self.worker:
                cell = await self._cell_with_room(to, items.time_left_s)
                source = LocalStream(items, window)
                cell.put(Mail(message, by_reference(buffers), source.reply, self.worker))
                return source
            link = await self._ready_link(to.worker, items.time_left_s)
            return link.open_stream(to.actor, message, buffers, items, window=window)

        return ItemStream(open_source, timeout_s=timeout_s)

    # --- integrity --------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """At idle nothing is unanswered, in transit or waiting.

        Raises:
            InternalError: something is; says what.
        """
        unanswered = {name: len(cell.unanswered) for name, cell in self._cells.items() if cell.unanswered}
        mails = {name: cell.num_mails for name, cell in self._cells.items() if cell.num_mails}
        unfinished = 0 if self._peers is None else self._peers.num_unfinished
        if unanswered or mails or unfinished:
            raise InternalError(f"not idle: unanswered {unanswered}, mails {mails}, unfinished on links {unfinished}")

    # --- for links --------------------------------------------------------------------------------------------------

    def deliver(self, mail: Mail, actor: str) -> None:
        """A mail from another worker. Tells have room by credit; an ask that finds a full mailbox is refused."""
        cell = self._cells.get(actor)
        kind = mail.reply.kind
        if cell is None or not cell.is_open:
            if kind == "tell":
                self.num_dropped_tells += 1
                mail.reply.taken()
                _log.warning("a tell to nobody", actor=actor, sender=mail.sender, message=type(mail.message).__name__)
            else:
                mail.reply.fail(Unavailable(f"worker {self.worker!r} has no actor {actor!r}"))
        elif kind != "tell" and not cell.has_room:
            mail.reply.fail(Overloaded(f"the mailbox of {actor!r} of worker {self.worker!r} is full"))
        else:
            cell.put_now(mail)

    def peer_lost(self, worker: WorkerId) -> None:
        for callback in list(self._watchers.get(worker, ())):
            try:
                callback(worker)
            except Exception as error:
                _log.error("a watcher failed", error=error, worker=worker)

    # --- helpers ----------------------------------------------------------------------------------------------------

    async def _ask_local(self, to: Address, message: Message, buffers: Sequence[Buffer], timeout_s: float) -> Answer:
        began = self._loop.time()
        cell = self._cells.get(to.actor)
        if cell is None or not cell.is_open or not cell.has_room:
            cell = await self._cell_with_room(to, timeout_s)
            timeout_s -= self._loop.time() - began
        future: asyncio.Future[Answer] = self._loop.create_future()
        reply = Reply("ask", LocalAsk(future))
        cell.put(Mail(message, by_reference(buffers), reply, self.worker))
        due = self._deadlines.add(future, timeout_s)
        try:
            return await future
        except BaseException as error:
            reply.cancel()
            if isinstance(error, TimeoutError):
                raise _overdue(to, timeout_s) from None
            raise
        finally:
            due.discard(future)

    async def _ready_link(self, worker: WorkerId, timeout_s: float) -> Link:
        """An open link whose other end reads."""
        deadline = self._loop.time() + timeout_s
        link = self._open_links.get(worker) or await self._live_peers().link(worker, timeout_s=timeout_s)
        if link.is_choked:
            await link.drained(deadline - self._loop.time())
        return link

    async def _cell_with_room(self, to: Address, timeout_s: float) -> Cell:
        deadline = self._loop.time() + timeout_s
        while True:
            cell = self._cells.get(to.actor)
            if cell is None or not cell.is_open:
                raise Unavailable(f"worker {self.worker!r} has no actor {to.actor!r}")
            if cell.has_room:
                return cell
            await cell.wait_for_room(deadline - self._loop.time())

    def _live_peers(self) -> Peers:
        if self._peers is None:
            raise InternalError("the system has not been started")
        return self._peers


def _overdue(to: Address, timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"actor {to.actor!r} of worker {to.worker!r} did not answer within {timeout_s:g} s")
