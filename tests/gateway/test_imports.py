from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numba", "transformers", "cupy", "llvmlite")


def test_the_endpoint_and_the_prompts_start_without_heavy_libraries() -> None:
    """A gateway is a process of its own: it must be up at once and small."""
    program = (
        "import sys, epd.cli, epd.cluster.node, epd.http.app, epd.gateway.prompt, epd.gateway.engine\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
