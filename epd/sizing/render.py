"""A plan for people, and as JSON. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from epd.emulated.profile import Profile
from epd.sizing.plan import Plan, Service, Targets


def provenance(profile: Profile) -> str:
    """What every figure that comes of a profile has to be read with."""
    if profile.provenance == "measured":
        return f"{profile.device} with {profile.model.name}: measured ({profile.source})"
    return f"{profile.device} with {profile.model.name}: ROOFLINE, NOT MEASURED ({profile.source})"


def text(plan: Plan, targets: Targets, profile: Profile, workload: str) -> str:
    lines = [
        f"profile    {provenance(profile)}",
        f"workload   {workload}",
        f"targets    TTFT {targets.ttft_s:g} s for 9 requests in 10, ITL {1e3 * targets.itl_s:g} ms on average",
        f"answer     {plan.answer.devices} devices: epd cluster --workers {plan.answer.workers}",
        f"next       {plan.next_bottleneck}",
        f"host       gateway {plan.gateway_cores:.2g} cores; KV {plan.kv_bytes_per_s / 1e9:.3g} GB/s and embeddings "
        f"{plan.embedding_bytes_per_s / 1e9:.3g} GB/s between workers, in all",
        "",
        f"predicted at {plan.answer.at.rate:.4g} req/s (E: encode, P: prefill, D: decode; EP, EPD: workers with several stages):",
    ]
    return "\n".join([*lines, *_table([plan.answer, *plan.others])])


def as_json(plan: Plan, targets: Targets, profile: Profile, workload: str) -> dict[str, Any]:
    """Infinite numbers are null."""
    found: dict[str, Any] = _finite(
        {
            "profile": {"device": profile.device, "model": profile.model.name, "provenance": profile.provenance},
            "source": profile.source,
            "workload": workload,
            "targets": asdict(targets),
            **asdict(plan),
        }
    )
    return found


def _table(services: list[Service]) -> list[str]:
    header = ("", "devices", "TTFT mean", "TTFT p90", "ITL", "batch", "busy", "highest req/s", "sessions")
    rows = [header, *(_cells(service) for service in services)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _cells(service: Service) -> tuple[str, ...]:
    at = service.at
    busy = " ".join(f"{_percent(share)}" for stage, share in at.busy.items())
    return (
        service.name,
        str(service.devices),
        _seconds(at.ttft_s),
        _seconds(at.ttft_p90_s),
        _seconds(at.itl_s),
        "-" if math.isinf(at.batch) else f"{at.batch:.0f}",
        busy,
        f"{service.highest:.4g}",
        f"{service.sessions:.0f}",
    )


def _seconds(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def _percent(share: float) -> str:
    return ">100%" if share > 1 else f"{100 * share:.0f}%"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
