"""The only place that reads the command line and the environment.

A configuration is a tree of frozen dataclasses, checked once here; whoever gets one may rely on it. Nothing else in the project
parses an argument, looks at an environment variable or invents a default.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from epd.devices import Seat, check_device, seats, step_limits
from epd.errors import BadConfig

WORKER_ROLES = ("encode", "prefill", "decode")
ROLES = ("gateway", *WORKER_ROLES)
BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny-vl"
DEFAULT_PORT = 8000
DEFAULT_CLUSTER_PORT = 8001


@dataclass(frozen=True, slots=True)
class HttpConfig:
    host: str
    port: int
    api_key: str
    allow_image_hosts: tuple[str, ...]
    max_body_bytes: int
    max_images: int
    max_image_pixels: int


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Where this process listens for other workers, whom it joins, and the secret they share."""

    host: str
    port: int
    advertise_host: str
    join: tuple[str, int] | None
    token: str
    worker: str  # "" lets the process name itself
    transfer: str  # "auto" | "mapped" | "socket": the best rung that may be taken


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one stage worker. Zero means: derived from the model and the memory at hand."""

    block_size: int
    kv_bytes: int
    embedding_bytes: int
    max_model_len: int
    token_budget: int  # tokens of one prefill step
    max_chunk_tokens: int  # of one request in one prefill step
    max_running: int  # requests in one decode step
    max_patches: int  # patches of one encode step
    lease_s: float


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    max_requests: int  # running at once; more are refused with 429
    max_prompt_tokens: int  # outstanding prompt tokens over all requests
    request_timeout_s: float
    drain_timeout_s: float


@dataclass(frozen=True, slots=True)
class ObserveConfig:
    """What requests are held against, and where their traces go."""

    slo_ttft_s: float
    slo_tpot_s: float
    otlp_endpoint: str  # base URL of a collector; "" sends no traces


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One process: the stages it hosts and everything they need."""

    roles: tuple[str, ...]
    placement: Literal["apart", "together"]
    model: str
    served_model_name: str
    device: str
    memory_fraction: float
    load_format: Literal["safetensors", "dummy"]
    num_threads: int
    log_level: str
    is_supervised: bool  # tells progress in words for `epd cluster`, and stops when standard input closes
    http: HttpConfig
    link: LinkConfig
    engine: EngineConfig
    admission: AdmissionConfig
    observe: ObserveConfig


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A whole cluster on this machine: how many processes of each role, and what each of them is given."""

    seats: Mapping[str, tuple[Seat, ...]]  # of the workers, by role in the order encode, prefill, decode
    serve: ServeConfig
    passed_on: tuple[str, ...]  # arguments that every process is started with


@dataclass(frozen=True, slots=True)
class TopConfig:
    """The live view in a terminal: of which gateway, and how often it is asked."""

    url: str
    api_key: str
    interval_s: float
    once: bool


def parse(argv: Sequence[str]) -> ServeConfig | ClusterConfig | TopConfig:
    """Read the command line.

    Raises:
        BadConfig: a value that argparse accepts and that makes no sense. Wrong usage exits with status 2, as argparse does.
    """
    args = _parser().parse_args(argv)
    if args.command == "top":
        return _top_config(args)
    serve = _serve_config(args)
    if args.command == "serve":
        return serve
    for name in WORKER_ROLES:
        if getattr(args, name) < 1:
            raise BadConfig(f"--{name} must be at least 1: every stage needs a worker")
    return ClusterConfig(
        seats=seats(args.device, {role: getattr(args, role) for role in WORKER_ROLES}, args.memory_fraction),
        serve=serve,
        passed_on=tuple(_passed_on(args)),
    )


# --- the command line -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="epd",
        description="Serve a vision-language model with separate encode, prefill and decode stages.",
        epilog="`epd cluster` starts everything on this machine; `epd COMMAND --help` lists a command's options.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run one or more stages in this process",
        description="Run any set of stages in this process. Without --roles that is all of them, which needs no cluster.",
        epilog=(
            "Three stages by hand, each in its own terminal, and a gateway that finds them (in any order): "
            "`epd serve --roles encode`, `epd serve --roles prefill`, `epd serve --roles decode`, `epd serve --roles gateway`."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve.add_argument("--roles", default=",".join(ROLES), help="comma-separated stages of this process")
    serve.add_argument(
        "--join",
        metavar="HOST:PORT",
        help=f"cluster address of the gateway; without a gateway role: 127.0.0.1:{DEFAULT_CLUSTER_PORT}",
    )
    serve.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    serve.add_argument("--worker", default="", help="name of this worker in the cluster; a random one by default")
    _add_common(serve)

    cluster = commands.add_parser(
        "cluster",
        help="start and supervise a whole cluster on this machine",
        description="Start a gateway and the given numbers of workers as processes, restart those that die, stop all on Ctrl-C.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cluster.add_argument("--encode", type=int, default=2, metavar="N", help="encode workers")
    cluster.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers")
    cluster.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers")
    _add_common(cluster)

    top = commands.add_parser(
        "top",
        help="watch a cluster in this terminal",
        description="The live view of a gateway in this terminal: workers, links, requests, alerts and events. Ctrl-C ends it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument("--url", default=f"http://127.0.0.1:{DEFAULT_PORT}", help="the gateway's HTTP endpoint")
    top.add_argument("--api-key", default=os.environ.get("EPD_API_KEY", ""), help="the gateway's bearer key, if it has one")
    top.add_argument("--interval-s", type=float, default=1.0, help="time between two frames")
    top.add_argument("--once", action="store_true", help="print one frame and end")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=str(BUNDLED_MODEL), metavar="PATH_OR_HUB_ID", help="checkpoint folder or hub id")
    model.add_argument("--served-model-name", default="", help="name in the API; the folder's or the hub id's by default")
    model.add_argument("--load-format", choices=("safetensors", "dummy"), default="safetensors", help="dummy: random weights")
    model.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE[,DEVICE...]",
        help="cpu, cuda, cuda:N or emulated:PROFILE; a cluster takes one for all, for each stage or for each worker",
    )
    model.add_argument(
        "--memory-fraction", type=float, default=0.9, help="share of a CUDA device's memory for this process, or this cluster"
    )
    model.add_argument("--num-threads", type=int, default=1, help="compute threads of each stage worker")
    model.add_argument("--max-model-len", type=int, default=0, help="longest prompt plus output; 0: what model and pool allow")

    http = parser.add_argument_group("endpoint")
    http.add_argument("--host", default="127.0.0.1", help="address of the HTTP endpoint")
    http.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the HTTP endpoint; 0: any free one")
    http.add_argument("--api-key", default=os.environ.get("EPD_API_KEY", ""), help="bearer key that clients must send")
    http.add_argument("--allow-image-host", action="append", default=[], metavar="HOST", help="host that image URLs may name")
    http.add_argument("--max-body-mib", type=float, default=64.0, help="largest request body")
    http.add_argument("--max-images", type=int, default=16, help="images per request")
    http.add_argument("--max-image-pixels", type=int, default=64_000_000, help="pixels per image as sent")

    link = parser.add_argument_group("cluster")
    link.add_argument("--cluster-host", default="127.0.0.1", help="address to listen on for other workers")
    link.add_argument(
        "--cluster-port",
        type=int,
        default=-1,
        help=f"port to listen on for other workers; -1: {DEFAULT_CLUSTER_PORT} with a gateway, else any",
    )
    link.add_argument(
        "--advertise-host", default="", help="address that other workers reach this one at; --cluster-host by default"
    )
    link.add_argument(
        "--token-file", default="", help="file with the cluster's shared secret; EPD_TOKEN or a file of this user by default"
    )
    link.add_argument(
        "--transfer", choices=("auto", "mapped", "socket"), default="auto", help="best way for KV and embeddings to move"
    )

    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--block-size", type=int, default=16, help="tokens of one KV block")
    sizes.add_argument("--kv-mib", type=float, default=0.0, help="KV pool of each worker; 0: from free memory and model")
    sizes.add_argument("--embedding-mib", type=float, default=0.0, help="embedding pool of each encode worker; 0: from the model")
    sizes.add_argument("--token-budget", type=int, default=0, help="tokens of one prefill step; 0: what suits the device")
    sizes.add_argument("--max-chunk-tokens", type=int, default=0, help="tokens of one request in it; 0: what suits the device")
    sizes.add_argument("--max-running", type=int, default=0, help="requests of one decode step; 0: what suits the device")
    sizes.add_argument("--max-patches", type=int, default=0, help="image patches of one encode step; 0: what suits the device")
    sizes.add_argument("--lease-s", type=float, default=30.0, help="how long a handle to unfetched bytes is kept")

    link.add_argument(
        "--placement",
        choices=("apart", "together"),
        default="apart",
        help="apart: each stage of a request where it is done first; together: all on one worker, as far as that has the stages",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-requests", type=int, default=256, help="requests at once; more are refused with 429")
    limits.add_argument(
        "--max-prompt-tokens", type=int, default=1_000_000, help="outstanding prompt tokens; more are refused with 429"
    )
    limits.add_argument("--request-timeout-s", type=float, default=600.0, help="longest life of a request")
    limits.add_argument(
        "--drain-timeout-s", type=float, default=30.0, help="how long a stopping process waits for running requests"
    )
    limits.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")

    observe = parser.add_argument_group("observation")
    observe.add_argument("--slo-ttft-s", type=float, default=2.0, help="time to first token that counts as good")
    observe.add_argument("--slo-tpot-s", type=float, default=0.2, help="mean time per further output token that counts as good")
    observe.add_argument(
        "--otlp-endpoint",
        default="",
        metavar="URL",
        help="collector that traces of requests go to over OTLP/HTTP, as in http://127.0.0.1:4318; needs the extra `otlp`",
    )


_NOT_PASSED_ON = {
    "command",
    *WORKER_ROLES,
    "roles",
    "join",
    "worker",
    "cluster_port",
    "token_file",
    "model",
    "device",
    "memory_fraction",
}


def _passed_on(args: argparse.Namespace) -> list[str]:
    """The common options, as arguments for `epd serve`."""
    words: list[str] = []
    for name, value in vars(args).items():
        if name in _NOT_PASSED_ON or value == "":
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return words


# --- checks ---------------------------------------------------------------------------------------------------------


def _serve_config(args: argparse.Namespace) -> ServeConfig:
    roles = _roles(args.roles) if args.command == "serve" else ("gateway",)
    _check_ranges(args)
    device = check_device(args.device) if args.command == "serve" else "cpu"  # a cluster's workers have seats
    limits = step_limits(device)
    return ServeConfig(
        roles=roles,
        placement=args.placement,
        model=args.model,
        served_model_name=args.served_model_name,
        device=device,
        memory_fraction=args.memory_fraction,
        load_format=args.load_format,
        num_threads=args.num_threads,
        log_level=args.log_level,
        is_supervised=getattr(args, "supervised", False),
        http=HttpConfig(
            host=args.host,
            port=args.port,
            api_key=args.api_key,
            allow_image_hosts=tuple(args.allow_image_host),
            max_body_bytes=int(args.max_body_mib * 2**20),
            max_images=args.max_images,
            max_image_pixels=args.max_image_pixels,
        ),
        link=_link_config(args, roles),
        engine=EngineConfig(
            block_size=args.block_size,
            kv_bytes=int(args.kv_mib * 2**20),
            embedding_bytes=int(args.embedding_mib * 2**20),
            max_model_len=args.max_model_len,
            token_budget=args.token_budget or limits.token_budget,
            max_chunk_tokens=args.max_chunk_tokens or limits.max_chunk_tokens,
            max_running=args.max_running or limits.max_running,
            max_patches=args.max_patches or limits.max_patches,
            lease_s=args.lease_s,
        ),
        admission=AdmissionConfig(
            max_requests=args.max_requests,
            max_prompt_tokens=args.max_prompt_tokens,
            request_timeout_s=args.request_timeout_s,
            drain_timeout_s=args.drain_timeout_s,
        ),
        observe=ObserveConfig(
            slo_ttft_s=args.slo_ttft_s, slo_tpot_s=args.slo_tpot_s, otlp_endpoint=_otlp_endpoint(args.otlp_endpoint)
        ),
    )


def _top_config(args: argparse.Namespace) -> TopConfig:
    if not args.url.startswith(("http://", "https://")):
        raise BadConfig(f"--url {args.url}: expected a URL, as in http://127.0.0.1:{DEFAULT_PORT}")
    if args.interval_s < 0.1:
        raise BadConfig(f"--interval-s {args.interval_s}: must be at least 0.1")
    return TopConfig(args.url.rstrip("/"), args.api_key, args.interval_s, args.once)


def _roles(text: str) -> tuple[str, ...]:
    named = [word.strip() for word in text.split(",") if word.strip()]
    unknown = sorted(set(named) - set(ROLES))
    if unknown:
        raise BadConfig(f"--roles: {', '.join(unknown)} is not a stage; choose from {', '.join(ROLES)}")
    if not named:
        raise BadConfig("--roles: name at least one stage")
    return tuple(role for role in ROLES if role in named)


def _link_config(args: argparse.Namespace, roles: tuple[str, ...]) -> LinkConfig:
    with_gateway = "gateway" in roles
    join = getattr(args, "join", None)
    if join is None and not with_gateway:
        join = f"127.0.0.1:{DEFAULT_CLUSTER_PORT}"
    port = args.cluster_port
    if port == -1:
        # A process that hosts every stage needs nobody: it takes any free port, so that several run side by side.
        port = DEFAULT_CLUSTER_PORT if with_gateway and set(roles) != set(ROLES) else 0
    return LinkConfig(
        host=args.cluster_host,
        port=port,
        advertise_host=args.advertise_host or args.cluster_host,
        join=_host_port(join) if join else None,
        token=_token(args),
        worker=getattr(args, "worker", ""),
        transfer=args.transfer,
    )


def _otlp_endpoint(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise BadConfig(f"--otlp-endpoint {text}: expected a URL, as in http://127.0.0.1:4318")
    return text.rstrip("/")


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadConfig(f"--join {text}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _token(args: argparse.Namespace) -> str:
    """The cluster's shared secret: from the named file, the environment, or a file that only this user reads."""
    if args.token_file:
        return _read_token(Path(args.token_file))
    from_environment = os.environ.get("EPD_TOKEN", "")
    if from_environment:
        return from_environment
    if not _is_loopback(args.cluster_host):
        raise BadConfig(f"--cluster-host {args.cluster_host} can be reached by others: set --token-file or EPD_TOKEN")
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epd" / "token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return _read_token(path)
    except OSError as error:
        raise BadConfig(f"cannot keep a cluster secret in {path} ({error.strerror}): set --token-file or EPD_TOKEN") from error
    token = secrets.token_hex(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    return token


def _read_token(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise BadConfig(f"cannot read the cluster's secret from {path}: {error.strerror}") from error
    if len(token) < 16:
        raise BadConfig(f"{path} holds no usable secret: write at least 16 characters into it")
    return token


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_ranges(args: argparse.Namespace) -> None:
    at_least = {
        "num_threads": 1,
        "block_size": 1,
        "token_budget": 0,
        "max_chunk_tokens": 0,
        "max_running": 0,
        "max_patches": 0,
        "max_requests": 1,
        "max_prompt_tokens": 1,
        "max_images": 0,
        "max_image_pixels": 1,
        "max_model_len": 0,
        "kv_mib": 0.0,
        "embedding_mib": 0.0,
        "max_body_mib": 0.001,
        "lease_s": 0.1,
        "request_timeout_s": 0.1,
        "drain_timeout_s": 0.0,
        "slo_ttft_s": 0.0,
        "slo_tpot_s": 0.0,
    }
    for name, least in at_least.items():
        value = getattr(args, name)
        if value < least:
            raise BadConfig(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("token_budget", "max_patches"):
        if 0 < (value := getattr(args, name)) < 16:
            raise BadConfig(f"--{name.replace('_', '-')} {value}: must be at least 16, or 0 for what suits the device")
    if not 0.0 < args.memory_fraction <= 1.0:
        raise BadConfig(f"--memory-fraction {args.memory_fraction}: a share is above 0 and at most 1")
    for name, lowest in (("port", 0), ("cluster_port", -1)):
        if not lowest <= getattr(args, name) < 65536:
            raise BadConfig(f"--{name.replace('_', '-')} {getattr(args, name)}: not a port")
