"""What the gateway remembers of other workers' caches: which worker holds which content, under the names of `epd.cache.prefix`
or an image's hash. A bounded guess; the workers' own caches are the truth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from protocol.messages import WorkerId

_NOBODY: frozenset[WorkerId] = frozenset()


class CacheMemory:
    """Chains of keys per worker, the least recently used keys forgotten first. A single key is a chain of one."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._holders: OrderedDict[Hashable, frozenset[WorkerId]] = OrderedDict()  # longest unused first

    def __len__(self) -> int:
        return len(self._holders)

    def longest(self, keys: Sequence[Hashable]) -> dict[WorkerId, int]:
        """Per worker that holds any, how many keys from the first one on it holds without a gap."""
        found: dict[WorkerId, int] = {}
        holding = self._holders.get(keys[0], _NOBODY) if keys else _NOBODY
        num_keys = 0
        for key in keys:
            still = self._holders.get(key, _NOBODY)
            if still != holding:
                for worker in holding - still:
                    found[worker] = num_keys
                holding &= still
            if not holding:
                break
            num_keys += 1
        found.update(dict.fromkeys(holding, num_keys))
        return found

    def remember(self, keys: Sequence[Hashable], worker: WorkerId) -> None:
        """The worker holds the whole chain, or soon will."""
        one = frozenset((worker,))
        # Backwards: the end of a chain is of no use without its beginning, so it is to be forgotten first.
        for key in reversed(keys):
            holders = self._holders.get(key)
            if holders is None:
                self._holders[key] = one
            elif worker not in holders:
                self._holders[key] = holders | one
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_keys:
            self._holders.popitem(last=False)

    def drop(self, keys: Sequence[Hashable], worker: WorkerId) -> None:
        """The worker does not hold these."""
        for key in keys:
            left = self._holders.get(key, _NOBODY) - {worker}
            if left:
                self._holders[key] = left
            else:
                self._holders.pop(key, None)

    def forget(self, worker: WorkerId) -> None:
        """The worker holds nothing any more."""
        self.drop([key for key, holders in self._holders.items() if worker in holders], worker)
