"""What a process that measures is told to do. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    opener: str  # "module:function" that makes of this order what parts are given, and the parts
    parts: Sequence[str]
    folder: str = ""  # the model's
    loads: Mapping[str, Any] = field(default_factory=dict)  # of figures.rig.Loads, where they differ from its own
    limits: Mapping[str, float] | None = None  # of figures.rig.Limits, once they are known
    device_uuid: str = ""
    seconds: float = 0.0  # that it has in all

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        return cls(**json.loads(text))
