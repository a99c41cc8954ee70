"""Prefill and decode schedulers together: the same tokens, no leak, and everybody finishes, in whatever order things happen."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.messages import MMItem, Sampling
from tests.support.paged import an_item
from tests.support.scheduling import Cluster, Job, Sizes

PLACEHOLDER = 9


def a_prompt(*parts: int | tuple[str, int]) -> tuple[list[int], tuple[MMItem, ...]]:
    """Numbers are tokens; (name, n) is an image of n tokens."""
    token_ids: list[int] = []
    items: list[MMItem] = []
    for part in parts:
        if isinstance(part, int):
            token_ids.append(part)
        else:
            items.append(an_item(part[0], len(token_ids), part[1]))
            token_ids += [PLACEHOLDER] * part[1]
    return token_ids, tuple(items)


@st.composite
def prompts(draw: st.DrawFn, max_tokens: int) -> tuple[list[int], tuple[MMItem, ...]]:
    """Prompts that often share a beginning, with up to three images out of two."""
    parts: list[int | tuple[str, int]] = []
    if draw(st.booleans()):
        parts += [1, 2, 3, 4, 5]
    for _ in range(draw(st.integers(0, 3))):
        parts.append((draw(st.sampled_from("xy")), draw(st.integers(1, 6))))
        parts += [draw(st.integers(1, 2))] * draw(st.integers(0, 4))
    token_ids, items = a_prompt(*parts, draw(st.integers(1, 2)))
    token_ids += [draw(st.integers(1, 2))] * draw(st.integers(0, max(0, max_tokens - len(token_ids))))
    kept = tuple(item for item in items if item.offset + item.num_tokens <= max_tokens)
    return token_ids[:max_tokens], kept


class ClusterMachine(RuleBasedStateMachine):
    """Every move that any part could make next, in any order; at the end everything runs out and is compared."""

    is_shared = False

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        block_size = data.draw(st.sampled_from([1, 2, 4, 7]), "block_size")
        max_model_len = data.draw(st.integers(8, 40), "max_model_len")
        least = -(-max_model_len // block_size)
        self.sizes = Sizes(
            block_size=block_size,
            prefill_blocks=least + data.draw(st.integers(0, 2 * least), "more prefill blocks"),
            decode_blocks=least + data.draw(st.integers(0, least // 2), "more decode blocks"),
            max_model_len=max_model_len,
            token_budget=data.draw(st.integers(1, 24), "token_budget"),
            budget_beside_decode=data.draw(st.integers(1, 24), "budget_beside_decode"),
            max_chunk_tokens=data.draw(st.integers(1, 24), "max_chunk_tokens"),
            max_running=data.draw(st.integers(1, 4), "max_running"),
            num_ids=data.draw(st.sampled_from([5, 100]), "num_ids"),
            max_prefills_in_flight=data.draw(st.integers(1, 3), "max_prefills_in_flight"),
            max_decodes_in_flight=data.draw(st.integers(1, 2), "max_decodes_in_flight"),
            fails_without_token=data.draw(st.booleans(), "fails_without_token"),
            is_shared=self.is_shared,
            pair_cost=data.draw(st.sampled_from([0.0, 0.1, 10.0]), "pair_cost"),
        )
        self.cluster = Cluster(self.sizes)
        for _ in range(data.draw(st.integers(1, 6), "number of requests to begin with")):
            self.cluster.submit(*data.draw(prompts(max_model_len // 2)), Sampling(max_tokens=30, ignore_eos=True))

    def open_jobs(self) -> list[Job]:
        return [job for job in self.cluster.jobs.values() if not job.is_over]

    @precondition(lambda self: len(self.open_jobs()) < 8)
    @rule(data=st.data(), max_tokens=st.integers(1, 20), ignore_eos=st.booleans(), penalty=st.sampled_from([1.0, 1.0, 1.2]))
    def submit(self, data: st.DataObject, max_tokens: int, ignore_eos: bool, penalty: float) -> None:
        token_ids, items = data.draw(prompts(self.sizes.max_model_len - 1))
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=ignore_eos, repetition_penalty=penalty)
        self.cluster.submit(token_ids, items, sampling)

    @precondition(lambda self: self.cluster.jobs)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        """The same prompt, or the next turn of a conversation."""
        job = data.draw(st.sampled_from(sorted(self.cluster.jobs.values(), key=lambda job: job.request_id)))
        token_ids = (job.prompt + job.output)[: self.sizes.max_model_len - 1]
        if data.draw(st.booleans()) or len(token_ids) < len(job.prompt):
            token_ids = job.prompt
        self.cluster.submit(list(token_ids), job.items, job.sampling)

    @precondition(lambda self: any(job.missing for job in self.open_jobs()))
    @rule(data=st.data())
    def embedding(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.open_jobs() if job.missing]))
        self.cluster.embedding(job, data.draw(st.sampled_from(sorted(job.missing))))

    @rule()
    def reserve(self) -> None:
        self.cluster.reserve()

    @precondition(lambda self: self.open_jobs())
    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        self.cluster.pull(data.draw(st.sampled_from(self.open_jobs())))

    @rule()
    def plan_prefill(self) -> None:
        self.cluster.plan_prefill()

    @rule()
    def commit_prefill(self) -> None:
        self.cluster.commit_prefill()

    @rule()
    def plan_decode(self) -> None:
        self.cluster.plan_decode()

    @rule()
    def commit_decode(self) -> None:
        self.cluster.commit_decode()

    @rule(num_rounds=st.integers(1, 8), are_encoded=st.booleans())
    def go_on(self, num_rounds: int, are_encoded: bool) -> None:
        """Some of every move, and at the end as many steps of each kind in flight as there may be."""
        for job in self.open_jobs():
            for index in sorted(job.missing) if are_encoded else []:
                self.cluster.embedding(job, index)
        for _ in range(num_rounds):
            self.cluster.commit_prefill()
            self.cluster.commit_decode()
            self.cluster.reserve()
            for job in self.open_jobs():
                self.cluster.pull(job)
            while self.cluster.plan_prefill():
                pass
            while self.cluster.plan_decode():
                pass

    @precondition(lambda self: self.open_jobs())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.cluster.abort(data.draw(st.sampled_from(self.open_jobs())))

    def jobs_in_flight(self) -> list[Job]:
        chunks = [chunk.request.request_id for plan, _ in self.cluster.prefill_steps for chunk in plan.chunks]
        steps = [step.request.request_id for plan, _ in self.cluster.decode_steps for step in plan.steps]
        return [job for job in self.open_jobs() if job.request_id in (*chunks, *steps)]

    @precondition(lambda self: self.jobs_in_flight())
    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        self.cluster.abort(data.draw(st.sampled_from(self.jobs_in_flight())))

    @precondition(lambda self: self.jobs_in_flight() and self.cluster.num_retries < 4)
    @rule(data=st.data())
    def poison_in_flight(self, data: st.DataObject) -> None:
        """From now on every step that a request is in fails, until the request is blamed for it."""
        data.draw(st.sampled_from(self.jobs_in_flight())).is_poison = True

    @precondition(lambda self: self.open_jobs() and self.cluster.num_retries < 3)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        self.cluster.retry(data.draw(st.sampled_from(self.open_jobs())))

    @rule()
    def forget_caches(self) -> None:
        """As when others need all the room that there is, for a moment."""
        for pool in (self.cluster.prefill_pool, self.cluster.decode_pool):
            taken = pool.allocate(pool.num_free)
            assert taken is not None
            pool.free(taken)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check()

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        self.cluster.finish()
        for job in self.cluster.jobs.values():
            expected = self.cluster.expected(job)
            assert job.output == expected[: len(job.output)]
            assert job.is_aborted or job.output == expected


class SharedPoolMachine(ClusterMachine):
    is_shared = True


TestSeparatePools = ClusterMachine.TestCase
TestSeparatePools.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestSharedPool = SharedPoolMachine.TestCase
TestSharedPool.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("is_shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("token_budget", "num_in_flight"), [(3, 1), (3, 2), (16, 1), (16, 2), (200, 2)])
def test_many_requests_in_a_small_pool_all_finish_with_their_own_tokens(
    is_shared: bool, block_size: int, token_budget: int, num_in_flight: int
) -> None:
    least = -(-60 // block_size)
    cluster = Cluster(
        Sizes(
            block_size=block_size,
            prefill_blocks=least + least // 2,
            decode_blocks=least + least // 4,
            max_model_len=60,
            token_budget=token_budget,
            max_chunk_tokens=token_budget,
            num_ids=50,
            max_prefills_in_flight=num_in_flight,
            max_decodes_in_flight=num_in_flight,
            is_shared=is_shared,
        )
    )
    for number in range(24):
        text = list(range(100, 100 + 3 * (number % 7)))
        prompt, items = a_prompt(*text, ("x" if number % 2 else "y", 5), *[number] * (number % 9 + 1))
        cluster.submit(prompt, items, Sampling(max_tokens=5 + number, ignore_eos=True))
    cluster.finish()
    assert all(job.output == cluster.expected(job) for job in cluster.jobs.values())
    assert cluster.decode.num_preemptions > 0
    assert (cluster.num_ahead > 0) == (num_in_flight > 1)
    assert cluster.prefill_pool.cache_hits > 0 or block_size == 16  # where the few blocks never stay
