"""What the topologies are asked: kinds of requests, and the promise that each is held to. Pure; nothing that costs the host much.

Images have the right size and next to no bytes: a 1-bit PNG that is all black, told apart by a comment in it, so that no cache
hits. An emulated device does not look into them, and a host that decoded real ones would be what is measured.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from tools.loadgen.slo import Slo
from tools.loadgen.stream import Record
from tools.loadgen.workload import Chat, Turn

_OPTIONS = (
    b'{"model": "emulated", "temperature": 0.0, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true'
)
FULL_HD = (1920, 1080)


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    weight: float = 1.0
    text_tokens: int = 50  # one byte each
    num_images: int = 0
    size: tuple[int, int] = FULL_HD
    patience_s: float = 0.0  # that a prompt of this length adds to the promised TTFT


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    kinds: tuple[Kind, ...]
    sessions: int  # users at once, each of whom asks again when answered: the load under which everybody is compared
    output_tokens: int = 64

    def notation(self) -> str:
        """As `epd plan --workload` reads it."""
        return " + ".join(
            f"text={kind.text_tokens},{f'images={kind.num_images}x{kind.size[0]}x{kind.size[1]},' if kind.num_images else ''}"
            f"output={self.output_tokens},weight={kind.weight:g}"
            for kind in self.kinds
        )

    def promise(self, usual: Promise) -> Promise:
        """What its users are promised."""
        return replace(usual, patience_s={kind.name: kind.patience_s for kind in self.kinds})

    def chat(self, index: int, seed: int = 0) -> Chat:
        """Number `index`; equal for equal numbers, and no two share a prefix or an image."""
        kind = self.kinds[0]
        if len(self.kinds) > 1:
            weights = np.array([each.weight for each in self.kinds])
            kind = self.kinds[int(np.random.default_rng((seed, index)).choice(len(weights), p=weights / weights.sum()))]
        text = f"{seed} {index} ".ljust(kind.text_tokens, "x")
        content: object = text
        if kind.num_images:
            urls = [_data_url(kind.size, f"{seed}.{index}.{place}") for place in range(kind.num_images)]
            content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
        return Chat(index, kind.name, (Turn(json.dumps(content).encode(), self.output_tokens, kind.num_images),), _OPTIONS, True)


@dataclass(frozen=True, slots=True)
class Promise:
    """TTFT of at most `ttft_s` and so much more for each image or a long prompt, and a mean time per further token."""

    ttft_s: float = 1.0
    per_image_s: float = 0.25
    tpot_s: float = 0.040
    patience_s: Mapping[str, float] = field(default_factory=dict)  # by name of the kind

    def ttft_of(self, kind: str, num_images: int) -> float:
        return self.ttft_s + self.per_image_s * num_images + self.patience_s.get(kind, 0.0)

    def holds(self, record: Record, slow: float) -> bool:
        """Of a request that succeeded, or that was cut off after its first token."""
        slo = Slo(ttft=slow * self.ttft_of(record.kind, record.num_images), tpot=slow * self.tpot_s)
        return slo.holds(record)

    def __str__(self) -> str:
        more = f" + {self.per_image_s:g} s per image" if self.per_image_s else ""
        return f"TTFT {self.ttft_s:g} s{more}, {1e3 * self.tpot_s:g} ms per further token"


_TEXT = Kind("text", text_tokens=2000)
_ONE, _FOUR, _EIGHT = (Kind(f"{number} image{'s' * (number > 1)}", num_images=number) for number in (1, 4, 8))
_MIXED = (replace(_TEXT, weight=50), replace(_ONE, weight=30), replace(_FOUR, weight=15), replace(_EIGHT, weight=5))
_BOOK = Kind("book", weight=5, text_tokens=32_000, patience_s=3.0)
WORKLOADS = {
    each.name: each
    for each in (
        # crowds: every device is busy all the time, whoever it works for
        Workload("text", (_TEXT,), 160),
        Workload("1 image", (_ONE,), 128),
        Workload("4 images", (_FOUR,), 48),
        Workload("8 images", (_EIGHT,), 32),
        Workload("mixed", _MIXED, 96),
        # a few: as much as a service is given that is to answer soon
        Workload("quiet 4 images", (_FOUR,), 8),
        Workload("quiet 8 images", (_EIGHT,), 6),
        Workload("quiet mixed", _MIXED, 16),
        # a few whole books among chats: whoever decodes or waits beside one
        Workload("long prompts", (replace(_TEXT, text_tokens=500, weight=95), _BOOK), 16),
    )
}


def _data_url(size: tuple[int, int], name: str) -> str:
    head, tail = _black(size)
    return "data:image/png;base64," + base64.b64encode(head + _chunk(b"tEXt", b"Comment\0" + name.encode()) + tail).decode()


@lru_cache
def _black(size: tuple[int, int]) -> tuple[bytes, bytes]:
    """A PNG's beginning and end, with room for another chunk between."""
    width, height = size
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header), _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
