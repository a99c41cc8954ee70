"""How the tokens of one prefill step are shared among the requests that can run.

Half of every budget belongs to the oldest, all that is left goes by least work left: short prompts pass long ones, and no prompt
makes less than half of the speed that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from epd.prefill.request import PrefillChunk, PrefillRequest


def share_budget(
    runnable: Sequence[PrefillRequest], *, token_budget: int, max_chunk_tokens: int, max_running: int, block_size: int
) -> tuple[PrefillChunk, ...]:
    """Chunks of at most `max_chunk_tokens` each and `token_budget` together, of at most `max_running` requests."""
    if not runnable:
        return ()
    ends: dict[PrefillRequest, int] = {}

    def extend(request: PrefillRequest, room: int) -> int:
        """Move a request's end of chunk by at most `room` tokens; returns by how many."""
        start = request.num_scheduled_tokens
        before = ends.get(request, start)
        goal = min(request.runnable_until(start), start + max_chunk_tokens)
        end = min(goal, before + room)
        if end < request.runnable_until(start):
            # Cut on a block boundary, so that chunks hand over whole blocks. Only a step's first chunk may be smaller than that.
            aligned = end - end % block_size
            if aligned > before:
                end = aligned
            elif ends and before + room < goal:
                end = before
        if end > before:
            ends[request] = end
        return end - before

    left = token_budget
    left -= extend(min(runnable, key=lambda request: request.order), (left + 1) // 2)
    for request in sorted(runnable, key=lambda request: (request.num_tokens - request.num_scheduled_tokens, request.order)):
        if left and (request in ends or len(ends) < max_running):
            left -= extend(request, left)
    return tuple(
        PrefillChunk(request, request.num_scheduled_tokens, end - request.num_scheduled_tokens, end == request.num_tokens)
        for request, end in ends.items()
    )
