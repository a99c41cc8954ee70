"""Where a gateway gets its grammars: from the rehearsal's process, which it starts when first needed, bounds and kills.

Owns that process and the last grammars that it made. One grammar is made at a time: they take milliseconds, and one that does
not is waited for a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import OrderedDict
from dataclasses import replace

import msgspec

from epd.errors import BadRequest, InternalError, Overloaded
from epd.gateway.guide import Guide
from epd.gateway.rehearsal import Ask, Grammar, Wrong
from epd.gateway.tools import Tools

MAX_REHEARSAL_S = 5.0  # on a busy host; what it may take of the CPU is much less
MAX_WAIT_S = 15.0  # for those before
_MAX_KEPT = 256
_MAX_LINE_BYTES = 16 * 2**20

_decoder = msgspec.json.Decoder(Grammar | Wrong)


class Grammars:
    """One per gateway."""

    def __init__(self, *, max_rehearsal_s: float = MAX_REHEARSAL_S, max_wait_s: float = MAX_WAIT_S) -> None:
        self._max_rehearsal_s = max_rehearsal_s
        self._max_wait_s = max_wait_s
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._kept: OrderedDict[bytes, Grammar | Wrong] = OrderedDict()  # least recently used first

    async def grammar(self, guide: Guide | None, tools: Tools | None) -> str:
        """`Sampling.guide` for answers that follow the guide or call tools; empty for those that are free.

        Raises:
            BadRequest: nothing can follow it, or it takes too much to; says why.
            Overloaded: too many others wait for theirs.
        """
        if guide is None and (tools is None or not tools.need_guide):
            return ""
        ask = msgspec.json.encode(Ask(guide, None if tools is None else _in_short(tools)))
        answer = self._kept.pop(ask, None) or await self._in_turn(ask, guide)
        self._kept[ask] = answer
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        if isinstance(answer, Wrong):
            raise BadRequest(answer.message, param=answer.param)
        return answer.grammar

    async def close(self) -> None:
        """Whoever is still waiting gets an error."""
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()

    async def _in_turn(self, ask: bytes, guide: Guide | None) -> Grammar | Wrong:
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("too many forms of outputs are waiting to be looked at") from None
        try:
            async with asyncio.timeout(self._max_rehearsal_s):
                return await self._ask(ask)
        except (TimeoutError, EOFError):
            param = "tools" if guide is None else guide.param
            return Wrong(f"{param} takes too long, or too much memory, to follow", param)
        finally:
            self._turn.release()

    async def _ask(self, ask: bytes) -> Grammar | Wrong:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(ask + b"\n")
            line = await process.stdout.readline()
        except ConnectionError:
            pass
        finally:
            if not line.endswith(b"\n"):  # it died, or nobody waits any more: what it would say next is no answer to the next
                self._kill()
        if not line.endswith(b"\n"):
            raise EOFError
        answer: Grammar | Wrong = _decoder.decode(line)
        return answer

    async def _running(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is not None and process.stdout is not None and process.returncode is None and not process.stdout.at_eof():
            return process
        self._kill()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "epd.gateway.rehearsal"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_LINE_BYTES,
                env={**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise InternalError(f"the process that looks at forms of outputs cannot be started: {error}") from error
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def _in_short(tools: Tools) -> Tools:
    """Without what the model is told of them."""
    return replace(tools, described=(), callable=tuple(replace(tool, description={}) for tool in tools.callable))
