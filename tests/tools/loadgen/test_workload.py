from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from tools.loadgen.workload import Prompt, WorkloadSpec, draw_request, read_prompts


def body(spec: WorkloadSpec, index: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(draw_request(spec, index).body)
    return found


def image_urls(spec: WorkloadSpec, index: int) -> list[str]:
    content = body(spec, index)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"] if isinstance(content, list) else []


def test_a_request_is_a_function_of_the_spec_and_its_number() -> None:
    spec = WorkloadSpec(model="m", image_share=0.5, images_per_request=(1, 3))
    assert [draw_request(spec, i) for i in range(20)] == [draw_request(spec, i) for i in range(20)]
    assert body(spec, 0) != body(WorkloadSpec(model="m", image_share=0.5, images_per_request=(1, 3), seed=1), 0)
    assert len({draw_request(spec, i).body for i in range(20)}) == 20


def test_what_a_text_request_says() -> None:
    spec = WorkloadSpec(
        model="m", prompt_words=(3, 5), prefix_words=4, max_tokens=(7, 9), ignore_eos=True, extra_body={"top_k": 5}
    )
    requests = [(draw_request(spec, i), body(spec, i)) for i in range(30)]
    prompts = [asked["messages"][0]["content"].split() for _, asked in requests]
    assert {len(words) for words in prompts} == {7, 8, 9}
    assert len({tuple(words[:4]) for words in prompts}) == 1
    assert {asked["max_tokens"] for _, asked in requests} == {7, 8, 9}
    for request, asked in requests:
        assert request.expect_tokens == asked["max_tokens"]
        assert request.num_images == 0
        assert asked["stream"] is True
        assert asked["stream_options"] == {"include_usage": True}
        assert (asked["model"], asked["ignore_eos"], asked["top_k"], asked["temperature"]) == ("m", True, 5, 0.0)


def test_a_length_can_be_expected_without_asking_for_it() -> None:
    request = draw_request(WorkloadSpec(model="m", max_tokens=(7, 7), expect_length=True), 0)
    assert request.expect_tokens == 7
    assert "ignore_eos" not in json.loads(request.body)
    assert draw_request(WorkloadSpec(model="m"), 0).expect_tokens is None


def test_the_mix_of_images() -> None:
    spec = WorkloadSpec(model="m", image_share=0.4, images_per_request=(2, 3), image_sizes=((40, 20), (16, 24)))
    counts = [draw_request(spec, i).num_images for i in range(300)]
    assert set(counts) == {0, 2, 3}
    assert sum(count > 0 for count in counts) / 300 == pytest.approx(0.4, abs=0.08)
    urls = [url for i in range(60) for url in image_urls(spec, i)]
    assert len(set(urls)) == len(urls), "two drawn images are equal"
    sizes = set()
    for url in urls:
        prefix, _, data = url.partition(",")
        assert prefix == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            sizes.add(image.size)
    assert sizes == {(40, 20), (16, 24)}


def test_images_come_back_as_often_as_asked() -> None:
    spec = WorkloadSpec(model="m", image_share=1.0, image_repeat_share=0.5, num_repeated_images=3)
    urls = [url for i in range(200) for url in image_urls(spec, i)]
    often = [url for url in set(urls) if urls.count(url) > 1]
    assert len(often) == 3
    assert sum(urls.count(url) for url in often) / len(urls) == pytest.approx(0.5, abs=0.1)


def test_jpeg() -> None:
    (url,) = image_urls(WorkloadSpec(model="m", image_share=1.0, image_format="jpeg"), 0)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.format == "JPEG"


def test_prompts_of_a_file_are_asked_in_turn() -> None:
    lines = ['{"prompt": "a", "expect": "b"}', "", '{"prompt": "c", "images": ["data:image/png;base64,eA=="]}']
    prompts = read_prompts(lines)
    assert prompts == (Prompt("a", (), "b"), Prompt("c", ("data:image/png;base64,eA==",), None))
    spec = WorkloadSpec(model="m", prompts=prompts)
    assert body(spec, 2)["messages"][0]["content"] == "a"
    assert draw_request(spec, 2).expect_text == "b"
    assert draw_request(spec, 3).num_images == 1


@pytest.mark.parametrize(
    ("lines", "match"), [(['{"prompt": "a"}', "nope"], "line 2"), (["{}"], "line 1"), (["[]"], "line 1"), ([""], "no prompt")]
)
def test_a_file_that_holds_no_prompts(lines: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_prompts(lines)
