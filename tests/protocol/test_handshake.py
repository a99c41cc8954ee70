"""Who is let in, who is refused and why, and what a stranger gets to see."""

from __future__ import annotations

import pytest

from protocol import codec
from protocol.connection import Connection, State
from protocol.events import Closed, Opened, PeerProved
from protocol.frames import HEADER, Kind, ProtocolError
from protocol.handshake import Identity, Side, check_proof, hello_body, hello_id, proof, read_hello
from protocol.messages import Endpoint, WorkerId
from tests.support.wire import TOKEN, Pair, connection, feed, identity, taken


def shake(dialer: Connection, listener: Connection) -> tuple[list[object], list[object]]:
    """Carry bytes until quiet; what each end reported."""
    found: tuple[list[object], list[object]] = ([], [])
    while (to_listener := taken(dialer)) + (to_dialer := taken(listener)):
        for event in feed(listener, to_listener) if to_listener else []:
            found[1].append(event)
            if isinstance(event, PeerProved):
                found[1].append(listener.accept())
        found[0].extend(feed(dialer, to_dialer) if to_dialer else [])
    return found


def test_both_ends_open_and_know_each_other() -> None:
    pair = Pair()
    pair.pump()
    assert pair.dialer_events == [Opened(identity("b"))]
    assert pair.listener_events == [PeerProved(identity("a")), Opened(identity("a"))]


def test_a_stranger_hears_nothing_before_it_has_said_hello() -> None:
    assert taken(connection(Side.LISTENER, "b")) == b""


def test_the_listener_proves_itself_only_to_a_dialer_that_did() -> None:
    dialer, listener = connection(Side.DIALER, "a", token=b"wrong"), connection(Side.LISTENER, "b")
    feed(listener, taken(dialer))
    feed(dialer, taken(listener))
    feed(listener, taken(dialer))
    said = taken(listener)
    assert HEADER.unpack_from(said)[0] == Kind.GOODBYE
    assert codec.decode_goodbye(said[16:]).code == "wrong_token"


def test_a_wrong_token_is_refused_at_both_ends() -> None:
    dialer_saw, listener_saw = shake(connection(Side.DIALER, "a", token=b"wrong"), connection(Side.LISTENER, "b"))
    assert [(type(e), getattr(e, "code", "")) for e in listener_saw] == [(Closed, "wrong_token")]
    assert [(type(e), getattr(e, "code", "")) for e in dialer_saw] == [(Closed, "wrong_token")]


def test_a_listener_with_another_token_is_refused_by_the_dialer() -> None:
    dialer, honest = connection(Side.DIALER, "a"), connection(Side.LISTENER, "b")
    feed(honest, taken(dialer))
    feed(dialer, taken(honest))
    taken(dialer)
    forged = proof(b"wrong", Side.LISTENER, dialer._own_hello, honest._own_hello)
    (event,) = feed(dialer, HEADER.pack(Kind.PROOF, 0, 0, len(forged), 0) + forged)
    assert isinstance(event, Closed)
    assert event.code == "wrong_token"


def test_a_proof_cannot_be_reflected_or_replayed() -> None:
    hellos = hello_body(Side.DIALER, identity("a"), b"1" * 32), hello_body(Side.LISTENER, identity("b"), b"2" * 32)
    shown = proof(TOKEN, Side.DIALER, *hellos)
    check_proof(TOKEN, Side.DIALER, *hellos, shown)
    others = [
        (Side.LISTENER, *hellos),
        (Side.DIALER, hellos[1], hellos[0]),
        (Side.DIALER, hellos[0], hello_body(Side.LISTENER, identity("b"), b"3" * 32)),
        (Side.DIALER, hello_body(Side.DIALER, identity("a", roles=("gateway",)), b"1" * 32), hellos[1]),
        (Side.DIALER, hello_body(Side.DIALER, identity("c"), b"1" * 32), hellos[1]),
    ]
    for side, dialer_hello, listener_hello in others:
        with pytest.raises(ProtocolError, match="wrong_token"):
            check_proof(TOKEN, side, dialer_hello, listener_hello, shown)
    for cut in (b"", shown[:-1], shown + b"\0"):
        with pytest.raises(ProtocolError, match="wrong_token"):
            check_proof(TOKEN, Side.DIALER, *hellos, cut)


