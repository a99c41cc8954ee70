from __future__ import annotations

from tools.bench.rows import Row, make_row


def run() -> list[Row]:
    return [make_row("speed", 3.0, "GB/s", baseline=2.0, bar=">=2"), make_row("size", 1.0, "MiB")]
