"""What the command line and the environment ask for, checked.

A configuration is a tree of frozen dataclasses, checked once here; whoever gets one may rely on it. Nothing else in the server
parses an argument, looks at an environment variable or invents a default, but `options`, which has the words and defaults of this
command line. The launcher hands the environment on to its processes, with the secrets in it that no command line is to show.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from epd.devices import Seat, check_device, parse_workers, seats, step_limits
from epd.errors import BadConfig
from epd.options import DEFAULT_CLUSTER_PORT, DEFAULT_PORT, ROLES, WORKER_ROLES, build_parser, passed_on


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
    join: tuple[tuple[str, int], ...]  # gateways; none: that of this process
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
    budget_beside_decode: int  # the same while requests decode on the same worker; 0: what suits device and model
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

    @property
    def model_name(self) -> str:
        """What the model is called in the API: as told, or the folder's name, or the hub id."""
        folder = Path(self.model).expanduser()
        return self.served_model_name or (folder.resolve().name if folder.is_dir() else self.model)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A whole cluster on this machine: how many processes of each role, and what each of them is given."""

    seats: Mapping[str, tuple[Seat, ...]]  # of the workers, by kind: their stages, as in encode+prefill
    serve: ServeConfig
    passed_on: tuple[str, ...]  # arguments that every process is started with
    num_gateways: int


@dataclass(frozen=True, slots=True)
class TopConfig:
    """The live view in a terminal: of which gateway, and how often it is asked."""

    url: str
    api_key: str
    interval_s: float
    once: bool


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """How many devices of each stage: for what, on which device. Either `devices` or `rate` is 0."""

    profile: str
    workload: str
    ttft_s: float
    itl_s: float
    devices: int
    rate: float
    model: str  # whose rule makes patches of images; "": that of the shipped profiles' model
    chunk_tokens: int
    max_running: int
    is_json: bool


def parse(argv: Sequence[str]) -> ServeConfig | ClusterConfig | TopConfig | PlanConfig:
    """Read the command line.

    Raises:
        BadConfig: a value that argparse accepts and that makes no sense. Wrong usage exits with status 2, as argparse does.
    """
    args = build_parser().parse_args(argv)
    if args.command == "top":
        return _top_config(args)
    if args.command == "plan":
        return _plan_config(args)
    serve = _serve_config(args)
    if args.command == "serve":
        return serve
    if args.gateways < 1:
        raise BadConfig(f"--gateways {args.gateways}: somebody has to answer requests")
    return ClusterConfig(
        seats=seats(args.device, _workers(args), args.memory_fraction),
        serve=serve,
        passed_on=tuple(passed_on(args)),
        num_gateways=args.gateways,
    )


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
            budget_beside_decode=args.budget_beside_decode,
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


def _workers(args: argparse.Namespace) -> dict[str, int]:
    """How many of each kind: as --workers says, or so many for each stage."""
    if args.workers:
        return parse_workers(args.workers)
    for name in WORKER_ROLES:
        if getattr(args, name) < 1:
            raise BadConfig(f"--{name} must be at least 1: every stage needs a worker")
    return {role: getattr(args, role) for role in WORKER_ROLES}


def _top_config(args: argparse.Namespace) -> TopConfig:
    if not args.url.startswith(("http://", "https://")):
        raise BadConfig(f"--url {args.url}: expected a URL, as in http://127.0.0.1:{DEFAULT_PORT}")
    if args.interval_s < 0.1:
        raise BadConfig(f"--interval-s {args.interval_s}: must be at least 0.1")
    return TopConfig(args.url.rstrip("/"), args.api_key, args.interval_s, args.once)


def _plan_config(args: argparse.Namespace) -> PlanConfig:
    bounds: dict[str, float] = {}
    try:
        bounds = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in args.slo.split(","))}
    except ValueError:
        pass
    if set(bounds) != {"ttft", "itl"} or not all(0 < bound < float("inf") for bound in bounds.values()):
        raise BadConfig(f"--slo {args.slo}: expected seconds, as in ttft=1,itl=0.05")
    if args.devices < 0 or not 0 <= args.rate < float("inf") or not (args.devices or args.rate):
        raise BadConfig("--devices or --rate must be above 0")
    limits = step_limits("cuda")
    return PlanConfig(
        profile=args.profile,
        workload=args.workload,
        ttft_s=bounds["ttft"],
        itl_s=bounds["itl"],
        devices=args.devices,
        rate=args.rate,
        model=args.model,
        chunk_tokens=args.max_chunk_tokens or limits.max_chunk_tokens,
        max_running=args.max_running or limits.max_running,
        is_json=args.json,
    )


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
        join=tuple(dict.fromkeys(_host_port(each.strip()) for each in join.split(","))) if join else (),
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
        raise BadConfig(f"--join {text}: expected HOST:PORT[,HOST:PORT...]")
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
        "budget_beside_decode": 0,
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
    for name in ("token_budget", "budget_beside_decode", "max_patches"):
        if 0 < (value := getattr(args, name)) < 16:
            raise BadConfig(f"--{name.replace('_', '-')} {value}: must be at least 16, or 0 for what suits the device")
    if not 0.0 < args.memory_fraction <= 1.0:
        raise BadConfig(f"--memory-fraction {args.memory_fraction}: a share is above 0 and at most 1")
    for name, lowest in (("port", 0), ("cluster_port", -1)):
        if not lowest <= getattr(args, name) < 65536:
            raise BadConfig(f"--{name.replace('_', '-')} {getattr(args, name)}: not a port")
