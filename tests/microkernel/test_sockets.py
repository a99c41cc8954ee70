"""How a worker listens, and what the kernel is told about a link's socket."""

from __future__ import annotations

import socket

import pytest

from epd.microkernel import sockets


def test_host_id_is_the_same_for_the_whole_process() -> None:
    assert sockets.host_id() == sockets.host_id()
    assert sockets.host_id().count("/") == 2


def test_a_unix_listener_is_reached_by_its_path_and_has_no_file() -> None:
    listener, path = sockets.listen_unix()
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dialer:
        assert path.startswith("@")
        dialer.connect(sockets.unix_address(path))
        accepted, _ = listener.accept()
        accepted.close()
    assert sockets.unix_address("/run/x.sock") == "/run/x.sock"


def test_a_taken_port_is_said() -> None:
    with sockets.listen_tcp("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        sockets.listen_tcp("127.0.0.1", listener.getsockname()[1])


def test_a_host_may_be_a_name() -> None:
    with sockets.listen_tcp("localhost", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_within_a_host_the_send_buffer_is_bounded() -> None:
    with sockets.listen_tcp("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as dialer:
        sockets.tune(dialer)
        assert dialer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert dialer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * sockets.SEND_BUFFER_BYTES
    one, other = socket.socketpair()
    with one, other:
        sockets.tune(one)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * sockets.SEND_BUFFER_BYTES


def test_to_another_address_only_what_is_unsent_is_bounded() -> None:
    with sockets.listen_tcp("127.0.0.1", 0) as listener, socket.socket() as dialer:
        dialer.bind(("127.0.0.2", 0))
        dialer.connect(listener.getsockname())
        before = dialer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sockets.tune(dialer)
        assert dialer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == before
        assert dialer.getsockopt(socket.IPPROTO_TCP, 25) == sockets.SEND_BUFFER_BYTES
