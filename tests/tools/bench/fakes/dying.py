from __future__ import annotations

import os

from tools.bench.rows import Row


def run() -> list[Row]:
    os._exit(3)
