"""How a figure is spread: counts per bucket, cheap enough for every token and small enough for every load report.

Owns: the buckets of each figure that stages report. Does not know: Prometheus, time, whose figures these are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from protocol.messages import Spread

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TRANSFER_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, *SECONDS[:12])
TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131072.0)

STAGE_FIGURES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "queue_seconds": SECONDS,  # from the ask to the first work on it
        "preprocess_seconds": SECONDS,  # encode: an image file to patches, with its batch
        "encode_seconds": SECONDS,  # encode: patches to an embedding, with its batch
        "embedding_wait_seconds": SECONDS,  # prefill: in which it could do nothing for want of one
        "prefill_seconds": SECONDS,  # prefill: from the first work on it to its token
        "kv_receive_seconds": SECONDS,  # decode: from the reservation of blocks to the last one's arrival
        "decode_seconds": SECONDS,  # decode: from the first step to the last token
        "step_seconds": SECONDS,
        "step_tokens": TOKENS,  # prefill: computed; decode: drawn; encode: rows of embeddings
        "transfer_seconds": TRANSFER_SECONDS,  # of one pull; its label is the rung
    }
)
"""Buckets, as upper bounds, of every figure that a stage reports. Both ends of a load report know them by name."""


class Distribution:
    """`counts[i]` values were at most `bounds[i]` and more than the bound before; the last count is of values beyond all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num_values(self) -> int:
        return sum(self.counts)


class Spreads:
    """What one stage reports: a distribution per figure and label, from its first value on."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Distribution] = {}

    def observe(self, figure: str, value: float, label: str = "") -> None:
        known = self._known.get((figure, label))
        if known is None:
            known = self._known[figure, label] = Distribution(STAGE_FIGURES[figure])
        known.observe(value)

    def parts(self) -> tuple[Spread, ...]:
        """For a load report."""
        return tuple(Spread(figure, tuple(known.counts), known.total, label) for (figure, label), known in self._known.items())


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that `share` (0 to 1) of all values are at most, taken as evenly spread within a bucket; None without values.

    Values beyond the last bound count as that bound. As Prometheus' histogram_quantile().
    """
    due = share * sum(counts)
    if not sum(counts):
        return None
    seen = 0.0
    for place, count in enumerate(counts):
        if count and seen + count >= due:
            if place == len(bounds):
                break
            low = bounds[place - 1] if place else 0.0
            return low + (bounds[place] - low) * max(0.0, due - seen) / count
        seen += count
    return bounds[-1]


def finer(bounds: Sequence[float], parts: int) -> tuple[float, ...]:
    """Every bucket cut into `parts` of equal ratio, the first (which has no lower bound) excepted. Keeps all `bounds`."""
    cut = [bounds[0]]
    for low, high in pairwise(bounds):
        cut += [low * (high / low) ** (part / parts) for part in range(1, parts)]
        cut.append(high)
    return tuple(cut)


def coarser(distribution: Distribution, bounds: Sequence[float]) -> list[int]:
    """Counts for `bounds`, each of which is one of the distribution's."""
    counts = [0] * (len(bounds) + 1)
    for place, count in enumerate(distribution.counts):
        if count:
            upper = distribution.bounds[place] if place < len(distribution.bounds) else float("inf")
            counts[bisect_left(bounds, upper)] += count
    return counts