def test_another_version_is_refused_before_its_hello_is_read() -> None:
    listener = connection(Side.LISTENER, "b")
    body = b"whatever version 3 says"
    (event,) = feed(listener, HEADER.pack(Kind.HELLO, 0, 0, len(body), hello_id(3)) + body)
    assert isinstance(event, Closed)
    assert event.code == "wrong_version"
    assert "version 2, the other 3" in event.reason


def test_a_worker_does_not_link_to_itself_nor_to_its_double() -> None:
    dialer_saw, listener_saw = shake(connection(Side.DIALER, "a"), connection(Side.LISTENER, "a"))
    assert [getattr(event, "code", "") for event in (*listener_saw, *dialer_saw)] == ["same_worker", "same_worker"]


def test_the_dialer_refuses_another_worker_than_it_dialled() -> None:
    dialer_saw, listener_saw = shake(connection(Side.DIALER, "a", expected="c"), connection(Side.LISTENER, "b"))
    assert [getattr(event, "code", "") for event in (*listener_saw, *dialer_saw)] == ["wrong_worker", "wrong_worker"]
    dialer, listener = connection(Side.DIALER, "a", expected="b"), connection(Side.LISTENER, "b")
    shake(dialer, listener)
    assert dialer.is_open


def test_the_listener_may_refuse_a_proved_dialer() -> None:
    dialer, listener = connection(Side.DIALER, "a"), connection(Side.LISTENER, "b")
    feed(listener, taken(dialer))
    feed(dialer, taken(listener))
    assert feed(listener, taken(dialer)) == [PeerProved(identity("a"))]
    listener.close("duplicate", "there is another link")
    assert feed(dialer, taken(listener)) == [Closed("duplicate", "there is another link", True)]
    with pytest.raises(RuntimeError):
        listener.accept()


@pytest.mark.parametrize(
    "hello",
    [
        codec.encode(["dialer", identity("a"), b"short nonce"]),
        codec.encode(["listener", identity("a"), b"1" * 32]),  # both listen
        codec.encode(["dialer", Identity(WorkerId("a"), 1, (), Endpoint(WorkerId("b"), "h", 1)), b"1" * 32]),
        codec.encode(["dialer", Identity(WorkerId(""), 1, (), Endpoint(WorkerId(""), "h", 1)), b"1" * 32]),
        codec.encode(["dialer"]),
        b"\xc1",
    ],
)
def test_a_broken_hello_is_refused(hello: bytes) -> None:
    with pytest.raises((ProtocolError, *codec.UNREADABLE)):
        read_hello(hello_id(), hello, own=Side.LISTENER, identity=identity("z"), expected=None)


def test_no_magic_no_peer() -> None:
    body = hello_body(Side.DIALER, identity("a"), b"1" * 32)
    with pytest.raises(ProtocolError, match="no epd peer"):
        read_hello(1, body, own=Side.LISTENER, identity=identity("z"), expected=None)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind > Kind.GOODBYE])
def test_nothing_but_the_handshake_is_read_before_its_end(kind: Kind) -> None:
    listener = connection(Side.LISTENER, "b")
    (event,) = feed(listener, HEADER.pack(kind, 0, 0, 0, 1))
    assert isinstance(event, Closed)
    assert event.code == "bad_frame"
    assert listener.state is State.CLOSED


def test_a_handshake_that_stands_still_is_given_up() -> None:
    listener = connection(Side.LISTENER, "b")
    reported = [event for _ in range(20) for event in listener.tick()]
    assert [event.code for event in reported if isinstance(event, Closed)] == ["silent"]


def test_a_handshake_that_drips_is_given_up() -> None:
    listener, drip = connection(Side.LISTENER, "b"), taken(connection(Side.DIALER, "a"))
    reported = []
    for index in range(20):
        if listener.state is not State.CLOSED:
            feed(listener, drip[index : index + 1])
        reported += listener.tick()
    assert [event.code for event in reported if isinstance(event, Closed)] == ["silent"]
