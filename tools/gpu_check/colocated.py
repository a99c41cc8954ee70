"""One actor that does all, to compare with: images, prompts and tokens of all requests on one stream, in steps that mix them.

An engine as others build them: chunked prefill in the same batch as decode (Sarathi-Serve, Agrawal et al. 2024), requests served
in order of arrival, images encoded between steps. It runs on the stages' own runners, pools and kernels, takes the options of
`epd serve` and speaks the same HTTP, so that what differs is that nothing is apart. It shares no prefixes and caches no images.

`python -m tools.gpu_check.colocated OPTIONS`, as `epd serve` takes them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import uvloop

from epd.clock import monotonic
from epd.cluster.build import budget_beside_decode
from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS, budget_lines
from epd.cluster.stack import Stack, open_stack
from epd.config import EngineConfig, ServeConfig, parse
from epd.errors import EpdError, PromptTooLong
from epd.finish import finish_reason
from epd.flights import Flights
from epd.gateway.detokenize import Detokenizer
from epd.gateway.prompt import Prompter
from epd.http.app import HttpServer
from epd.log import setup
from epd.model.config import ModelConfig, load_model_config
from epd.model.loader import resolve_model
from epd.model.positions import mrope_next, mrope_positions
from epd.request import Delta, GenerateRequest
from epd.step import PENDING, EmbeddingSpan, ImageInput, Int32Array, SampleRequest, SequenceStep, StepPlan
from epd.stream import on_stream
from epd.tokenizer import Tokenizer
from gpu.pool import PoolSpec
from protocol.messages import Token

ROLES = ("encode", "prefill", "decode")
_IMAGES_AT_ONCE = 64


@dataclass(slots=True, eq=False)
class Running:
    """One request, from its arrival to its last token."""

    request: GenerateRequest
    positions: Int32Array  # [3, prompt tokens]
    shift: int  # of the positions after the prompt against their places
    tokens: asyncio.Queue[Token | EpdError] = field(default_factory=asyncio.Queue)
    blocks: list[int] = field(default_factory=list)
    rows: dict[int, Any] = field(default_factory=dict)  # of its images' embeddings, by place; until the prompt is through
    is_encoded: bool = False
    num_scheduled: int = 0  # tokens whose KV is computed or being computed
    num_in_flight: int = 0  # steps that will draw a token of it
    output: list[int] = field(default_factory=list)
    has_left: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.request.token_ids)

    @property
    def is_prompt_through(self) -> bool:
        return self.num_scheduled >= self.num_prompt

    @property
    def num_drawn(self) -> int:
        """Tokens of the output that are known or being drawn."""
        return len(self.output) + self.num_in_flight


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """Of one step: who takes part, with how many tokens, and whether a token of theirs is drawn."""

    parts: tuple[tuple[Running, int, bool], ...]


def plan_step(running: Sequence[Running], engine: EngineConfig) -> MixedPlan:
    """A token for everybody whose prompt is through, then prompts in order of arrival as far as the budget goes, which beside
    tokens is the smaller one, as in epd's own prefill stage. Pure.
    """
    parts: list[tuple[Running, int, bool]] = []
    for each in running:
        if each.is_prompt_through and not each.has_left and each.num_drawn < each.request.sampling.max_tokens:
            parts.append((each, 1, True))
    budget = (min(engine.token_budget, engine.budget_beside_decode) if parts else engine.token_budget) - len(parts)
    for each in running:
        if each.has_left or each.is_prompt_through or not each.is_encoded or budget <= 0:
            continue
        count = min(budget, engine.max_chunk_tokens, each.num_prompt - each.num_scheduled)
        parts.append((each, count, each.num_scheduled + count == each.num_prompt))
        budget -= count
    return MixedPlan(tuple(parts))


class Colocated:
    """Implements `epd.gateway.engine.Engine`. `run` has to run beside it."""

    def __init__(self, config: ServeConfig, model: ModelConfig, tokenizer: Tokenizer, stack: Stack) -> None:
        sizes = stack.decide(ROLES)
        self._lines = budget_lines(sizes)
        stack.load(ROLES, lambda text: None)
        backend, block_format = stack.backend, stack.backend.block_format
        kv_layout = model.kv_layout(config.engine.block_size, block_format)
        kv = backend.allocate_pool(PoolSpec(sizes.num_kv_blocks, sizes.kv_block_bytes, "kv", kv_layout))
        spec = PoolSpec(
            sizes.num_embedding_blocks, sizes.embedding_block_bytes, "embedding", model.embedding_layout(block_format)
        )
        self._embeddings = backend.allocate_pool(spec)
        self._stream = stack.stage_stream("decode")
        self._preprocessing = backend.open_stream("preprocess")
        self._vision = stack.vision_runner(self._embeddings, self._stream, lambda text: None)
        text = stack.text_runner(kv, "decode", self._stream, lambda text: None)
        self._text = text
        self._engine = replace(config.engine, budget_beside_decode=budget_beside_decode(config, model))
        self._stack, self._tokenizer = stack, tokenizer
        self._merge = model.vision.merge_size if model.vision is not None else 1
        self._eos = frozenset(model.eos_token_ids)
        self.model_name = config.model_name
        self.max_model_len = min(
            config.engine.max_model_len or model.max_position_embeddings, model.max_position_embeddings, sizes.max_model_len
        )
        self.max_choices = config.admission.max_requests
        self._free = list(range(sizes.num_kv_blocks))
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._to_encode: deque[Running] = deque()
        self._encoding: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._flights: Flights[MixedPlan] = Flights(self._stream, text, wake=self._woken.set, clock=monotonic)

    # --- Engine -----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """One choice."""
        items = [image.item for image in request.images]
        running = Running(
            request,
            mrope_positions(len(request.token_ids), items, self._merge),
            mrope_next(0, items, self._merge),
            is_encoded=not items,
        )
        if self._num_blocks(running) > self._engine.block_size * len(self._free) and not self._running:
            raise PromptTooLong(f"{len(request.token_ids)} tokens and {request.sampling.max_tokens} do not fit the KV pool")
        self._waiting.append(running)
        self._woken.set()
        detokenizer = Detokenizer(self._tokenizer, request)
        try:
            while True:
                token = await running.tokens.get()
                if isinstance(token, EpdError):
                    raise token
                if (piece := detokenizer.feed(token)) is None:
                    continue
                yield Delta(0, piece.text, piece.num_tokens, piece.logprobs, piece.finish_reason)
                if piece.finish_reason:
                    return
        finally:
            running.has_left = True
            self._woken.set()

    def ready(self) -> tuple[bool, str]:
        return True, "ready"

    def cluster(self) -> dict[str, object]:
        return {"model": self.model_name, "num_running": len(self._running), "workers": []}

    def live(self, *, after_moment: int, after_revision: int) -> dict[str, object]:
        return self.cluster()

    def metrics(self) -> bytes:
        return b""

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._woken.clear()
            for landing in self._flights.landed():
                if isinstance(landing.output, Exception):
                    raise landing.output
                self._commit(landing.plan, landing.output.tokens)
            self._admit()
            self._encode()
            self._launch()
            await self._woken.wait()

    def close(self) -> None:
        self._text.close()
        self._vision.close()
        self._stack.close()

    def _num_blocks(self, running: Running) -> int:
        return -(-(running.num_prompt + running.request.sampling.max_tokens) // self._engine.block_size)

    def _admit(self) -> None:
        """In order of arrival, each with all the blocks that it will ever need; whoever has left gives his back."""
        for each in [each for each in self._running if each.has_left and not each.num_in_flight]:
            if each not in self._to_encode:
                self._running.remove(each)
                self._free += each.blocks
        while self._waiting and len(self._running) < self._engine.max_running:
            count = self._num_blocks(self._waiting[0])
            if count > len(self._free):
                return
            running = self._waiting.popleft()
            running.blocks, self._free = self._free[:count], self._free[count:]
            self._running.append(running)
            if not running.is_encoded:
                self._to_encode.append(running)

    def _launch(self) -> None:
        while len(self._flights) < self._stack.steps_in_flight:
            plan = plan_step(self._running, self._engine)
            if not plan.parts:
                return
            self._flights.launch(plan, self._describe)

    def _describe(self, plan: MixedPlan) -> StepPlan:
        sequences = []
        for running, count, samples in plan.parts:
            sequences.append(self._sequence(running, count, samples=samples))
            running.num_scheduled += count
            running.num_in_flight += samples
            if running.is_prompt_through:
                running.rows = {}  # the plan has what it needs of them
        return StepPlan(tuple(sequences))

    def _sequence(self, running: Running, count: int, *, samples: bool) -> SequenceStep:
        start, prompt = running.num_scheduled, running.request.token_ids
        if start >= len(prompt):
            place = start - len(prompt)
            token_ids = np.array([running.output[place] if place < len(running.output) else PENDING], np.int32)
            positions = np.full((3, 1), start + running.shift, np.int32)
        else:
            token_ids = np.array(prompt[start : start + count], np.int32)
            positions = np.ascontiguousarray(running.positions[:, start : start + count])
        output = np.array([*running.output, *[PENDING] * running.num_in_flight], np.int32)
        return SequenceStep(
            request_id=running.request.request_id,
            token_ids=token_ids,
            num_computed_tokens=start,
            positions=positions,
            block_table=np.array(running.blocks, np.int32),
            embeddings=_spans(running, start, start + count) if start < len(prompt) else (),
            sample=SampleRequest(running.request.sampling, np.array(prompt, np.int32), output) if samples else None,
        )

    def _commit(self, plan: MixedPlan, tokens: Sequence[Token | None]) -> None:
        for (running, _, samples), token in zip(plan.parts, tokens, strict=True):
            running.num_in_flight -= samples
            if token is None or running.has_left:
                continue
            running.output.append(token.token_id)
            reason = finish_reason(
                token.token_id,
                num_output=len(running.output),
                num_tokens=running.num_prompt + len(running.output),
                sampling=running.request.sampling,
                eos_token_ids=self._eos,
                max_model_len=self.max_model_len,
            )
            running.tokens.put_nowait(Token(token.token_id, reason, token.logprob, token.top_logprobs))
            running.has_left = bool(reason)

    # --- images -----------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        if self._to_encode and (self._encoding is None or self._encoding.done()):
            self._encoding = asyncio.create_task(self._encode_next(), name="encode")

    async def _encode_next(self) -> None:
        """All images of the request that waits longest, as many at a time as the pool holds, on the stream of the steps."""
        running = self._to_encode[0]
        try:
            images = list(enumerate(running.request.images))
            while images and not running.has_left:
                taken, images = self._take(images)
                inputs = [_input(image.item, image.data) for _, image in taken]
                patches = [await on_stream(self._preprocessing, self._vision.preprocess, each) for each in inputs]
                ids = _consecutive([_num_rows_blocks(each) for each in inputs])
                sums = await on_stream(self._stream, self._vision.encode_patches, patches, [each.grid for each in inputs], ids)
                for (place, _), each, block_ids, checksums in zip(taken, inputs, ids, sums, strict=True):
                    if isinstance(checksums, Exception):
                        raise checksums
                    running.rows[place] = (await self._rows(block_ids, checksums))[: each.num_tokens]
            running.is_encoded = True
        except EpdError as error:
            running.has_left = True
            running.tokens.put_nowait(error)
        finally:
            self._to_encode.popleft()
            self._woken.set()

    def _take(self, images: list[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
        """The first images that one step may encode; at least one."""
        blocks, patches, count = self._embeddings.num_blocks, self._engine.max_patches, 0
        for _, image in images[:_IMAGES_AT_ONCE]:
            item = image.item
            blocks -= -(-item.num_tokens // EMBEDDING_BLOCK_ROWS)
            patches -= item.grid_t * item.grid_h * item.grid_w
            if count and min(blocks, patches) < 0:
                break
            count += 1
        return images[:count], images[count:]

    async def _rows(self, block_ids: list[int], checksums: list[int]) -> Any:
        """Out of the pool, which the next images are written to."""
        scratch = self._stack.backend.allocate_scratch(len(block_ids), self._embeddings.block_bytes)
        await on_stream(self._stream, scratch.copy_from, self._embeddings, block_ids, range(len(block_ids)), checksums)
        return scratch.rows(self._stack.embedding_width)


def _spans(running: Running, start: int, end: int) -> tuple[EmbeddingSpan, ...]:
    spans = []
    for place, rows in sorted(running.rows.items()):
        item = running.request.images[place].item
        first, last = max(item.offset, start), min(item.offset + item.num_tokens, end)
        if first < last:
            spans.append(EmbeddingSpan(first - start, rows[first - item.offset : last - item.offset]))
    return tuple(spans)


def _input(item: Any, data: bytes) -> ImageInput:
    return ImageInput(item.mm_hash, data, (item.grid_t, item.grid_h, item.grid_w), item.num_tokens)


def _num_rows_blocks(image: ImageInput) -> int:
    return -(-image.num_tokens // EMBEDDING_BLOCK_ROWS)


def _consecutive(counts: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(counts).tolist()
    return [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]


async def serve(config: ServeConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set. Raises EpdError when it cannot start, and whatever a step fails with."""
    folder = resolve_model(config.model, weights=config.load_format != "dummy")
    model = load_model_config(folder)
    prompter = Prompter.from_folder(folder, model, max_model_len=lambda: engine.max_model_len)
    engine = Colocated(config, model, prompter.tokenizer, await asyncio.to_thread(open_stack, config, folder, model))
    http = HttpServer(config.http, engine, prompter, request_timeout_s=config.admission.request_timeout_s)
    await http.start()
    print(f"ready at {http.url}", flush=True)
    loop, stopped = asyncio.create_task(engine.run(), name="engine"), asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([loop, stopped], return_when=asyncio.FIRST_COMPLETED)
        if loop.done():
            loop.result()
    finally:
        loop.cancel()
        stopped.cancel()
        await asyncio.gather(loop, stopped, return_exceptions=True)
        await http.stop()
        await asyncio.to_thread(engine.close)


async def _main(config: ServeConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(config, stop)


if __name__ == "__main__":
    parsed = parse(["serve", *sys.argv[1:]])
    assert isinstance(parsed, ServeConfig)
    setup(parsed.log_level, worker="colocated")
    try:
        uvloop.run(_main(parsed))
    except EpdError as failure:
        sys.exit(f"colocated: {failure.message}")
