from __future__ import annotations

import base64
import io
import json

from PIL import Image

from epd.sizing.command import QWEN3_VL
from epd.sizing.workload import parse_workload
from tools.article.workloads import WORKLOADS, Kind, Workload

TWO = Workload("two", (Kind("two", num_images=2, size=(1920, 1080)),), 1)


def urls(workload: Workload, index: int) -> list[str]:
    (message,) = json.loads(workload.chat(index).request().body)["messages"]
    return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]


def test_images_are_small_files_of_the_right_size_and_no_two_alike() -> None:
    found = urls(TWO, 0) + urls(TWO, 1)
    assert len(set(found)) == 4
    for url in found:
        data = base64.b64decode(url.partition(",")[2])
        assert len(data) < 2000
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (1920, 1080)
            image.load()


def test_chats_are_reproducible_and_share_no_prefix() -> None:
    text = WORKLOADS["text"]
    bodies = [text.chat(index, seed=3).request().body for index in (1, 1, 2)]
    assert bodies[0] == bodies[1] != bodies[2]
    contents = [json.loads(body)["messages"][0]["content"] for body in bodies]
    assert len(contents[0]) == 2000
    assert contents[0][:8] != contents[2][:8]


def test_a_mix_has_its_kinds_by_their_weights() -> None:
    mixed = WORKLOADS["mixed"]
    kinds = [mixed.chat(index).kind for index in range(400)]
    assert {kind.name for kind in mixed.kinds} == set(kinds)
    assert 160 < kinds.count("text") < 240


def test_plans_read_the_same_workloads() -> None:
    for workload in WORKLOADS.values():
        found = parse_workload(workload.notation(), QWEN3_VL)
        assert [len(kind.patches) for kind in found.kinds] == [kind.num_images for kind in workload.kinds]
        assert all(kind.output_tokens == 64 for kind in found.kinds)
