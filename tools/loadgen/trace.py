"""Recorded traffic: JSON lines as Mooncake published theirs (Qin et al., "Mooncake", FAST 2025).

A line is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}; each hash id names a block of 512
prompt tokens *with everything before it*, so that requests which begin with the same ids begin with the same text. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceEntry:
    at_s: float  # after the first entry
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(lines: Sequence[str], *, speed: float = 1.0) -> tuple[TraceEntry, ...]:
    """Entries by time; `speed` 2 replays them in half of it. Without hash ids, a prompt is all its own.

    Raises:
        ValueError: a line is no such object; the message names it.
    """
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_entry(json.loads(line), speed))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not an entry of a trace: {error!r}") from error
    if not entries:
        raise ValueError("there is no entry in it")
    entries.sort(key=lambda entry: entry.at_s)
    start_s = entries[0].at_s
    return tuple(TraceEntry(entry.at_s - start_s, entry.input_tokens, entry.output_tokens, entry.hash_ids) for entry in entries)


def _entry(line: dict[str, object], speed: float) -> TraceEntry:
    at_ms, input_tokens, output_tokens = (line[name] for name in ("timestamp", "input_length", "output_length"))
    hash_ids = line.get("hash_ids") or []
    if not isinstance(at_ms, int | float) or isinstance(at_ms, bool):
        raise TypeError(f"timestamp is {at_ms!r}")
    if not (isinstance(input_tokens, int) and isinstance(output_tokens, int) and input_tokens > 0 and output_tokens > 0):
        raise TypeError(f"lengths are {input_tokens!r} and {output_tokens!r}")
    if not isinstance(hash_ids, list) or not all(isinstance(each, int) and each >= 0 for each in hash_ids):
        raise TypeError("hash_ids is no list of whole numbers")
    return TraceEntry(at_ms / 1000.0 / speed, input_tokens, output_tokens, tuple(hash_ids))
