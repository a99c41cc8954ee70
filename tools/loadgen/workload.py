"""What is asked: chats with their prompts and images, drawn offline and reproducible. Pure: chat i is a function of (spec, i).

Owns the shape of the load (classes, images and how often they come back, lengths, turns, shared prefixes) and the bodies of the
requests. Knows nothing of time, of HTTP or of what the server makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from tools.loadgen.images import image_url
from tools.loadgen.lengths import Lengths
from tools.loadgen.mix import TEXT_ONLY, MixClass, pick
from tools.loadgen.trace import BLOCK_TOKENS, TraceEntry

# fmt: off
_WORDS = (
    "the", "a", "one", "each", "this", "that", "red", "green", "blue", "small", "large", "old", "new", "quick", "slow", "bright",
    "dark", "river", "mountain", "window", "garden", "letter", "engine", "paper", "number", "story", "market", "winter", "summer",
    "teacher", "doctor", "child", "friend", "city", "street", "music", "light", "water", "stone", "table", "house", "road",
    "bird", "finds", "makes", "takes", "gives", "sees", "holds", "turns", "opens", "moves", "follows", "over", "under", "near",
    "behind", "after", "before", "with", "without", "because", "while",
)
# fmt: on
PROMPT_WORDS, OUTPUT_TOKENS, ONE_TURN = Lengths(16, 64), Lengths(32, 32), Lengths(1, 1)  # unless something else is asked for
_IMAGES_PER_TURN = 1024  # image numbers are set apart by this


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file: a question, its images as data URLs, and the answer that is the only right one (None: any)."""

    text: str
    images: tuple[str, ...] = ()
    expect: str | None = None


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """The load. Where a trace or prompts are given, they say what is asked instead of `mix` and the lengths."""

    model: str = ""
    seed: int = 0
    mix: tuple[MixClass, ...] = TEXT_ONLY
    image_reuse: float = 0.0  # share of the images that are taken from a small set, so that an encoder cache can hit
    image_pool: int = 8  # size of that set, for each size of image
    image_format: str = "jpeg"
    image_prompt: str = "What is in this image?"
    prompt_words: Lengths = PROMPT_WORDS  # of a text request and of each later turn
    prefix_words: int = 0  # at the start of every text request, always the same, so that a prefix cache can hit
    output_tokens: Lengths = OUTPUT_TOKENS  # max_tokens of each request
    turns: Lengths = ONE_TURN  # of a chat; images are in its first turn
    think_s: float = 0.0  # mean of the exponentially distributed pause before each later turn
    ignore_eos: bool = False
    expect_length: bool = False  # an answer of another length than max_tokens is a failure; implied by ignore_eos
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()  # asked in turn
    trace: tuple[TraceEntry, ...] = ()  # chat i is entry i
    words_per_token: float = 1.0  # of the trace's prompts


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request, ready to send."""

    index: int  # of its chat
    body: bytes
    turn: int = 0
    kind: str = "text"  # the class's name
    num_images: int = 0
    expect_text: str | None = None
    expect_tokens: int | None = None  # any other length is a failure


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message, as the JSON of its content."""

    content: bytes
    max_tokens: int
    num_images: int = 0
    think_s: float = 0.0  # after the answer before
    expect: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """One or more turns; each request repeats all that was said before."""

    index: int
    kind: str
    turns: tuple[Turn, ...]
    options: bytes  # JSON of the fields that every request has, without the closing brace
    expects_length: bool = False

    def request(self, answers: Sequence[str] = ()) -> LoadRequest:
        """The next turn's request, after the turns whose `answers` are given."""
        number = len(answers)
        turn = self.turns[number]
        messages = []
        for before, answer in zip(self.turns, answers, strict=False):
            messages.append(b'{"role": "user", "content": %s}' % before.content)
            messages.append(b'{"role": "assistant", "content": %s}' % json.dumps(answer).encode())
        messages.append(b'{"role": "user", "content": %s}' % turn.content)
        return LoadRequest(
            index=self.index,
            body=b'%s, "messages": [%s], "max_tokens": %d}' % (self.options, b", ".join(messages), turn.max_tokens),
            turn=number,
            kind=self.kind,
            num_images=sum(each.num_images for each in self.turns[: number + 1]),
            expect_text=turn.expect,
            expect_tokens=turn.max_tokens if self.expects_length else None,
        )


