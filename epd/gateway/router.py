"""Tokens of all requests of one decode step arrive in one message; this actor hands each to its attempt.

Owns: who listens to which request. Does not know: order, text, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable

from epd.errors import InternalError
from epd.microkernel.actor import Actor, Mail
from protocol.messages import RequestId, Token, TokenStep

Listener = Callable[[int, Token], None]


class TokenRouter(Actor):
    """Routes `TokenStep` by (request, epoch). What nobody listens to any more is dropped: its attempt has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._listeners: dict[tuple[RequestId, int], Listener] = {}

    def attach(self, request_id: RequestId, epoch: int, listener: Listener) -> None:
        if (request_id, epoch) in self._listeners:
            raise InternalError(f"request {request_id} epoch {epoch} is listened to already")
        self._listeners[request_id, epoch] = listener

    def detach(self, request_id: RequestId, epoch: int) -> None:
        self._listeners.pop((request_id, epoch), None)

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    async def receive(self, mail: Mail) -> None:
        if not isinstance(mail.message, TokenStep):
            raise InternalError(f"the token router was sent {type(mail.message).__name__}")
        for request_id, epoch, index, token in mail.message.tokens:
            listener = self._listeners.get((request_id, epoch))
            if listener is not None:
                listener(index, token)
