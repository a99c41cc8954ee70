"""The links of one worker: at most one open link to each other worker, dialled on first use.

Owns: known endpoints, open links, dials in progress and their back-off. Two workers may dial each other at once: while a worker
dials, it lets a dialer in only if that one's id is lower than its own, and then gives up its own dial; the refused dialer waits
for the other's link. So one of the two survives, and both ends agree which.

Does not know actors.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final, Protocol

from epd.errors import DeadlineExceeded, EpdError, PeerLost, Refused
from epd.log import Log
from epd.microkernel import sockets
from epd.microkernel.actor import Mail
from epd.microkernel.link import HEARTBEAT_S, Link
from epd.microkernel.tasks import TaskOwner
from protocol.handshake import Identity, Side
from protocol.messages import Endpoint, WorkerId

CONNECT_TIMEOUT_S: Final = 3.0
FIRST_BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 1.0
_DUPLICATE: Final = "duplicate"
_log = Log("peers")


class PeersHost(Protocol):
    """What the links hand on to the system."""

    def deliver(self, mail: Mail, actor: str) -> None: ...

    def peer_lost(self, worker: WorkerId) -> None:
        """The open link to `worker` is gone."""


@dataclass(slots=True)
class _Peer:
    """All that is known of another worker."""

    endpoint: Endpoint | None = None
    link: Link | None = None
    instance: int = 0  # of the open link's other end
    dial: asyncio.Task[None] | None = None
    dialling: Link | None = None  # the dial's link, until it opens
    backoff_s: float = 0.0
    waiters: dict[asyncio.Future[Link], None] = field(default_factory=dict)  # in the order in which they came

    def is_open(self) -> bool:
        return self.link is not None


class Peers:
    """Made by System, closed by it."""

    def __init__(self, host: PeersHost, *, identity: Identity, token: bytes, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._host = host
        self._identity = identity
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._peers: dict[WorkerId, _Peer] = {}
        self.open_links: Final[dict[WorkerId, Link]] = {}  # for reading
        self._links: set[Link] = set()  # all of them, in whatever state
        self._opening: dict[Link, asyncio.Future[Identity]] = {}  # dials, until they open or fail
        self._tasks = TaskOwner()
        self._is_closed = False

    # --- use --------------------------------------------------------------------------------------------------------

    async def link(self, worker: WorkerId, *, timeout_s: float) -> Link:
        """The open link; dialled if need be.

        Raises:
            PeerLost: the worker cannot be reached, or is not known.
            Refused: it, or this worker, refused the other.
            DeadlineExceeded: neither happened within `timeout_s`.
        """
        if self._is_closed:
            raise PeerLost("this worker is stopping")
        peer = self._peers.setdefault(worker, _Peer())
        if peer.link is not None:
            return peer.link
        if peer.endpoint is None:
            raise PeerLost(f"worker {worker!r} is not known here")
        waiter: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        peer.waiters[waiter] = None
        if peer.dial is None:
            peer.dial = self._tasks.spawn(self._dial(worker, peer), name=f"dial {worker}")
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            raise DeadlineExceeded(f"worker {worker!r} was not reached within {timeout_s:g} s") from None
        finally:
            peer.waiters.pop(waiter, None)

    async def discover(self, host: str, port: int, *, timeout_s: float) -> Identity:
        """Dial an address and learn which worker lives there; the link stays. Raises as link() does."""
        if self._is_closed:
            raise PeerLost("this worker is stopping")
        link = self._make_link(Side.DIALER, "tcp", expected=None)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._open(link, host, port)
        except TimeoutError:
            raise DeadlineExceeded(f"nobody answered at {host}:{port} within {timeout_s:g} s") from None

    def introduce(self, endpoint: Endpoint) -> None:
        if endpoint.worker != self._identity.worker:
            self._peers.setdefault(endpoint.worker, _Peer()).endpoint = endpoint

    def incoming(self, medium: str) -> Link:
        """The protocol of an accepted socket."""
        return self._make_link(Side.LISTENER, medium, expected=None)

    @property
    def num_unfinished(self) -> int:
        return sum(link.num_unfinished for link in self._links) + sum(len(peer.waiters) for peer in self._peers.values())

    async def close(self, *, drain_s: float) -> None:
        """Hand over what is queued, say goodbye to all, end all dials."""
        self._is_closed = True
        await self._tasks.close()
        for peer in self._peers.values():
            self._fail_waiters(peer, PeerLost("this worker is stopping"))
        if drains := [self._tasks.spawn(self._drain(link, drain_s), name="drain") for link in self._links if link.is_open]:
            await asyncio.wait(drains)
        for link in list(self._links):
            link.close("shutdown", f"worker {self._identity.worker!r} is stopping")
        await self._tasks.close()

    # --- what links report ------------------------------------------------------------------------------------------

    def deliver(self, mail: Mail, actor: str) -> None:
        self._host.deliver(mail, actor)

    def link_proved(self, link: Link, identity: Identity) -> tuple[str, str] | None:
        """Whether a dialer may come in. See the module's text; the other end decides by the same rule."""
        if self._is_closed:
            return "shutdown", f"worker {self._identity.worker!r} is stopping"
        peer = self._peers.setdefault(identity.worker, _Peer())
        current = peer.link
        if current is not None and peer.instance == identity.instance and current.side is Side.DIALER:
            return _DUPLICATE, "there is a link that this end dialled"
        if current is not None:
            # It dials only when it has no link: what this end still holds is dead, or belongs to a process that is.
            current.abort()
        if peer.dialling is not None and self._identity.worker < identity.worker:
            return _DUPLICATE, "this end is dialling, and its name comes first"
        return None

    def link_opened(self, link: Link, identity: Identity) -> None:
        peer = self._peers.setdefault(identity.worker, _Peer())
        own_dial, peer.dialling = peer.dialling, None
        if own_dial is not None and own_dial is not link:
            own_dial.abort()
        if peer.link is not None and peer.link is not link:
            peer.link.abort()
        self.open_links[identity.worker] = link
        peer.link, peer.instance, peer.endpoint, peer.backoff_s = link, identity.instance, identity.endpoint, 0.0
        if (opening := self._opening.get(link)) is not None and not opening.done():
            opening.set_result(identity)
        for waiter in peer.waiters:
            if not waiter.done():
                waiter.set_result(link)
        _log.debug("link open", peer=identity.worker, medium=link.medium, dialled=link.side is Side.DIALER)

    def link_lost(self, link: Link, error: EpdError, code: str) -> None:
        self._links.discard(link)
        peer = self._peers.get(link.peer)
        if (opening := self._opening.get(link)) is not None and not opening.done():
            opening.set_exception(_Duplicate(error.message) if code == _DUPLICATE else error)
        elif peer is not None and peer.link is link:
            peer.link = None
            del self.open_links[link.peer]
            _log.debug("link lost", peer=link.peer, code=code, reason=error.message)
            self._host.peer_lost(link.peer)
        elif code not in ("reset", _DUPLICATE, "aborted"):
            _log.warning("link refused", peer=link.peer, code=code, reason=error.message)

    # --- dialling ---------------------------------------------------------------------------------------------------

    async def _dial(self, worker: WorkerId, peer: _Peer) -> None:
        """Try once, after the back-off that the last failure left, and tell the waiters."""
        try:
            await asyncio.sleep(peer.backoff_s)
            await self._attempt(worker, peer)
        except EpdError as error:
            peer.backoff_s = min(max(2 * peer.backoff_s, FIRST_BACKOFF_S), MAX_BACKOFF_S)
            self._fail_waiters(peer, error)
        finally:
            peer.dial = None

    async def _attempt(self, worker: WorkerId, peer: _Peer) -> None:
        """Until the link is open, whoever dialled it. Raises PeerLost or Refused."""
        endpoint = peer.endpoint
        assert endpoint is not None
        for medium in self._media(endpoint):
            if peer.is_open():
                return
            link = self._make_link(Side.DIALER, medium, expected=worker)
            peer.dialling = link
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._open(link, endpoint.host, endpoint.port, endpoint.unix_path)
                return
            except TimeoutError:
                error: EpdError = PeerLost(f"worker {worker!r} did not answer within {CONNECT_TIMEOUT_S:g} s")
            except _Duplicate as duplicate:
                await self._other_link(peer)
                error = duplicate
            except EpdError as lost:
                error = lost
            finally:
                if peer.dialling is link:
                    peer.dialling = None
            if peer.is_open():
                return
            if isinstance(error, Refused):
                break
        raise error

    def _media(self, endpoint: Endpoint) -> tuple[str, ...]:
        same_host = endpoint.unix_path and endpoint.host_id and endpoint.host_id == self._identity.endpoint.host_id
        return ("unix", "tcp") if same_host else ("tcp",)

    async def _open(self, link: Link, host: str, port: int, unix_path: str = "") -> Identity:
        """Connect the link's socket and go through the handshake. On any failure nothing of it is left."""
        loop = asyncio.get_running_loop()
        opening: asyncio.Future[Identity] = loop.create_future()
        self._opening[link] = opening
        try:
            if link.medium == "unix":
                sock = sockets.unix_socket()
                try:
                    await loop.sock_connect(sock, sockets.unix_address(unix_path))
                except BaseException:
                    sock.close()
                    raise
                await loop.create_unix_connection(lambda: link, sock=sock)
            else:
                await loop.create_connection(lambda: link, host, port)
            return await opening
        except OSError as error:
            raise PeerLost(f"cannot reach {unix_path if link.medium == 'unix' else f'{host}:{port}'}: {error}") from None
        finally:
            del self._opening[link]
            if not link.is_open:
                link.abort()

    async def _other_link(self, peer: _Peer) -> None:
        """The other end refused this dial because of its own: wait a little for that one."""
        waiter: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        peer.waiters[waiter] = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if peer.link is None:
                    await waiter
        except TimeoutError:
            pass
        finally:
            peer.waiters.pop(waiter, None)

    def _make_link(self, side: Side, medium: str, *, expected: WorkerId | None) -> Link:
        link = Link(
            self,
            side=side,
            identity=self._identity,
            token=self._token,
            medium=medium,
            expected=expected,
            heartbeat_s=self._heartbeat_s,
        )
        self._links.add(link)
        return link

    def _fail_waiters(self, peer: _Peer, error: EpdError) -> None:
        for waiter in peer.waiters:
            if not waiter.done():
                waiter.set_exception(error)

    async def _drain(self, link: Link, timeout_s: float) -> None:
        try:
            await link.drained(timeout_s)
        except EpdError:
            pass  # it does not read, or has gone


class _Duplicate(PeerLost):
    """The other end has, or is about to have, a link that it prefers."""
