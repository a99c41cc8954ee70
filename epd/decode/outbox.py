"""Output tokens on their way to gateways: all tokens of a step in one message per gateway, and a slow gateway holds up nobody."""

from __future__ import annotations

from epd.errors import EpdError
from epd.log import Log
from epd.microkernel.actor import Actor
from protocol.messages import Address, RequestId, Token, TokenStep

_log = Log("outbox")

Item = tuple[RequestId, int, int, Token]  # request, epoch, output index, token


class Outbox:
    """Sends through the actor that owns it. While a send to a gateway waits, its later tokens gather and go together."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._pending: dict[Address, list[Item]] = {}
        self._sending: set[Address] = set()

    def add(self, gateway: Address, item: Item) -> None:
        self._pending.setdefault(gateway, []).append(item)

    def flush(self) -> None:
        for gateway in self._pending:
            if gateway not in self._sending:
                self._sending.add(gateway)
                self._actor.spawn(self._send(gateway), name=f"tokens to {gateway.worker}")

    async def _send(self, gateway: Address) -> None:
        try:
            while items := self._pending.pop(gateway, None):
                await self._actor.system.tell(gateway, TokenStep(tuple(items)))
        except EpdError as error:
            # Their requests end at the gateway, which misses them. If it has gone, its links abort them here.
            _log.warning("tokens were not delivered", gateway=gateway.worker, reason=error.message)
            self._pending.pop(gateway, None)
        finally:
            self._sending.discard(gateway)
