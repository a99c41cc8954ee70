"""The words of the command line: commands, options, defaults, help. What they mean, and whether it makes sense, says `config`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

WORKER_ROLES = ("encode", "prefill", "decode")
ROLES = ("gateway", *WORKER_ROLES)
BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny-vl"
DEFAULT_PORT = 8000
DEFAULT_CLUSTER_PORT = 8001


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options, none of them checked yet."""
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
        metavar="HOST:PORT[,...]",
        help=f"cluster address of the gateway, or of all gateways; without a gateway role: 127.0.0.1:{DEFAULT_CLUSTER_PORT}",
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
    cluster.add_argument(
        "--workers",
        default="",
        metavar="STAGES:N[,...]",
        help="instead of these three, workers of any stages: encode+prefill:7,decode:1, or encode+prefill+decode:8",
    )
    cluster.add_argument(
        "--gateways", type=int, default=1, metavar="N", help="gateways, on --port and the ports after it; each has all workers"
    )
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

    _add_plan(
        commands.add_parser(
            "plan",
            help="how many devices of each stage a load needs",
            description="Sizes a cluster from a device's profile: how many devices of each stage, and what gives way first.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--profile", default="h200-qwen3-vl-8b", help="device profile: a file, or the name of one that comes along")
    plan.add_argument(
        "--workload",
        default="text=50,images=1x1080p,output=64",
        metavar="KIND[+KIND...]",
        help="what is asked: text=TOKENS,images=NxSIZE,output=TOKENS,weight=W, several with + between",
    )
    plan.add_argument("--slo", default="ttft=1,itl=0.05", help="seconds: TTFT of nine requests in ten, mean time between tokens")
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--devices", type=int, default=0, metavar="N", help="the best use of so many")
    size.add_argument("--rate", type=float, default=0.0, metavar="R", help="the fewest for so many requests a second")
    plan.add_argument("--model", default="", help="folder of the model, for how images become patches; Qwen3-VL's way by default")
    plan.add_argument("--max-chunk-tokens", type=int, default=0, help="of a prompt in one step; 0: what suits a GPU")
    plan.add_argument("--max-running", type=int, default=0, help="requests of one decode step; 0: what suits a GPU")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_common(parser: argparse.ArgumentParser) -> None:
    """The options that every process of a cluster takes."""
    for add in (_add_model, _add_http, _add_link, _add_sizes, _add_limits, _add_observation):
        add(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=str(BUNDLED_MODEL), metavar="PATH_OR_HUB_ID", help="checkpoint folder or hub id")
    model.add_argument("--served-model-name", default="", help="name in the API; the folder's or the hub id's by default")
    model.add_argument("--load-format", choices=("safetensors", "dummy"), default="safetensors", help="dummy: random weights")
    model.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE[,DEVICE...]",
        help="cpu, cuda, cuda:N or emulated:PROFILE; a cluster takes one for all, for each kind of worker or for each worker",
    )
    model.add_argument(
        "--memory-fraction", type=float, default=0.9, help="share of a CUDA device's memory for this process, or this cluster"
    )
    model.add_argument("--num-threads", type=int, default=1, help="compute threads of each stage worker")
    model.add_argument("--max-model-len", type=int, default=0, help="longest prompt plus output; 0: what model and pool allow")


def _add_http(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("endpoint")
    http.add_argument("--host", default="127.0.0.1", help="address of the HTTP endpoint")
    http.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the HTTP endpoint; 0: any free one")
    http.add_argument("--api-key", default=os.environ.get("EPD_API_KEY", ""), help="bearer key that clients must send")
    http.add_argument("--allow-image-host", action="append", default=[], metavar="HOST", help="host that image URLs may name")
    http.add_argument("--max-body-mib", type=float, default=64.0, help="largest request body")
    http.add_argument("--max-images", type=int, default=16, help="images per request")
    http.add_argument("--max-image-pixels", type=int, default=64_000_000, help="pixels per image as sent")


def _add_link(parser: argparse.ArgumentParser) -> None:
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

    link.add_argument(
        "--placement",
        choices=("apart", "together"),
        default="apart",
        help="apart: each stage of a request where it is done first; together: all on one worker, as far as that has the stages",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--block-size", type=int, default=16, help="tokens of one KV block")
    sizes.add_argument("--kv-mib", type=float, default=0.0, help="KV pool of each worker; 0: from free memory and model")
    sizes.add_argument("--embedding-mib", type=float, default=0.0, help="embedding pool of each encode worker; 0: from the model")
    sizes.add_argument("--token-budget", type=int, default=0, help="tokens of one prefill step; 0: what suits the device")
    sizes.add_argument(
        "--budget-beside-decode",
        type=int,
        default=0,
        help="tokens of one prefill step while requests decode on the same worker; 0: what suits device and model",
    )
    sizes.add_argument("--max-chunk-tokens", type=int, default=0, help="tokens of one request in it; 0: what suits the device")
    sizes.add_argument("--max-running", type=int, default=0, help="requests of one decode step; 0: what suits the device")
    sizes.add_argument("--max-patches", type=int, default=0, help="image patches of one encode step; 0: what suits the device")
    sizes.add_argument(
        "--lease-s", type=float, default=30.0, help="how long an embedding that nobody fetches is kept for its request"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
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


def _add_observation(parser: argparse.ArgumentParser) -> None:
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
    "workers",
    "gateways",
    "roles",
    "join",
    "worker",
    "cluster_port",
    "token_file",
    "model",
    "device",
    "memory_fraction",
    "api_key",  # it goes along in the environment, where `ps` does not show it
}


def passed_on(args: argparse.Namespace) -> list[str]:
    """The common options, as arguments for `epd serve`."""
    words: list[str] = []
    for name, value in vars(args).items():
        if name in _NOT_PASSED_ON or value == "":
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return words
