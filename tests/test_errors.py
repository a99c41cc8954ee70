from __future__ import annotations

import pytest

from epd import errors
from epd.errors import EpdError, from_wire
from protocol.messages import Failed


def _classes(cls: type[EpdError] = EpdError) -> list[type[EpdError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _classes(sub))]


CODES = sorted({cls.code for cls in _classes() if cls.__module__ == "epd.errors"})


@pytest.mark.parametrize("code", CODES)
def test_an_error_is_the_same_on_the_other_side(code: str) -> None:
    back = from_wire(Failed(code=code, message="why", retryable=False))
    assert (back.code, back.message) == (code, "why")
    assert back.to_wire().code == code


def test_codes_are_not_shared_by_unrelated_errors() -> None:
    for cls in _classes():
        parent = cls.__mro__[1]
        same = [
            other for other in _classes() if other.code == cls.code and not issubclass(other, cls) and not issubclass(cls, other)
        ]
        assert not same or getattr(parent, "code", None) == cls.code, (cls, same)


def test_a_code_of_a_newer_version_keeps_what_it_says() -> None:
    back = from_wire(Failed(code="from the future", message="why"))
    assert isinstance(back, errors.RemoteError)
    assert back.message == "why"
    assert not back.retryable
    assert from_wire(Failed(code="from the future", message="why", retryable=True)).retryable


def test_whose_fault_it_is_shows_in_the_status() -> None:
    assert errors.BadImage("x").http_status == 400
    assert errors.Overloaded("x").http_status == 429
    assert errors.Unavailable("x").http_status == 503
    assert errors.PeerLost("x").retryable
    assert not errors.BadRequest("x").retryable
