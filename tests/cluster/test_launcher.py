from __future__ import annotations

from epd.cluster.launcher import Launcher
from epd.config import ClusterConfig, ServeConfig, parse


def commands_of(*words: str) -> dict[str, ServeConfig]:
    """What each process of a cluster is started with, as it reads it."""
    config = parse(["cluster", *words])
    assert isinstance(config, ClusterConfig)
    found = {name: parse(["serve", *own]) for name, own in Launcher(config).commands().items()}
    serve = {name: command for name, command in found.items() if isinstance(command, ServeConfig)}
    assert len(serve) == len(found)
    return serve


def test_every_worker_is_started_on_its_seat() -> None:
    commands = commands_of("--encode", "1", "--decode", "2", "--device", "cuda:0,cuda:1,cuda:1")
    assert {name: (command.device, command.memory_fraction) for name, command in commands.items() if name != "gateway"} == {
        "encode-0": ("cuda:0", 0.9),
        "prefill-0": ("cuda:1", 0.2455),
        "decode-0": ("cuda:1", 0.3273),
        "decode-1": ("cuda:1", 0.3273),
    }
    assert commands["gateway"].device == "cpu"  # a gateway needs none


def test_workers_of_several_stages() -> None:
    commands = commands_of("--workers", "decode+prefill:2,encode+prefill+decode:1", "--device", "cuda:0,cuda:0,cuda:1")
    assert {name: (command.roles, command.device, command.memory_fraction) for name, command in commands.items()} == {
        "gateway": (("gateway",), "cpu", 0.9),
        "prefill-decode-0": (("prefill", "decode"), "cuda:0", 0.45),
        "prefill-decode-1": (("prefill", "decode"), "cuda:0", 0.45),
        "encode-prefill-decode-0": (("encode", "prefill", "decode"), "cuda:1", 0.9),
    }


def test_secrets_go_along_in_the_environment_and_not_where_everybody_reads_them() -> None:
    config = parse(["cluster", "--api-key", "a secret"])
    assert isinstance(config, ClusterConfig)
    launcher = Launcher(config)
    assert not any("secret" in word for words in launcher.commands().values() for word in words)
    assert launcher._environment["EPD_API_KEY"] == "a secret"


def test_several_gateways_have_ports_of_their_own_and_all_workers() -> None:
    commands = commands_of("--gateways", "2", "--port", "8100", "--encode", "1")
    gateways = {name: command for name, command in commands.items() if command.roles == ("gateway",)}
    assert {name: command.http.port for name, command in gateways.items()} == {"gateway-0": 8100, "gateway-1": 8101}
    joined = tuple(("127.0.0.1", command.link.port) for command in gateways.values())
    assert len(set(joined)) == 2
    assert {command.link.join for name, command in commands.items() if name not in gateways} == {joined}


def test_gateways_on_any_port_choose_their_own() -> None:
    commands = commands_of("--gateways", "2", "--port", "0")
    assert [commands[name].http.port for name in ("gateway-0", "gateway-1")] == [0, 0]
