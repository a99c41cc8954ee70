"""Sockets for links: how a worker listens and how it is reached.

The Unix socket lives in Linux's abstract namespace, written with a leading "@" in an Endpoint: it has no file, so a killed
process leaves none behind. Whoever connects still has to prove that it holds the token.
"""

from __future__ import annotations

import os
import secrets
import socket
from functools import cache
from pathlib import Path

SEND_BUFFER_BYTES = 256 << 10
"""What the kernel may hold of a link's data before it is on its way. Small frames wait behind it, and more is not faster."""

_TCP_NOTSENT_LOWAT = 25  # <linux/tcp.h>; socket has no name for it before Python 3.12


@cache
def host_id() -> str:
    """Equal for two processes that can open each other's memory: same boot, same pid namespace, same user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.geteuid()}"


def listen_tcp(host: str, port: int) -> socket.socket:
    """Raises OSError when the address is taken or is not this machine's."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(256)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_unix() -> tuple[socket.socket, str]:
    """The listener and its path as an Endpoint says it."""
    name = f"epd-{secrets.token_hex(12)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(f"\0{name}")
        listener.listen(256)
    except BaseException:
        listener.close()
        raise
    return listener, f"@{name}"


def unix_socket() -> socket.socket:
    """For dialing."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def unix_address(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


def tune(sock: socket.socket) -> None:
    """Keep the kernel's share of the queue short, for a connected socket.

    Within a host nothing is in flight: the send buffer is bounded. To another host it has to hold what is in flight, which grows
    with the distance: only what has not been sent yet is bounded.
    """
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sock.getsockname()[0] == sock.getpeername()[0]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, SEND_BUFFER_BYTES)
