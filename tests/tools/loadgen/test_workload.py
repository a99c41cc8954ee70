from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from tools.loadgen.images import draw_image
from tools.loadgen.lengths import Lengths
from tools.loadgen.mix import parse_mix
from tools.loadgen.trace import TraceEntry
from tools.loadgen.workload import Prompt, WorkloadSpec, draw_chat, read_prompts


def body(spec: WorkloadSpec, index: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(draw_chat(spec, index).request().body)
    return found


def text(spec: WorkloadSpec, index: int) -> str:
    content = body(spec, index)["messages"][0]["content"]
    assert isinstance(content, str)
    return content


def image_urls(spec: WorkloadSpec, index: int) -> list[str]:
    content = body(spec, index)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"] if isinstance(content, list) else []


def test_a_chat_is_a_function_of_the_spec_and_its_number() -> None:
    spec = WorkloadSpec(model="m", mix=parse_mix("text,2x32x32"), turns=Lengths(1, 3), think_s=1.0)
    assert [draw_chat(spec, i) for i in range(20)] == [draw_chat(spec, i) for i in range(20)]
    assert draw_chat(spec, 0) != draw_chat(WorkloadSpec(model="m", mix=parse_mix("text,2x32x32"), seed=1), 0)
    assert len({draw_chat(spec, i).request().body for i in range(20)}) == 20


def test_what_a_text_request_says() -> None:
    spec = WorkloadSpec(
        model="m",
        prompt_words=Lengths(3, 5),
        prefix_words=4,
        output_tokens=Lengths(7, 9),
        ignore_eos=True,
        extra_body={"top_k": 5},
    )
    requests = [(draw_chat(spec, i).request(), body(spec, i)) for i in range(30)]
    prompts = [asked["messages"][0]["content"].split() for _, asked in requests]
    assert {len(words) for words in prompts} == {7, 8, 9}
    assert len({tuple(words[:4]) for words in prompts}) == 1
    assert {asked["max_tokens"] for _, asked in requests} == {7, 8, 9}
    for request, asked in requests:
        assert request.expect_tokens == asked["max_tokens"]
        assert (request.num_images, request.kind) == (0, "text")
        assert asked["stream"] is True
        assert asked["stream_options"] == {"include_usage": True}
        assert (asked["model"], asked["ignore_eos"], asked["top_k"], asked["temperature"]) == ("m", True, 5, 0.0)


def test_a_length_can_be_expected_without_asking_for_it() -> None:
    request = draw_chat(WorkloadSpec(model="m", output_tokens=Lengths(7, 7), expect_length=True), 0).request()
    assert request.expect_tokens == 7
    assert "ignore_eos" not in json.loads(request.body)
    assert draw_chat(WorkloadSpec(model="m"), 0).request().expect_tokens is None


def test_the_mix_of_images() -> None:
    spec = WorkloadSpec(model="m", mix=parse_mix("text:60,2x40x20:30,3x16x24:10"))
    requests = [draw_chat(spec, i).request() for i in range(300)]
    counts = [request.num_images for request in requests]
    assert {(request.kind, request.num_images) for request in requests} == {("text", 0), ("2x40x20", 2), ("3x16x24", 3)}
    assert counts.count(2) / 300 == pytest.approx(0.3, abs=0.08)
    urls = [url for i in range(60) for url in image_urls(spec, i)]
    assert len(set(urls)) == len(urls), "two drawn images are equal"
    sizes = set()
    for url in urls:
        prefix, _, data = url.partition(",")
        assert prefix == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            sizes.add(image.size)
    assert sizes == {(40, 20), (16, 24)}


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_images_differ_in_their_pixels(image_format: str) -> None:
    pixels = set()
    for number in range(12):
        data = draw_image(0, number, (96, 64), image_format)
        assert data == draw_image(0, number, (96, 64), image_format)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == image_format.upper()
            pixels.add(image.tobytes())
    assert len(pixels) == 12


def test_images_come_back_as_often_as_asked() -> None:
    spec = WorkloadSpec(model="m", mix=parse_mix("1x32x32"), image_reuse=0.5, image_pool=3)
    urls = [url for i in range(200) for url in image_urls(spec, i)]
    often = [url for url in set(urls) if urls.count(url) > 1]
    assert len(often) == 3
    assert sum(urls.count(url) for url in often) / len(urls) == pytest.approx(0.5, abs=0.1)


def test_a_chat_repeats_what_was_said() -> None:
    spec = WorkloadSpec(model="m", mix=parse_mix("2x32x32"), turns=Lengths(3, 3), think_s=2.0, output_tokens=Lengths(4, 9))
    chat = draw_chat(spec, 5)
    assert chat.turns[0].think_s == 0.0
    assert all(turn.think_s > 0 for turn in chat.turns[1:])
    bodies = [json.loads(chat.request(answers).body) for answers in ([], ["one\n"], ["one\n", 'two"'])]
    said = [message["content"] for message in bodies[2]["messages"]]
    assert [message["role"] for message in bodies[2]["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert [said[1], said[3]] == ["one\n", 'two"']
    assert [len(asked["messages"]) for asked in bodies] == [1, 3, 5]
    assert bodies[1]["messages"] == bodies[2]["messages"][:3]
    assert [asked["max_tokens"] for asked in bodies] == [turn.max_tokens for turn in chat.turns]
    assert [chat.request(answers).num_images for answers in ([], ["a"])] == [2, 2]
    assert [chat.request(answers).turn for answers in ([], ["a"], ["a", "b"])] == [0, 1, 2]


def test_equal_hash_ids_of_a_trace_are_equal_text() -> None:
    trace = (
        TraceEntry(0.0, 1100, 7, (1, 2, 3)),
        TraceEntry(1.0, 1400, 8, (1, 2, 4)),
        TraceEntry(2.0, 700, 9, (5,)),
        TraceEntry(3.0, 40, 1),
    )
    spec = WorkloadSpec(model="m", trace=trace)
    words = [text(spec, index).split() for index in range(4)]
    assert [len(each) for each in words] == [1100, 1400, 700, 40]
    assert [body(spec, index)["max_tokens"] for index in range(4)] == [7, 8, 9, 1]
    assert words[0][:1024] == words[1][:1024]
    assert words[0][1024:1100] != words[1][1024:1100]
    assert words[0][:512] != words[2][:512]
    assert words[2][:512] == text(WorkloadSpec(model="m", trace=(TraceEntry(0.0, 512, 1, (5,)),)), 0).split()
    fewer = WorkloadSpec(model="m", trace=trace, words_per_token=0.5)
    assert len(text(fewer, 0).split()) == 550
    assert text(fewer, 0).split()[:512] == text(fewer, 1).split()[:512]


def test_prompts_of_a_file_are_asked_in_turn() -> None:
    lines = ['{"prompt": "a", "expect": "b"}', "", '{"prompt": "c", "images": ["data:image/png;base64,eA=="]}']
    prompts = read_prompts(lines)
    assert prompts == (Prompt("a", (), "b"), Prompt("c", ("data:image/png;base64,eA==",), None))
    spec = WorkloadSpec(model="m", prompts=prompts)
    assert text(spec, 2) == "a"
    assert draw_chat(spec, 2).request().expect_text == "b"
    assert draw_chat(spec, 3).request().num_images == 1


@pytest.mark.parametrize(
    ("lines", "match"), [(['{"prompt": "a"}', "nope"], "line 2"), (["{}"], "line 1"), (["[]"], "line 1"), ([""], "no prompt")]
)
def test_a_file_that_holds_no_prompts(lines: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_prompts(lines)
