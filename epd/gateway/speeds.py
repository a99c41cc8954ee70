"""How long a worker's device takes for a token, by stage: learnt from what the worker reports, no profile needed.

Reports count the seconds spent in steps and the tokens that came of them, since start. Their growth from one report to the next,
recent steps weighing more, gives a speed. Workers of about one speed are taken to be of one kind and get their common one, since
noise would else send everything to whoever was lucky last. Who has worked little is taken to be much like the others: first steps
are slow, and whoever is thought to be slow is given little to show otherwise.

Owns: sums per worker and stage. Does not know: what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import StageLoad, WorkerId

# Until anybody has worked: only the proportion of the two matters, and that only where one worker has both stages.
_FIRST_GUESS_S = {"encode": 25e-6, "prefill": 25e-6}
_HALF_LIFE_S = 2.0  # of work: what was learnt that long ago counts half
_MOST_S = 4.0  # that one report weighs: a worker that was there before this gateway has hours to tell of
_ONE_KIND = 1.25  # workers within such a factor of the mean
_GIVEN_S = 0.1  # of work at the common speed, that everybody is credited with


@dataclass(slots=True)
class _Seen:
    busy_s: float  # as reported last
    num_tokens: int
    seconds: float = 0.0  # of recent work, and the tokens that it gave
    tokens: float = 0.0

    def token_s(self, common_s: float) -> float:
        return (self.seconds + _GIVEN_S) / (self.tokens + _GIVEN_S / common_s)

    def report(self, load: StageLoad) -> bool:
        """Whether anything has been done since the last one."""
        more_s, more = load.busy_s - self.busy_s, load.num_tokens - self.num_tokens
        self.busy_s, self.num_tokens = load.busy_s, load.num_tokens
        if more_s <= 0 or more <= 0:
            return False
        kept = 0.5 ** (more_s / _HALF_LIFE_S)
        weight = min(1.0, _MOST_S / more_s)
        self.seconds = self.seconds * kept + weight * more_s
        self.tokens = self.tokens * kept + weight * more
        return True


class Speeds:
    """Of the encode and prefill stages; a decode stage's step takes about as long for one token as for many."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[WorkerId, _Seen]] = {role: {} for role in _FIRST_GUESS_S}
        self._mean_s: dict[str, float] = {}  # by role; missing: it has to be computed anew

    def report(self, worker: WorkerId, load: StageLoad) -> None:
        """Take a worker's latest report of a stage; the same one again changes nothing."""
        seen = self._seen.get(load.role)
        if seen is not None and seen.setdefault(worker, _Seen(0.0, 0)).report(load):
            self._mean_s.pop(load.role, None)

    def forget(self, worker: WorkerId) -> None:
        for role, seen in self._seen.items():
            if seen.pop(worker, None) is not None:
                self._mean_s.pop(role, None)

    def token_s(self, worker: WorkerId, role: str) -> float:
        """Seconds of the worker's device for a token of that stage; 0 for a stage that does not go by tokens."""
        if role not in self._seen:
            return 0.0
        mean_s = self._mean_s.get(role)
        if mean_s is None:
            mean_s = self._mean_s[role] = self._mean_of(role)
        seen = self._seen[role].get(worker)
        if seen is None:
            return mean_s
        own_s = seen.token_s(mean_s)
        return mean_s if mean_s / _ONE_KIND < own_s < mean_s * _ONE_KIND else own_s

    def _mean_of(self, role: str) -> float:
        """Over all work, so that little of it says little."""
        tokens = sum(seen.tokens for seen in self._seen[role].values())
        return sum(seen.seconds for seen in self._seen[role].values()) / tokens if tokens else _FIRST_GUESS_S[role]
