"""Reads one JSON object field by field, and says exactly what is wrong with a field that is not as it should be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from epd.errors import BadRequest, Unsupported

_SHOWN_CHARS = 60
MAX_DEPTH = 100  # of a schema, or of arguments


class Fields:
    """A JSON object of a request. Every field must be taken by name; `refuse_rest` refuses those that nobody took.

    A field that is null counts as absent, as in OpenAI's API.
    """

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{path or 'the request body'} must be a JSON object, not {kind(value)}", param=path)
        self._values = {name: item for name, item in value.items() if item is not None}
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> object:
        """Any value, None when absent; checking it is the caller's."""
        return self._values.pop(name, None)

    def require(self, name: str, *, what: str) -> object:
        value = self.take(name)
        if value is None:
            raise BadRequest(f"{self.path(name)} is required: {what}", param=self.path(name))
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def string(self, name: str, *, choices: Collection[str] = ()) -> str | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        if choices and value not in choices:
            raise self.wrong(name, " or ".join(f'"{choice}"' for choice in choices), value)
        return value

    def integer(self, name: str, *, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, *, low: float, high: float, default: float, above: bool = False) -> float:
        """A number from `low` to `high`; `above`: low itself is not allowed."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or (above and value == low):
            raise self.wrong(name, f"a number {f'above {low:g}, up' if above else f'from {low:g}'} to {high:g}", value)
        return float(value)

    def array(self, name: str) -> Sequence[object] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "an array", value)
        return value

    def refuse_rest(self, neutral: Mapping[str, Sequence[object]]) -> None:
        """Refuse what is left, unless its value asks for nothing: those in `neutral` (null was dropped before)."""
        for name, value in self._values.items():
            allowed = neutral.get(name)
            if allowed is None:
                raise Unsupported(f"{_shown_name(self.path(name))} is not supported", param=_shown_name(self.path(name)))
            if _spelled(value) not in {_spelled(choice) for choice in allowed}:
                choices = " or ".join(_spelled(choice).decode() for choice in allowed)
                raise Unsupported(f"{self.path(name)} is not supported beyond {choices}", param=self.path(name))

    def wrong(self, name: str, expected: str, value: object) -> BadRequest:
        return BadRequest(f"{self.path(name)} must be {expected}, not {shown(value)}", param=self.path(name))


def is_deeper(value: object, depth: int) -> bool:
    """Whether a JSON value has more than so many levels."""
    if not isinstance(value, dict | list):
        return False
    if not depth:
        return True
    items: Sequence[object] = list(value.values()) if isinstance(value, dict) else value
    return any(is_deeper(item, depth - 1) for item in items)


def kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def shown(value: object) -> str:
    """A value as it is quoted in a message: itself while it is short."""
    if isinstance(value, list | dict):
        return kind(value)
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        return f"a string of {len(value)} characters"
    return _spelled(value).decode() if not isinstance(value, int) or abs(value) < 2**63 else "an integer of more than 64 bits"


def _spelled(value: object) -> bytes:
    return msgspec.json.encode(value)


def _shown_name(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARS else name[:_SHOWN_CHARS] + "..."
