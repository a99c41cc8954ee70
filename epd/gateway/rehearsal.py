"""A process of its own that makes grammars, and follows each for a while, before any worker has to.

A schema of one line can take hours and all memory to be made into an automaton, and nothing can interrupt the library that does
it. So it is done here: what takes too long here, or too much memory, is refused, and a process that does not answer is killed.

    python -m epd.gateway.rehearsal      asked in lines of JSON on its standard input, answers on its standard output
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import IO

import msgspec
import numpy as np

from epd.automaton import END_OF_BYTES, allowed, automaton, byte_tokens, what_is_wrong
from epd.errors import BadRequest
from epd.gateway.guide import Guide, grammar_of
from epd.gateway.tools import Tools

MAX_CPU_S = 0.5  # of making a grammar and following it; those in use take milliseconds
MAX_MEMORY_BYTES = 64 * 2**20
_MAX_STEPS = 200
_PROCESS_CPU_S = 30  # after which the process ends for good, should nobody be there to kill it
_PROCESS_BYTES = 4 * 2**30  # of addresses


class Ask(msgspec.Struct, frozen=True):
    guide: Guide | None
    tools: Tools | None


class Grammar(msgspec.Struct, frozen=True, tag=True):
    """As `grammar_of` makes it."""

    grammar: str


class Wrong(msgspec.Struct, frozen=True, tag=True):
    """What a BadRequest says."""

    message: str
    param: str


def rehearse(
    ask: Ask, *, cpu_s: Callable[[], float] = time.process_time, memory_bytes: Callable[[], int] | None = None
) -> Grammar | Wrong:
    """The grammar of what is asked, after it was followed for some bytes, drawn at random but the same every time."""
    memory_bytes = memory_bytes or _resident_bytes
    began_s, before_bytes = cpu_s(), memory_bytes()
    param = ask.guide.param if ask.guide is not None else "tools"
    try:
        grammar = grammar_of(ask.guide, ask.tools)
    except BadRequest as error:
        return Wrong(error.message, error.param)
    if not grammar:
        return Grammar("")
    matcher = automaton(byte_tokens(), grammar)
    drawn = np.random.default_rng(0)
    for _ in range(_MAX_STEPS):
        bits = allowed(matcher, END_OF_BYTES + 1)
        if reason := what_is_wrong(matcher):
            return Wrong(f"{param} cannot be followed: {reason}", param)
        if cpu_s() - began_s > MAX_CPU_S:
            return Wrong(f"{param} takes too long to follow", param)
        if memory_bytes() - before_bytes > MAX_MEMORY_BYTES:
            return Wrong(f"{param} takes too much memory to follow", param)
        choices = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little", count=END_OF_BYTES + 1))
        if not len(choices):
            return Wrong(f"{param} cannot be followed: no output would do", param)
        choice = int(drawn.choice(choices))
        if choice == END_OF_BYTES:
            break
        matcher.consume_token(choice)
    return Grammar(grammar)


def main(lines: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until nobody asks any more, or what was asked has left too much behind in this process."""
    decoder = msgspec.json.Decoder(Ask)
    began_s, before_bytes = time.process_time(), _resident_bytes()
    for line in lines:
        answer = rehearse(decoder.decode(line))
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
        if time.process_time() - began_s > _PROCESS_CPU_S / 2 or _resident_bytes() - before_bytes > MAX_MEMORY_BYTES:
            return


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESS_CPU_S, _PROCESS_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_PROCESS_BYTES, _PROCESS_BYTES))
    main(sys.stdin.buffer, sys.stdout.buffer)