def draw_chat(spec: WorkloadSpec, index: int) -> Chat:
    """Chat number `index` of the load; equal on every call."""
    rng = np.random.default_rng((spec.seed, 0xB2, index))
    if spec.trace:
        entry = spec.trace[index]
        kind = "trace"
        turns = [Turn(_json(_trace_text(spec, entry, rng)), entry.output_tokens)]
    elif spec.prompts:
        prompt = spec.prompts[index % len(spec.prompts)]
        kind = "prompt"
        turns = [
            Turn(_content(prompt.text, prompt.images), spec.output_tokens.draw(rng), len(prompt.images), expect=prompt.expect)
        ]
    else:
        drawn = pick(spec.mix, float(rng.random()))
        kind = drawn.name
        turns = [_first_turn(spec, drawn, index, rng)]
        for _ in range(spec.turns.draw(rng) - 1):
            content = _json(" ".join(_words(rng, spec.prompt_words.draw(rng))))
            think_s = float(rng.exponential(spec.think_s)) if spec.think_s else 0.0
            turns.append(Turn(content, spec.output_tokens.draw(rng), think_s=think_s))
    return Chat(index, kind, tuple(turns), _options(spec), spec.ignore_eos or spec.expect_length)


def read_prompts(lines: Sequence[str]) -> tuple[Prompt, ...]:
    """Prompts from JSON lines: {"prompt": str, "images": [data URL, ...]?, "expect": str?}.

    Raises:
        ValueError: a line is not such an object; the message names it.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompts.append(Prompt(text=str(entry["prompt"]), images=tuple(entry.get("images", ())), expect=entry.get("expect")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not a prompt: {error!r}") from error
    if not prompts:
        raise ValueError("there is no prompt in it")
    return tuple(prompts)


def _first_turn(spec: WorkloadSpec, drawn: MixClass, index: int, rng: np.random.Generator) -> Turn:
    if not drawn.num_images:
        text = " ".join([*_prefix(spec.seed, spec.prefix_words), *_words(rng, spec.prompt_words.draw(rng))])
        return Turn(_json(text), spec.output_tokens.draw(rng))
    urls = []
    for place in range(drawn.num_images):
        number = spec.image_pool + index * _IMAGES_PER_TURN + place
        if rng.random() < spec.image_reuse:
            number = int(rng.integers(spec.image_pool))
        urls.append(image_url(spec.seed, number, drawn.size, spec.image_format))
    return Turn(_content(spec.image_prompt, urls), spec.output_tokens.draw(rng), drawn.num_images)


def _trace_text(spec: WorkloadSpec, entry: TraceEntry, rng: np.random.Generator) -> str:
    """About as many tokens as the entry says: the blocks of its hash ids, cut to length, or else followed by words of its own."""
    count = max(1, round(entry.input_tokens * spec.words_per_token))
    block_words = max(1, round(BLOCK_TOKENS * spec.words_per_token))
    words: list[str] = []
    for hash_id in entry.hash_ids:
        if len(words) >= count:
            break
        words += _block(spec.seed, hash_id, block_words)
    words = words[:count]
    return " ".join([*words, *_words(rng, count - len(words))])


def _options(spec: WorkloadSpec) -> bytes:
    body: dict[str, Any] = {
        "model": spec.model,
        "temperature": spec.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if spec.ignore_eos:
        body["ignore_eos"] = True
    return _json(body | dict(spec.extra_body))[:-1]


def _content(text: str, urls: Sequence[str]) -> bytes:
    if not urls:
        return _json(text)
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return _json([*parts, {"type": "text", "text": text}])


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@lru_cache(maxsize=4)
def _prefix(seed: int, count: int) -> tuple[str, ...]:
    return tuple(_words(np.random.default_rng((seed, 0xC3)), count))


@lru_cache(maxsize=4096)
def _block(seed: int, hash_id: int, count: int) -> tuple[str, ...]:
    return tuple(_words(np.random.default_rng((seed, 0xC4, hash_id)), count))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [_WORDS[i] for i in rng.integers(0, len(_WORDS), count)]
