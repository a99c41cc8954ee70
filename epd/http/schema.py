"""What a client may ask: OpenAI's request bodies, checked to the last field.

A field is either served, or asks for nothing (its neutral value), or is refused by name; none is accepted and ignored. A few
fields describe the client to the provider and ask nothing of the output: `user`, `metadata`, `safety_identifier` and
`prompt_cache_key` are checked for their type and need no action here.

Knows names, types and ranges; `http/messages`, `http/tools` and `http/guide` know those of their fields. Does not know the
tokenizer or the engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd.errors import BadRequest, Unsupported
from epd.gateway.guide import Guide
from epd.gateway.tools import Tools
from epd.http.fields import Fields, shown
from epd.http.guide import parse_guide
from epd.http.messages import ImageSource, Limits, parse_messages
from epd.http.tools import parse_tools
from protocol.messages import Sampling

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TEMPLATE_OPTIONS = 16
DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's completions; a chat's output is as long as fits

_BIG = 2**31 - 1

# Values that ask for nothing, by field: an OpenAI client may send them, and leaving them out would be the same.
_NEUTRAL: Mapping[str, Sequence[object]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
_NEUTRAL_CHAT: Mapping[str, Sequence[object]] = {
    **_NEUTRAL,
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory",),
    "verbosity": ("medium",),
}
_NEUTRAL_COMPLETION: Mapping[str, Sequence[object]] = {
    **_NEUTRAL,
    "echo": (False,),
    "suffix": ("",),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What both endpoints have in common. `sampling.max_tokens` is still to be set: it depends on the prompt's length."""

    model: str
    sampling: Sampling
    max_tokens: int | None
    max_tokens_param: str
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    has_seed: bool
    guide: Guide | None  # still to be made into `sampling.guide`


@dataclass(frozen=True, slots=True)
class ChatCall:
    options: Options
    messages: tuple[dict[str, object], ...]  # as the chat template takes them
    images: tuple[ImageSource, ...]  # of the image parts, in order
    tools: Tools | None  # that the answer may call
    template_options: dict[str, object]


@dataclass(frozen=True, slots=True)
class CompletionCall:
    options: Options
    prompts: tuple[str | tuple[int, ...], ...]


def parse_chat(body: object, limits: Limits) -> ChatCall:
    """Check the body of /v1/chat/completions; raises BadRequest and Unsupported, which name the field."""
    fields = Fields(body)
    raw_messages = fields.require("messages", what="the conversation so far")
    wants_logprobs = fields.boolean("logprobs", False)
    num_top = fields.integer("top_logprobs", low=0, high=MAX_LOGPROBS, default=0)
    assert num_top is not None
    if num_top and not wants_logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    options = _options(fields, limits, num_logprobs=num_top if wants_logprobs else -1, is_chat=True)
    tools = parse_tools(fields)
    if tools is not None and tools.need_guide and options.sampling.ignore_eos:
        raise BadRequest("an answer that has to call a tool ends with the call: ignore_eos must be false", param="ignore_eos")
    template_options = _template_options(fields)
    fields.refuse_rest(_NEUTRAL_CHAT)
    messages, images = parse_messages(raw_messages, limits)
    return ChatCall(options, messages, images, tools, template_options)


def parse_completion(body: object, limits: Limits) -> CompletionCall:
    """Check the body of /v1/completions; raises BadRequest and Unsupported, which name the field."""
    fields = Fields(body)
    prompts = _prompts(fields.require("prompt", what="a string, token ids, or an array of these"))
    num_logprobs = fields.integer("logprobs", low=0, high=MAX_LOGPROBS, default=-1)
    assert num_logprobs is not None
    best_of = fields.integer("best_of", low=1, high=MAX_CHOICES)
    options = _options(fields, limits, num_logprobs=num_logprobs, is_chat=False)
    if best_of not in (None, options.n):
        raise Unsupported("best_of is not supported beyond the value of n", param="best_of")
    # Each prompt is let in by itself, so more than run at once would never all get in.
    most = min(MAX_CHOICES, limits.max_choices)
    if len(prompts) > 1 and options.n * len(prompts) > most:
        raise BadRequest(f"{len(prompts)} prompts with n = {options.n} are more than {most} choices", param="n")
    fields.refuse_rest(_NEUTRAL_COMPLETION)
    return CompletionCall(options, prompts)


# --- fields of both -------------------------------------------------------------------------------------------------


