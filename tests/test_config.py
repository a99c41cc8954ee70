from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from epd.config import ClusterConfig, ObserveConfig, ServeConfig, parse
from epd.errors import BadConfig
from epd.options import ROLES


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EPD_TOKEN", raising=False)
    monkeypatch.delenv("EPD_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _serve(*words: str) -> ServeConfig:
    config = parse(["serve", *words])
    assert isinstance(config, ServeConfig)
    return config


def test_without_flags_one_process_hosts_everything() -> None:
    config = _serve()
    assert config.roles == ROLES
    assert config.http.port == 8000
    assert config.link.join == ()
    assert config.link.port == 0  # several such processes may run side by side
    assert Path(config.model).name == "tiny-vl"


def test_stages_by_hand_find_each_other_without_flags() -> None:
    gateway, encode = _serve("--roles", "gateway"), _serve("--roles", "encode")
    assert encode.link.join == (("127.0.0.1", gateway.link.port),)
    assert gateway.link.join == ()
    assert encode.link.token == gateway.link.token


def test_a_worker_may_join_several_gateways() -> None:
    config = parse(["serve", "--roles", "decode", "--join", "a:1, [::1]:2,a:1"])
    assert isinstance(config, ServeConfig)
    assert config.link.join == (("a", 1), ("::1", 2))


def test_a_cluster_has_a_gateway() -> None:
    with pytest.raises(BadConfig, match="--gateways 0"):
        parse(["cluster", "--gateways", "0"])


@pytest.mark.parametrize(("device", "token_budget", "max_running"), [("cpu", 2048, 64), ("cuda", 8192, 256)])
def test_a_step_is_as_large_as_suits_the_device_unless_said_otherwise(device: str, token_budget: int, max_running: int) -> None:
    engine = _serve("--device", device, "--max-chunk-tokens", "100").engine
    assert (engine.token_budget, engine.max_running, engine.max_chunk_tokens) == (token_budget, max_running, 100)


def test_roles_are_put_in_the_order_of_the_walk() -> None:
    assert _serve("--roles", "decode, encode").roles == ("encode", "decode")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--roles", "encode,cook"], "cook is not a stage"),
        (["--roles", ","], "at least one stage"),
        (["--join", "nowhere"], "HOST:PORT"),
        (["--join", "host:0"], "HOST:PORT"),
        (["--join", "host:1,"], "HOST:PORT"),
        (["--join", "host:99999"], "HOST:PORT"),
        (["--device", "tpu"], "choose cpu, cuda"),
        (["--device", "cuda:0,cuda:1"], "choose cpu, cuda"),
        (["--memory-fraction", "0"], "a share is"),
        (["--block-size", "0"], "--block-size"),
        (["--token-budget", "-1"], "--token-budget"),
        (["--token-budget", "15"], "at least 16"),
        (["--port", "70000"], "not a port"),
        (["--kv-mib", "-1"], "--kv-mib"),
        (["--cluster-host", "0.0.0.0"], "EPD_TOKEN"),
        (["--token-file", "/nonexistent/token"], "cannot read"),
    ],
)
def test_values_without_sense_are_refused_by_name(words: list[str], reason: str) -> None:
    with pytest.raises(BadConfig, match=reason):
        parse(["serve", *words])


@pytest.mark.parametrize(
    "words", [[], ["cook"], ["serve", "--load-format", "pickle"], ["serve", "--port", "x"], ["cluster", "--join", "a:1"]]
)
def test_wrong_usage_exits_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(words)
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_secret_is_made_once_and_for_this_user_only(tmp_path: Path) -> None:
    first, second = _serve().link.token, _serve().link.token
    assert first == second
    assert len(first) == 64
    assert stat.S_IMODE((tmp_path / "epd" / "token").stat().st_mode) == 0o600


def test_where_a_secret_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named"
    named.write_text("a secret in a file\n")
    monkeypatch.setenv("EPD_TOKEN", "one of the environment")
    assert _serve("--cluster-host", "0.0.0.0").link.token == "one of the environment"
    assert _serve("--token-file", str(named)).link.token == "a secret in a file"
    named.write_text("short")
    with pytest.raises(BadConfig, match="16 characters"):
        _serve("--token-file", str(named))


def test_what_requests_are_held_against_and_where_traces_go() -> None:
    config = parse(["serve", "--slo-ttft-s", "0.5", "--slo-tpot-s", "0.05", "--otlp-endpoint", "http://127.0.0.1:4318/"])
    assert isinstance(config, ServeConfig)
    assert config.observe == ObserveConfig(0.5, 0.05, "http://127.0.0.1:4318")
    for words in (["--otlp-endpoint", "127.0.0.1:4318"], ["--slo-ttft-s", "-1"]):
        with pytest.raises(BadConfig, match=words[0]):
            parse(["serve", *words])


def test_a_cluster_passes_its_options_on() -> None:
    config = parse(
        ["cluster", "--decode", "3", "--block-size", "32", "--allow-image-host", "a.org", "--allow-image-host", "b.org"]
    )
    assert isinstance(config, ClusterConfig)
    assert {role: len(seats) for role, seats in config.seats.items()} == {"encode": 2, "prefill": 1, "decode": 3}
    passed = parse(["serve", "--roles", "decode", *config.passed_on])
    assert isinstance(passed, ServeConfig)
    assert passed.engine == config.serve.engine
    assert passed.http.allow_image_hosts == ("a.org", "b.org")
    assert os.environ.get("EPD_TOKEN") is None


@pytest.mark.parametrize("role", ["encode", "prefill", "decode"])
def test_a_cluster_needs_every_stage(role: str) -> None:
    with pytest.raises(BadConfig, match=f"--{role}"):
        parse(["cluster", f"--{role}", "0"])
