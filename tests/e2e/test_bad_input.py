"""What a cluster is sent that it must refuse: each says what is wrong, costs nothing, and the next request is served."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import urllib.error
import urllib.request
import zlib
from typing import Any

import pytest
from PIL import Image

from tests.support.cluster import MODEL_NAME, WAIT_S, Process, ProcessCluster, get_json, process_cluster

TEXT: dict[str, Any] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Count from 7 to 9."}], "temperature": 0}


def _post(
    cluster: ProcessCluster, body: bytes, path: str = "/v1/chat/completions", kind: str = "application/json"
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{cluster.url}{path}", data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _json(**changes: Any) -> bytes:
    return json.dumps({**TEXT, **changes}).encode()


def _image(data: bytes, kind: str = "png") -> list[dict[str, Any]]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return _parts({"type": "image_url", "image_url": {"url": url}})


def _parts(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is in this image?"}]}]


def _png(width: int = 64, height: int = 64) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(data, "PNG")
    return data.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises gigabytes of pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


CASES: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "JSON"),
    "no object": (b"[]", 400, "object"),
    "no messages": (json.dumps({"model": MODEL_NAME}).encode(), 400, "messages"),
    "empty messages": (_json(messages=[]), 400, "messages"),
    "unknown model": (_json(model="another"), 404, "another"),
    "text for a number": (_json(temperature="hot"), 400, "temperature"),
    "too hot": (_json(temperature=5), 400, "temperature"),
    "not a number": (b'{"model": "tiny-vl", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400, ""),
    "top_p of nothing": (_json(top_p=0), 400, "top_p"),
    "no token at all": (_json(max_tokens=0), 400, "max_tokens"),
    "a choice too many": (_json(n=1000), 400, "n"),
    "half a seed": (_json(seed=0.5), 400, "seed"),
    "no function": (_json(tools=[{"type": "function", "function": {"name": ""}}]), 400, "tools[0].function.name"),
    "a call that must be made of nothing": (_json(tool_choice="required"), 400, "tool_choice"),
    "a form of no kind": (_json(response_format={"type": "xml"}), 400, "json_schema"),
    "a schema of nothing": (
        _json(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}),
        400,
        "objekt",
    ),
    "half an expression": (_json(structured_outputs={"regex": "(a"}), 400, "structured_outputs.regex"),
    "an expression that nothing matches": (_json(structured_outputs={"regex": r"[^\s\S]"}), 400, "structured_outputs.regex"),
    "a form without an end": (_json(response_format={"type": "json_object"}, ignore_eos=True), 400, "ignore_eos"),
    "unheard of": (_json(turbo=True), 400, "turbo"),
    "a strange role": (_json(messages=[{"role": "cook", "content": "hi"}]), 400, "role"),
    "a bias outside the vocabulary": (_json(logit_bias={"99999": 1}), 400, "logit_bias"),
    "an over-long prompt": (_json(messages=[{"role": "user", "content": "count " * 9000}]), 400, "4096"),
    "too much output": (_json(max_tokens=4096), 400, "4096"),
    "no base64": (
        _json(messages=_parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}})),
        400,
        "base64",
    ),
    "no image": (_json(messages=_image(b"hello")), 400, "image"),
    "a cut header": (_json(messages=_image(_png()[:20])), 400, "image"),
    "a cut image": (_json(messages=_image(_png(640, 640)[:-40])), 400, "image"),
    "a bomb": (_json(messages=_image(_bomb(60_000, 60_000))), 400, "pixels"),
    "an endless strip": (_json(messages=_image(_png(4000, 4))), 400, "image"),
    "too many images": (_json(messages=_parts(*[_image(_png())[0]["content"][0]] * 17)), 400, "16"),
    "a private address": (
        _json(messages=_parts({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}})),
        400,
        "that host",
    ),
    "an unlisted host": (
        _json(messages=_parts({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})),
        400,
        "that host",
    ),
    "a file": (_json(messages=_parts({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})), 400, "data URL"),
}


@pytest.fixture(scope="module", autouse=True)
def _idle_before_and_after(cluster: ProcessCluster) -> Any:
    cluster.wait_until_idle()
    before = [stage["num_steps"] for stage in cluster.stages() if stage["role"] == "decode"]
    yield
    cluster.wait_until_idle()
    assert len(before) == 1


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_costs_nothing(cluster: ProcessCluster, name: str) -> None:
    body, status, word = CASES[name]
    steps = {stage["role"]: stage["num_steps"] for stage in cluster.stages() if stage["role"] != "encode"}
    got, answer = _post(cluster, body)
    assert (got, word in answer["error"]["message"]) == (status, True), answer
    cluster.wait_until_idle()
    after = {stage["role"]: stage["num_steps"] for stage in cluster.stages() if stage["role"] != "encode"}
    # A picture whose pixels are cut off is found out by encode, while prefill runs up to it.
    assert after == steps or name == "a cut image"


def test_after_all_that_the_next_request_is_served(cluster: ProcessCluster) -> None:
    status, answer = _post(cluster, _json())
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "7 8 9")


def test_wrong_paths_methods_and_kinds(cluster: ProcessCluster) -> None:
    assert _post(cluster, _json(), "/v1/nothing")[0] == 404
    assert _post(cluster, b"", "/v1/models")[0] == 405
    assert _post(cluster, _json(), kind="text/plain")[0] in (400, 415)


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    with process_cluster("--max-body-mib", "0.01", encode=1) as small:
        status, answer = _post(small, _json(messages=[{"role": "user", "content": "x" * 20_000}]))
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert _post(small, _json())[0] == 200


# --- the cluster's own port -----------------------------------------------------------------------------------------


def _cluster_ports(cluster: ProcessCluster) -> list[tuple[str, int]]:
    return [
        (host, int(port)) for worker in cluster.describe()["workers"] for host, _, port in [worker["address"].rpartition(":")]
    ]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\xff" * 4096,
        struct.pack("<IIII", 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        b"",
    ],
    ids=["http", "zeros", "ones", "huge", "nothing"],
)
def test_garbage_on_a_link_ends_that_link_only(cluster: ProcessCluster, sent: bytes) -> None:
    for address in _cluster_ports(cluster):
        with socket.create_connection(address, timeout=WAIT_S) as link:
            link.settimeout(WAIT_S)
            link.sendall(sent)
            if not sent:
                link.shutdown(socket.SHUT_WR)
            try:
                while link.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    assert len(cluster.workers()) == 4
    assert _post(cluster, _json())[0] == 200


def test_a_worker_with_another_secret_is_not_let_in(cluster: ProcessCluster) -> None:
    address = next(worker["address"] for worker in cluster.describe()["workers"])
    stranger = Process(
        "serve", "--roles", "encode", "--join", address, "--log-level", "error", token="not the cluster's own secret"
    )
    try:
        assert stranger.wait() != 0
        assert "token" in "\n".join(stranger.errors) or "secret" in "\n".join(stranger.errors)
    finally:
        stranger.close()
    assert len(cluster.workers()) == 4
    assert get_json(f"{cluster.url}/ready")["ready"]
