"""How long a prefill step is, and how that is shared among the requests that can run.

A budget is given in tokens and means the time that so many take at the beginning of a prompt, and a quarter more: deep in a long
one, where every token attends to many, a step has fewer (`epd.chunking`). So whoever waits for a step to end, to decode or to be
prefilled, waits about equally long whatever prompts are there.

Half of every budget belongs to the oldest, all that is left goes by least work left: short prompts pass long ones, and no prompt
makes less than half of the speed that it would have alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from epd.chunking import ChunkCost, StepCosts, num_pairs
from epd.prefill.config import PrefillConfig
from epd.prefill.request import PrefillChunk, PrefillPlan, PrefillRequest


class StepBudget:
    """The budget of a worker's prefill steps. It learns what they cost from those that come back."""

    def __init__(self, config: PrefillConfig) -> None:
        self._config = config
        self._costs = StepCosts(config.pair_cost)

    def took(self, plan: PrefillPlan, seconds: float) -> None:
        """A step has come back after so long on its device."""
        pairs = sum(num_pairs(chunk.start, chunk.num_new) for chunk in plan.chunks)
        self._costs.observe(plan.num_tokens, pairs, seconds)

    def share(self, runnable: Sequence[PrefillRequest], *, beside_decode: bool) -> tuple[PrefillChunk, ...]:
        """Chunks of the next step."""
        if not runnable:
            return ()
        tokens = self._config.token_budget
        if beside_decode:
            tokens = min(tokens, self._config.budget_beside_decode)
        step = _Step(self._config, self._costs.chunk, tokens)
        step.extend(min(runnable, key=lambda request: request.order), share=0.5)
        for request in sorted(runnable, key=lambda request: (request.num_tokens - request.num_scheduled_tokens, request.order)):
            step.extend(request)
        return step.chunks()


class _Step:
    """A step being filled."""

    def __init__(self, config: PrefillConfig, cost: ChunkCost, tokens: int) -> None:
        self._config = config
        self._cost = cost
        self._tokens_left = tokens
        self._work_left = cost.budget(tokens)
        self._ends: dict[PrefillRequest, int] = {}

    def extend(self, request: PrefillRequest, share: float = 1.0) -> None:
        """Move the end of a request's chunk as far as a share of what is left goes."""
        if not self._tokens_left or (request not in self._ends and len(self._ends) == self._config.max_running):
            return
        start = request.num_scheduled_tokens
        before = self._ends.get(request, start)
        goal = min(request.runnable_until(start), start + self._config.max_chunk_tokens)
        is_first = request is next(iter(self._ends), request)
        room = self._cost.num_tokens(before, max(0.0, self._work_left) * share)
        if is_first:  # however deep in a prompt: it moves
            room = max(room, self._config.block_size - (before - start))
        end = min(goal, before + min(room, math.ceil(self._tokens_left * share)))
        if end < request.runnable_until(start):
            # Cut on a block boundary, so that chunks hand over whole blocks; but not where much of the first were lost.
            aligned = end - end % self._config.block_size
            if is_first:
                end = aligned if 3 * (end - aligned) <= end - start else end
            elif aligned > before or end < goal:
                end = max(before, aligned)
        if end > before:
            self._ends[request] = end
            self._tokens_left -= end - before
            self._work_left -= self._cost.work(before, end - before)

    def chunks(self) -> tuple[PrefillChunk, ...]:
        return tuple(
            PrefillChunk(request, request.num_scheduled_tokens, end - request.num_scheduled_tokens, end == request.num_tokens)
            for request, end in self._ends.items()
        )
