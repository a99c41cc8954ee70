from __future__ import annotations

from tools.bench.rows import Row


def run() -> list[Row]:
    raise RuntimeError("no peer to compare with")
