"""The OpenAI routes: from the bytes of a request to an `Answer`, and the model list."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
from aiohttp import web

from epd.config import HttpConfig
from epd.errors import BadRequest, BodyTooLarge, UnknownModel
from epd.gateway.engine import Engine
from epd.gateway.grammars import Grammars
from epd.gateway.guide import after_thoughts
from epd.gateway.prompt import Prompt, Prompter
from epd.gateway.speech import Speech, Thinking
from epd.gateway.tools import Tools
from epd.http.answer import Answer
from epd.http.chunks import ChatFormat, CompletionFormat, Format, Identity
from epd.http.errors import BodyTimeout, WrongContentType
from epd.http.images import ImageFetcher
from epd.http.messages import Limits
from epd.http.schema import ChatCall, CompletionCall, Options, parse_chat, parse_completion
from epd.request import GenerateRequest
from epd.timeline import Timeline
from protocol.messages import RequestId

TIMELINE_HEADER = "x-epd-timeline"
MAX_TRACE_CHARS = 512  # of a trace header; the standard asks for as much
BODY_TIMEOUT_S = 60.0  # for a client to send its request
MAX_VALUES = 1_000_000  # in a body, with the commas of its texts: a long document, or prompts of so many token ids
# Work on a body of up to this size is done at once; on a larger one in a thread, so that running streams do not wait for it.
_INLINE_BYTES = 8 * 2**10

_COUNTED_BYTES = 2**20  # at once

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the endpoint waits for whom, in seconds."""

    request_timeout_s: float  # from admission to the last token
    patience_s: float
    keep_alive_s: float


@dataclass(frozen=True, slots=True)
class _Arrival:
    """How a request came: its time from then on, and the trace that its client has begun (W3C trace context)."""

    timeline: Timeline
    wants_timeline: bool
    traceparent: str
    tracestate: str


