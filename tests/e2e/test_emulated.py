"""A cluster of emulated devices says what the arithmetic says, whatever the topology, and needs neither torch nor a compiler."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest

from epd.emulated.tokens import FIRST_TOKEN, expected_tokens
from epd.gateway.prompt import Prompter
from epd.model.config import load_model_config
from epd.options import BUNDLED_MODEL
from tests.emulated.profiles import PROFILE
from tests.model.reference import png
from tests.support.cluster import ALL_ROLES, APART, MODEL_NAME, node_cluster

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "device.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    return f"emulated:{path}"


def _image(number: int) -> bytes | None:
    """Every third prompt has an image, every sixth the same one."""
    return png(np.random.default_rng(number % 6), 64, 64) if number % 3 == 0 else None


def _text(number: int) -> str:
    return "x" * (5 + 37 * number)


async def _said(url: str, number: int) -> str:
    parts: list[dict[str, Any]] = [{"type": "text", "text": _text(number)}]
    if (image := _image(number)) is not None:
        data = base64.b64encode(image).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "seed": number,
        "temperature": 1.0,
    }
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["choices"][0]["message"]["content"])


def _wanted(number: int) -> str:
    """Of the prompt that the gateway makes."""
    prompter = Prompter.from_folder(BUNDLED_MODEL, load_model_config(BUNDLED_MODEL), max_model_len=lambda: 4096)
    image = _image(number)
    parts = [{"type": "text", "text": _text(number)}]
    if image is not None:
        parts.insert(0, {"type": "image"})
    prompt = prompter.chat([{"role": "user", "content": parts}], [] if image is None else [image])
    items = [(each.item.offset, each.item.mm_hash, each.item.num_tokens) for each in prompt.images]
    ids = expected_tokens(prompt.token_ids, NUM_TOKENS, seed=number, images=items)
    return "".join(chr(ord("a") + token_id - FIRST_TOKEN) for token_id in ids)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ((ALL_ROLES,), ()),
        (APART, ("--max-chunk-tokens", "40")),
        (APART, ("--transfer", "socket")),
        (("gateway", "encode,prefill,decode", "encode,prefill,decode"), ("--block-size", "8")),
    ],
    ids=["one process", "apart", "apart over sockets", "two of everything"],
)
async def test_every_topology_says_what_is_expected(device: str, layout: Sequence[str], options: Sequence[str]) -> None:
    numbers = range(12)
    wanted = [_wanted(number) for number in numbers]
    assert len(set(wanted)) == len(wanted)
    async with node_cluster(layout, "--device", device, *options) as cluster:
        for _ in range(2):  # the second time from caches
            assert await asyncio.gather(*(_said(cluster.url, number) for number in numbers)) == wanted
        await cluster.idle()


def test_a_worker_of_emulated_devices_imports_neither_torch_nor_a_compiler(device: str) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from epd.cluster.build import load\n"
        "from epd.config import parse\n"
        "from epd.options import BUNDLED_MODEL\n"
        "from epd.model.config import load_model_config\n"
        f"config = parse(['serve', '--roles', 'encode,prefill,decode', '--device', {device!r}])\n"
        "load(config, BUNDLED_MODEL, load_model_config(BUNDLED_MODEL), lambda text: None).close()\n"
        "print(*sorted({'torch', 'numba', 'cupy', 'triton', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_an_emulated_device_needs_a_profile() -> None:
    command = [sys.executable, "-m", "epd", "serve", "--device", "emulated:/nowhere.json", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot read the device profile /nowhere.json" in done.stderr
