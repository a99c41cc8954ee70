from __future__ import annotations

import pytest

from epd.errors import InternalError
from epd.gateway.router import TokenRouter
from epd.microkernel.actor import Mail
from epd.microkernel.local import TOLD
from protocol.messages import Leave, Message, RequestId, Token, TokenStep, WorkerId

A, B = RequestId("a"), RequestId("b")


def _mail(message: Message) -> Mail:
    return Mail(message, (), TOLD, WorkerId("d"))


async def test_each_token_goes_to_its_attempt_and_to_nobody_else() -> None:
    router = TokenRouter()
    heard: list[tuple[str, int, int]] = []
    router.attach(A, 1, lambda index, token: heard.append(("a1", index, token.token_id)))
    router.attach(A, 2, lambda index, token: heard.append(("a2", index, token.token_id)))
    router.attach(B, 1, lambda index, token: heard.append(("b1", index, token.token_id)))
    router.detach(B, 1)
    step = TokenStep(((A, 1, 0, Token(7)), (B, 1, 4, Token(8)), (A, 2, 5, Token(9)), (A, 3, 0, Token(1))))
    await router.receive(_mail(step))
    assert heard == [("a1", 0, 7), ("a2", 5, 9)]
    router.detach(A, 1)
    router.detach(A, 1)
    assert router.num_listeners == 1


async def test_two_listeners_for_one_attempt_are_a_mistake() -> None:
    router = TokenRouter()
    router.attach(A, 1, lambda index, token: None)
    with pytest.raises(InternalError):
        router.attach(A, 1, lambda index, token: None)


async def test_anything_else_is_refused() -> None:
    with pytest.raises(InternalError):
        await TokenRouter().receive(_mail(Leave(WorkerId("w"))))