class OpenAIRoutes:
    """Handlers of /v1/chat/completions, /v1/completions and /v1/models."""

    def __init__(
        self,
        config: HttpConfig,
        engine: Engine,
        prompter: Prompter,
        images: ImageFetcher,
        *,
        timing: Timing,
        fingerprint: str,
    ) -> None:
        self._config = config
        self._engine = engine
        self._prompter = prompter
        self._images = images
        self._timing = timing
        self._fingerprint = fingerprint
        self._limits = Limits(
            vocab_size=prompter.config.text.vocab_size,
            max_images=config.max_images,
            max_choices=engine.max_choices,
            takes_images=prompter.takes_images,
        )
        self._started = int(time.time())
        self._grammars = Grammars()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prompt")

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self._grammars.close()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        arrival = _arrival(request)
        data = await read_body(request, self._config.max_body_bytes)
        call = await self._run(len(data), lambda: parse_chat(parse_json(data), self._limits))
        self._check_model(call.options.model)
        answer = await self._chat_answer(call, len(data), arrival)
        return await self._reply(request, answer, stream=call.options.stream)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        arrival = _arrival(request)
        data = await read_body(request, self._config.max_body_bytes)
        call = await self._run(len(data), lambda: parse_completion(parse_json(data), self._limits))
        self._check_model(call.options.model)
        answer = await self._completion_answer(call, len(data), arrival)
        return await self._reply(request, answer, stream=call.options.stream)

    async def models(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return json_response(self._model())

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _chat_answer(self, call: ChatCall, size: int, arrival: _Arrival) -> Answer:
        tools = call.tools
        options = await self._guided(call.options, tools)
        with _timed(arrival.timeline, "fetch"):
            images = await self._fetch(call)
        size += sum(map(len, images))
        with _timed(arrival.timeline, "tokenize"):
            prompt = await self._run(
                size,
                lambda: self._prompter.chat(
                    call.messages,
                    images,
                    call.template_options,
                    [] if tools is None else [tool.description for tool in tools.described],
                    max_image_pixels=self._config.max_image_pixels,
                ),
            )
        thinking = prompt.thinking
        sampling = msgspec.structs.replace(options.sampling, guide=after_thoughts(options.sampling.guide, thinking))
        identity = self._identity("chatcmpl")
        form = ChatFormat(
            identity,
            include_usage=options.include_usage,
            wants_logprobs=sampling.num_logprobs >= 0,
            speech=None
            if tools is None and thinking is Thinking.NONE
            else lambda: Speech(thinking=thinking, can_call=tools is not None),
        )
        return self._answer(identity, [prompt], replace(options, sampling=sampling), form, arrival)

    async def _completion_answer(self, call: CompletionCall, size: int, arrival: _Arrival) -> Answer:
        options = await self._guided(call.options, None)
        with _timed(arrival.timeline, "tokenize"):
            prompts = await self._run(size, lambda: [self._prompter.completion(prompt) for prompt in call.prompts])
        identity = self._identity("cmpl")
        form = CompletionFormat(identity, include_usage=options.include_usage, num_logprobs=options.sampling.num_logprobs)
        return self._answer(identity, prompts, options, form, arrival)

    async def _guided(self, options: Options, tools: Tools | None) -> Options:
        """With the grammar of what was asked for."""
        grammar = await self._grammars.grammar(options.guide, tools)
        return replace(options, sampling=msgspec.structs.replace(options.sampling, guide=grammar))

    def _answer(self, identity: Identity, prompts: list[Prompt], options: Options, form: Format, arrival: _Arrival) -> Answer:
        requests = [
            self._generate_request(f"{identity.id}-{number}", prompt, options, number, arrival)
            for number, prompt in enumerate(prompts)
        ]
        return Answer(requests, form, options.include_usage, arrival.timeline if arrival.wants_timeline else None)

    def _generate_request(
        self, request_id: str, prompt: Prompt, options: Options, number: int, arrival: _Arrival
    ) -> GenerateRequest:
        max_tokens = self._prompter.max_tokens(prompt, options.max_tokens, param=options.max_tokens_param)
        sampling = msgspec.structs.replace(
            options.sampling,
            max_tokens=max_tokens,
            stop_token_ids=() if options.sampling.ignore_eos else self._prompter.config.eos_token_ids,
            # Prompts of one request draw differently, unless the client gave the seed.
            seed=options.sampling.seed if options.has_seed else (options.sampling.seed + number) & (2**63 - 1),
        )
        return GenerateRequest(
            request_id=RequestId(request_id),
            token_ids=prompt.token_ids,
            images=prompt.images,
            sampling=sampling,
            n=options.n,
            stop=options.stop,
            deadline_s=self._timing.request_timeout_s,
            # A client that asks for the timeline gets that of all its prompts together.
            timeline=arrival.timeline if arrival.wants_timeline else arrival.timeline.fork(),
            traceparent=arrival.traceparent,
            tracestate=arrival.tracestate,
        )

    async def _reply(self, request: web.Request, answer: Answer, *, stream: bool) -> web.StreamResponse:
        if stream:
            timing = self._timing
            return await answer.stream(self._engine, request, patience_s=timing.patience_s, keep_alive_s=timing.keep_alive_s)
        return web.Response(body=await answer.whole(self._engine), content_type="application/json")

    async def _fetch(self, call: ChatCall) -> list[bytes]:
        if not call.images:
            return []
        tasks = [asyncio.ensure_future(self._images.fetch(source)) for source in call.images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    # --- help -------------------------------------------------------------------------------------------------------

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= _INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _check_model(self, name: str) -> None:
        if name != self._engine.model_name:
            raise UnknownModel(f"the model {name[:100]!r} is not served here; served is {self._engine.model_name!r}")

    def _identity(self, prefix: str) -> Identity:
        return Identity(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self._engine.model_name, self._fingerprint)

    def _model(self) -> dict[str, object]:
        return {
            "id": self._engine.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "epd",
            "max_model_len": self._prompter.max_model_len,
        }


def _arrival(request: web.Request) -> _Arrival:
    """With the header `x-epd-timeline: 1`, the answer ends with how the request's time went, stage by stage."""
    wanted = request.headers.get(TIMELINE_HEADER, "0")
    if wanted not in ("0", "1"):
        raise BadRequest(f"the header {TIMELINE_HEADER} must be 0 or 1, not {wanted[:20]!r}", param=TIMELINE_HEADER)
    traceparent, tracestate = (request.headers.get(name, "") for name in ("traceparent", "tracestate"))
    return _Arrival(Timeline(), wanted == "1", traceparent[:MAX_TRACE_CHARS], tracestate[:MAX_TRACE_CHARS])


@contextmanager
def _timed(timeline: Timeline, name: str) -> Iterator[None]:
    began_s = timeline.now()
    yield
    timeline.add(name, "http", began_s)


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The whole body of a JSON request; raises WrongContentType, BodyTooLarge, BodyTimeout."""
    if request.content_type != "application/json":
        raise WrongContentType(f"Content-Type must be application/json, not {request.content_type}")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise WrongContentType("a compressed request body is not taken")
    too_large = BodyTooLarge(f"the request body is larger than {max_bytes} bytes")
    if request.content_length is not None and request.content_length > max_bytes:
        raise too_large
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise BodyTimeout(f"the request did not arrive within {BODY_TIMEOUT_S:g} s") from None


def parse_json(data: bytes) -> object:
    """Raises BadRequest where it is none, or holds more values than anybody needs: the loop stands still while it is read."""
    if _holds_many_values(data):
        raise BadRequest(f"the request body holds more than {MAX_VALUES} values")
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from None


def _holds_many_values(data: bytes) -> bool:
    """By what stands before each; as soon as it is clear, since counting many takes a while as well."""
    found = 0
    for start in range(0, len(data), _COUNTED_BYTES):
        piece = data[start : start + _COUNTED_BYTES]
        found += sum(map(piece.count, (b",", b"[", b"{")))
        if found > MAX_VALUES:
            return True
    return False


def json_response(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
