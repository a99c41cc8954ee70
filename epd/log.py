"""Structured, quiet logs: one line an event, `key=value` facts after a short sentence, to standard error."""

from __future__ import annotations

import logging
import sys


class Log:
    """A logger whose calls take an event and its facts: `log.info("worker joined", worker=..., role=...)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"epd.{name}")

    def debug(self, event: str, **facts: object) -> None:
        self._emit(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: object) -> None:
        self._emit(logging.INFO, event, facts)

    def warning(self, event: str, **facts: object) -> None:
        self._emit(logging.WARNING, event, facts)

    def error(self, event: str, *, error: BaseException | None = None, **facts: object) -> None:
        if error is not None:
            facts["error"] = f"{type(error).__name__}: {error}"
        self._emit(logging.ERROR, event, facts, error)

    def _emit(self, level: int, event: str, facts: dict[str, object], error: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            words = [event, *(f"{key}={_quoted(value)}" for key, value in facts.items())]
            self._logger.log(level, " ".join(words), exc_info=error)


def setup(level: str, *, worker: str) -> None:
    """Send this process's logs to standard error, each line with its worker."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {worker} %(name)s: %(message)s"))
    root = logging.getLogger("epd")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level.upper())


def _quoted(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return repr(text) if " " in text or not text else text
