"""Thirty-six requests that differ in everything a request can differ in, and a client that keeps what an answer says.

The prompts hold shapes and numbers, which the bundled model knows, but nothing here depends on what it says about them.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import aiohttp
from PIL import Image, ImageDraw

from tests.support.cluster import MODEL_NAME, WAIT_S, ClusterFailed

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
_ASK = ("What is in this image?", "How many shapes are there?", "What is at the top left?", "Describe each image.")


@dataclass(frozen=True)
class Case:
    """A request body for one of the two endpoints."""

    name: str
    body: dict[str, Any] = field(repr=False)
    route: str = "chat/completions"

    @property
    def is_greedy(self) -> bool:
        return bool(self.body["temperature"] == 0)


@dataclass(frozen=True)
class Choice:
    """What one choice says. `tokens` and `logprobs` are there where they were asked for."""

    text: str
    finish_reason: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...] = field(compare=False)


@dataclass(frozen=True)
class Said:
    """All of an answer that must not depend on who computed it, with whom, and how."""

    choices: tuple[Choice, ...]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = field(compare=False)


# --- prompts --------------------------------------------------------------------------------------------------------


@cache
def picture(number: int) -> bytes:
    """A PNG of a few shapes; every number gives another one, of another size."""
    width, height = 64 + 16 * (number % 3), 64 + 8 * (number % 2)
    image = Image.new("RGB", (width, height), (255, 255, 255 - number % 8))
    draw = ImageDraw.Draw(image)
    for place in range(1 + number % 3):
        left, top = (5, 37)[(number + place) % 2], (5, 37)[(number // 2 + place) % 2]
        box = (left, top, left + 22, top + 22)
        colour = COLOURS[(number * 7 + place) % len(COLOURS)]
        (draw.ellipse if (number + place) % 2 else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture(number))}}


def chat(text: str, images: Iterable[int] = (), **options: Any) -> dict[str, Any]:
    """The body of a greedy chat; `options` say otherwise."""
    parts = [*map(image_part, images), {"type": "text", "text": text}]
    return {"model": MODEL_NAME, "temperature": 0, "messages": [{"role": "user", "content": parts}], **options}


def counting(start: int, length: int) -> str:
    """A text of about six tokens per number."""
    return "I counted " + ", ".join(str(number) for number in range(start, start + length)) + ". Count on from there."


@cache
def cases() -> tuple[Case, ...]:
    """The mix: text and 1 to 3 images, short and long, greedy and seeded with every way to shape a draw, n, logprobs, stops."""
    found = [
        Case(f"text {number}", chat(f"Count from {number} to {number + 30}.", max_tokens=40 + number)) for number in range(3, 8)
    ]
    for number in range(4):
        found.append(Case(f"one image, {number}", chat(_ASK[number % 3], [number], max_tokens=24, ignore_eos=True)))
    found += [
        Case("two images", chat(_ASK[3], [4, 5], max_tokens=32, ignore_eos=True)),
        Case("two equal images", chat(_ASK[3], [6, 6], max_tokens=24)),
        Case("three images", chat(_ASK[3], [7, 8, 9], max_tokens=32, ignore_eos=True)),
        Case("an image after text", _interleaved()),
        Case("long", chat(counting(100, 120), max_tokens=32, ignore_eos=True)),
        Case("long, same start", chat(counting(100, 150), max_tokens=16, ignore_eos=True)),
        Case("long with an image at the end", _image_at_the_end()),
        Case("one token", chat("Hello", max_tokens=1)),
        Case("two tokens", chat("Hello", max_tokens=2, ignore_eos=True)),
        Case("greedy with logprobs", chat("Who are you?", max_tokens=12, logprobs=True, top_logprobs=5)),
        Case(
            "raw prompt", {"model": MODEL_NAME, "temperature": 0, "prompt": "one, two, three, ", "max_tokens": 24}, "completions"
        ),
        Case("stop string", chat("Count from 1 to 30.", max_tokens=60, stop=["12", "zzz"])),
        Case("bias", chat("Hello", max_tokens=16, logit_bias={"70": 4, "71": -100, "300": 2.5}, ignore_eos=True)),
    ]
    ways: Sequence[dict[str, Any]] = (
        {},
        {"temperature": 1.6},
        {"top_p": 0.7},
        {"top_k": 8},
        {"min_p": 0.05},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8, "top_p": 0.9},
        {"repetition_penalty": 1.3, "top_k": 40, "temperature": 1.3},
    )
    for number, way in enumerate(ways):
        options = {"temperature": 1.0, "seed": 1000 + number, "max_tokens": 30, "ignore_eos": True, "logprobs": True, **way}
        found.append(Case(f"seeded {way}", chat(_ASK[number % 3], [10 + number % 3] if number % 2 else (), **options)))
    options = {"temperature": 1.4, "seed": 7, "max_tokens": 16, "ignore_eos": True}
    found += [
        Case("three choices", chat("What do you see?", [13], n=3, logprobs=True, **options)),
        Case(
            "four prompts", {"model": MODEL_NAME, "prompt": ["1, 2", "a red", "I", "I"], "logprobs": 3, **options}, "completions"
        ),
        Case("a JSON schema", chat(_ASK[3], [17, 18], max_tokens=120, logprobs=True, response_format=json_of(SHAPES))),
        Case(
            "seeded, a JSON schema, two choices",
            chat(_ASK[0], [19], max_tokens=40, temperature=1.2, seed=5, n=2, response_format=json_of(SHAPES)),
        ),
        Case(
            "seeded, a regular expression",
            chat("Count.", max_tokens=60, temperature=1.5, seed=6, structured_outputs={"regex": "([0-9]{1,3}, ){9}[a-z]+"}),
        ),
        Case(
            "choices, a penalty",
            chat("Who?", max_tokens=30, repetition_penalty=1.2, structured_outputs={"choice": ["nobody", "not he, she", "no"]}),
        ),
    ]
    assert len(found) == 36, len(found)
    return tuple(found)


SHAPES = {
    "type": "object",
    "properties": {
        "shapes": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"colour": {"enum": list(COLOURS)}, "width": {"type": "integer", "minimum": 1, "maximum": 99}},
                "required": ["colour", "width"],
                "additionalProperties": False,
            },
        },
        "text": {"type": "string", "maxLength": 12},
    },
    "required": ["shapes", "text"],
    "additionalProperties": False,
}


def json_of(schema: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's `response_format` asks for it."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _interleaved() -> dict[str, Any]:
    parts = [
        {"type": "text", "text": "Here is one: "},
        image_part(14),
        {"type": "text", "text": " and here another: "},
        image_part(15),
        {"type": "text", "text": " What is in these images?"},
    ]
    messages = [{"role": "system", "content": "You describe images of shapes."}, {"role": "user", "content": parts}]
    return {"model": MODEL_NAME, "temperature": 0, "max_tokens": 24, "messages": messages}


def _image_at_the_end() -> dict[str, Any]:
    parts = [{"type": "text", "text": counting(500, 60)}, image_part(16)]
    return {
        "model": MODEL_NAME,
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": parts}],
    }


# --- asking ---------------------------------------------------------------------------------------------------------


def session(url: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=WAIT_S))


async def ask(client: aiohttp.ClientSession, case: Case) -> Said:
    async with client.post(f"/v1/{case.route}", json=case.body) as answer:
        body = await answer.json()
        if answer.status != 200:
            raise ClusterFailed(f"{case.name}: {answer.status} {body}")
    usage = body["usage"]
    return Said(
        choices=tuple(map(_choice, sorted(body["choices"], key=lambda choice: choice["index"]))),
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage["completion_tokens"],
        num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )


async def ask_one_by_one(url: str, wanted: Sequence[Case]) -> list[Said]:
    async with session(url) as client:
        return [await ask(client, case) for case in wanted]


async def ask_at_once(url: str, wanted: Sequence[Case]) -> list[Said]:
    async with session(url) as client:
        return list(await asyncio.gather(*(ask(client, case) for case in wanted)))


def _choice(choice: dict[str, Any]) -> Choice:
    logprobs = choice.get("logprobs") or {}
    if "message" in choice:
        items = logprobs.get("content") or []
        tokens, values = [item["token"] for item in items], [item["logprob"] for item in items]
        text = choice["message"]["content"]
    else:
        tokens, values, text = logprobs.get("tokens", []), logprobs.get("token_logprobs", []), choice["text"]
    return Choice(text, choice["finish_reason"], tuple(tokens), tuple(values))
