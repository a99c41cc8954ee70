"""Who is let in. A request is refused before any work is done for it, or it is in and will be finished.

Two limits: requests running at once, and prompt tokens outstanding over all of them. A refusal says when to come back, from the
rate at which requests have been finishing; those who were told to come back are counted as standing in line, so that a burst of
refused clients is spread out instead of returning all at once.

Owns: what each admitted request occupies. Knows: times as the caller's `now` numbers. Does not know: stages, tokens, HTTP.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from epd.errors import BadConfig, InternalError, Overloaded
from protocol.messages import RequestId

_RATE_WINDOW_S = 30.0  # how far back the finish rate looks
_MAX_RETRY_AFTER_S = 60.0
_MIN_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class _Ticket:
    num_choices: int
    num_prompt_tokens: int


class Admission:
    """One per gateway. Every admitted request must be given back with `finish`, whichever way it ends."""

    def __init__(self, *, max_requests: int, max_prompt_tokens: int) -> None:
        if min(max_requests, max_prompt_tokens) < 1:
            raise BadConfig("admission limits must be at least 1")
        self.max_requests = max_requests
        self._max_prompt_tokens = max_prompt_tokens
        self._tickets: dict[RequestId, _Ticket] = {}
        self._num_running = 0
        self._num_prompt_tokens = 0
        self._busy_since = 0.0  # meaningful while there are tickets
        self._finished_at: deque[float] = deque()  # of this busy period, within the window
        self._promises: deque[float] = deque()  # when refused clients were told to come back

    @property
    def num_running(self) -> int:
        """Choices that are in: a request counts once per choice of output."""
        return self._num_running

    @property
    def num_prompt_tokens(self) -> int:
        return self._num_prompt_tokens

    def admit(self, request_id: RequestId, *, num_prompt_tokens: int, now: float, num_choices: int = 1) -> None:
        """Let a request in. Alone, it is let in whatever its size: waiting would not make it fit any better.

        Args:
            num_prompt_tokens: of all its choices together.

        Raises:
            Overloaded: it does not fit now; says when to come back.
        """
        if request_id in self._tickets:
            raise InternalError(f"request {request_id} is in already")
        if self._tickets and self._is_full(num_choices, num_prompt_tokens):
            raise self._refusal(num_choices, num_prompt_tokens, now)
        if not self._tickets:
            self._busy_since = now
            self._finished_at.clear()
        self._tickets[request_id] = _Ticket(num_choices, num_prompt_tokens)
        self._num_running += num_choices
        self._num_prompt_tokens += num_prompt_tokens

    def finish(self, request_id: RequestId, *, now: float) -> None:
        """An admitted request has ended, whichever way."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            raise InternalError(f"request {request_id} is not in")
        self._num_running -= ticket.num_choices
        self._num_prompt_tokens -= ticket.num_prompt_tokens
        self._finished_at.append(now)
        self._forget_old(now)

    def is_idle(self) -> bool:
        return not self._tickets

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        held = (
            sum(ticket.num_choices for ticket in self._tickets.values()),
            sum(ticket.num_prompt_tokens for ticket in self._tickets.values()),
        )
        if held != (self._num_running, self._num_prompt_tokens):
            raise InternalError(f"admission: {self._num_running} choices, {self._num_prompt_tokens} tokens counted, {held} held")

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _is_full(self, num_choices: int, num_prompt_tokens: int) -> bool:
        return (
            self._num_running + num_choices > self.max_requests
            or self._num_prompt_tokens + num_prompt_tokens > self._max_prompt_tokens
        )

    def _refusal(self, num_choices: int, num_prompt_tokens: int, now: float) -> Overloaded:
        self._forget_old(now)
        retry_after_s = self._retry_after_s(num_choices, num_prompt_tokens, now)
        self._promises.append(now + retry_after_s)
        return Overloaded(
            f"{self._num_running} requests of at most {self.max_requests} run, with {self._num_prompt_tokens} prompt tokens "
            f"of at most {self._max_prompt_tokens}: try again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
            limit="max_requests" if self._num_running + num_choices > self.max_requests else "max_prompt_tokens",
        )

    def _retry_after_s(self, num_choices: int, num_prompt_tokens: int, now: float) -> float:
        """Until so many requests have finished as must leave before this one fits, after those who were told to come earlier."""
        num_tickets = len(self._tickets)
        excess_choices = (self._num_running + num_choices - self.max_requests) / max(1, self._num_running)
        excess_tokens = (self._num_prompt_tokens + num_prompt_tokens - self._max_prompt_tokens) / max(1, self._num_prompt_tokens)
        num_due = max(1.0, excess_choices * num_tickets, excess_tokens * num_tickets) + len(self._promises)
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, num_due / self._finish_rate(now)))

    def _finish_rate(self, now: float) -> float:
        """Requests per second that have been finishing lately. Before the first one: as if one would finish now."""
        elapsed_s = max(min(now - self._busy_since, _RATE_WINDOW_S), 1e-3)
        return max(1, len(self._finished_at)) / elapsed_s

    def _forget_old(self, now: float) -> None:
        while self._finished_at and self._finished_at[0] < now - _RATE_WINDOW_S:
            self._finished_at.popleft()
        self._promises = deque(promise for promise in self._promises if promise > now)