def _options(fields: Fields, limits: Limits, *, num_logprobs: int, is_chat: bool) -> Options:
    model = fields.require("model", what="the name of a served model, see /v1/models")
    if not isinstance(model, str):
        raise fields.wrong("model", "a string", model)
    max_tokens, max_tokens_param = _max_tokens(fields, is_chat=is_chat)
    stream = fields.boolean("stream", False)
    include_usage = _stream_options(fields, stream=stream)
    seed = fields.integer("seed", low=-(2**63), high=2**63 - 1)
    n = fields.integer("n", low=1, high=MAX_CHOICES, default=1)
    top_k = fields.integer("top_k", low=-1, high=_BIG, default=0)
    assert n is not None
    assert top_k is not None
    sampling = Sampling(
        temperature=fields.number("temperature", low=0, high=2, default=1.0),
        top_p=fields.number("top_p", low=0, high=1, default=1.0, above=True),
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", low=0, high=1, default=0.0),
        seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
        ignore_eos=fields.boolean("ignore_eos", False),
        num_logprobs=num_logprobs,
        presence_penalty=fields.number("presence_penalty", low=-2, high=2, default=0.0),
        frequency_penalty=fields.number("frequency_penalty", low=-2, high=2, default=0.0),
        repetition_penalty=fields.number("repetition_penalty", low=0.01, high=10, default=1.0),
        logit_bias=_logit_bias(fields, limits.vocab_size),
    )
    stop = _stop(fields)
    guide = parse_guide(fields, ignore_eos=sampling.ignore_eos)
    _needs_no_action(fields)
    return Options(model, sampling, max_tokens, max_tokens_param, n, stop, stream, include_usage, seed is not None, guide)


def _max_tokens(fields: Fields, *, is_chat: bool) -> tuple[int | None, str]:
    old = fields.integer("max_tokens", low=1, high=_BIG)
    if not is_chat:
        return (DEFAULT_COMPLETION_TOKENS if old is None else old), "max_tokens"
    new = fields.integer("max_completion_tokens", low=1, high=_BIG)
    if old is not None and new is not None and old != new:
        raise BadRequest(f"max_tokens is {old} and max_completion_tokens is {new}; send one of them", param="max_tokens")
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def _stream_options(fields: Fields, *, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    inner = Fields(value, "stream_options")
    if not stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    include_usage = inner.boolean("include_usage", False)
    inner.refuse_rest({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    return include_usage


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    stops = [stop for stop in values if isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS]
    if len(stops) < len(values) or len(stops) > MAX_STOPS:
        expected = f"a string or an array of up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters"
        raise BadRequest(f"stop must be {expected}", param="stop")
    return tuple(dict.fromkeys(stops))


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    value = fields.take("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise BadRequest(f"logit_bias must be an object of up to {MAX_LOGIT_BIAS} token ids with their bias", param="logit_bias")
    found = {}
    for name, bias in value.items():
        token_id = int(name) if name.isascii() and name.isdigit() and len(name) < 12 else -1
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"logit_bias: {shown(name)} is not a token id from 0 to {vocab_size - 1}", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise BadRequest(f"logit_bias: token {token_id} has {shown(bias)}, not a number from -100 to 100", param="logit_bias")
        found[token_id] = float(bias)
    return tuple(sorted(found.items()))


def _needs_no_action(fields: Fields) -> None:
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.string(name)
    metadata = fields.take("metadata")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise BadRequest("metadata must be an object of strings", param="metadata")


# --- prompts --------------------------------------------------------------------------------------------------------


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _are_token_ids(value):
            return (tuple(value),)
        if len(value) > MAX_PROMPTS:
            raise BadRequest(f"prompt holds {len(value)} prompts; at most {MAX_PROMPTS} are taken", param="prompt")
        if all(isinstance(item, str) or (isinstance(item, list) and item and _are_token_ids(item)) for item in value):
            return tuple(item if isinstance(item, str) else tuple(item) for item in value)
    raise BadRequest("prompt must be a string, a non-empty array of token ids, or an array of these", param="prompt")


def _are_token_ids(value: Sequence[object]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _BIG for item in value)


def _template_options(fields: Fields) -> dict[str, object]:
    """Switches of the model's chat template, such as Qwen3's `enable_thinking`: booleans only, so that no text gets in."""
    value = fields.take("chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_OPTIONS or not all(isinstance(v, bool) for v in value.values()):
        raise BadRequest(
            f"chat_template_kwargs must be an object of up to {MAX_TEMPLATE_OPTIONS} switches that are true or false",
            param="chat_template_kwargs",
        )
    return dict(value)
