"""The rules by which the gateway itself says that something is wrong, for the live view.

The same conditions, under the same names, are Prometheus rules in deploy/prometheus/alerts.yml: those page somebody, look further
back and survive the gateway. These need nothing else to run.

Owns: which alerts are active, and since when. Does not know: the clock, where the signals come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

MIN_REQUESTS = 10  # before a share of them means anything


@dataclass(frozen=True, slots=True)
class Signals:
    """What the rules look at. Shares are 0 to 1; "lately" is the last minute."""

    missing_roles: Sequence[str] = ()
    lost_workers: Sequence[str] = ()  # lately, and not back
    num_judged: int = 0  # requests that ended lately and are held against the SLOs
    num_ttft_missed: int = 0
    num_tpot_missed: int = 0
    num_failed: int = 0
    num_arrived: int = 0
    num_refused: int = 0
    queues: dict[str, int] = field(default_factory=dict)  # "worker/role" -> waiting, the least lately
    full_pools: dict[str, float] = field(default_factory=dict)  # "worker/role" -> share of blocks held, the least lately
    num_preemptions: int = 0
    num_failed_transfers: int = 0
    num_corrupt_transfers: int = 0
    num_encoder_evictions: int = 0
    encoder_hit_share: float | None = None
    unclean: Sequence[str] = ()  # "worker/role" whose integrity check has failed


class Alert(msgspec.Struct, frozen=True):
    name: str
    severity: str  # "warning" or "critical"
    text: str
    since: float


@dataclass(frozen=True, slots=True)
class Rule:
    """`check` answers what is wrong, or nothing. It must have been so for `for_s` before the alert is active."""

    name: str
    severity: str
    check: Callable[[Signals], str]
    for_s: float = 0.0


class Alerts:
    """Feed it signals every few seconds."""

    def __init__(self, rules: Sequence[Rule] | None = None) -> None:
        self.active: dict[str, Alert] = {}
        self._rules = RULES if rules is None else tuple(rules)
        self._since: dict[str, float] = {}

    def evaluate(self, signals: Signals, now: float) -> tuple[list[Alert], list[Alert]]:
        """Returns the alerts that have begun and those that have ended."""
        begun, ended = [], []
        for rule in self._rules:
            text = rule.check(signals)
            known = self.active.get(rule.name)
            if not text:
                self._since.pop(rule.name, None)
                if known is not None:
                    ended.append(self.active.pop(rule.name))
                continue
            since = self._since.setdefault(rule.name, now)
            if now - since >= rule.for_s:
                self.active[rule.name] = Alert(rule.name, rule.severity, text, since)
                if known is None:
                    begun.append(self.active[rule.name])
        return begun, ended


# --- the rules ------------------------------------------------------------------------------------------------------


def _no_worker(signals: Signals) -> str:
    return f"no {' and no '.join(signals.missing_roles)} worker can be given work" if signals.missing_roles else ""


def _worker_lost(signals: Signals) -> str:
    return f"{', '.join(signals.lost_workers)} died or hung and has not come back" if signals.lost_workers else ""


def _missed(num_missed: int, num: int, what: str) -> str:
    is_bad = num >= MIN_REQUESTS and num_missed > 0.1 * num
    return f"{num_missed} of the last minute's {num} requests missed the {what} SLO" if is_bad else ""


def _failing(signals: Signals) -> str:
    is_bad = signals.num_judged >= MIN_REQUESTS and signals.num_failed > 0.05 * signals.num_judged
    return f"{signals.num_failed} of the last minute's {signals.num_judged} requests failed" if is_bad else ""


def _refusing(signals: Signals) -> str:
    is_bad = signals.num_arrived >= MIN_REQUESTS and signals.num_refused > 0.05 * signals.num_arrived
    return f"{signals.num_refused} of the last minute's {signals.num_arrived} requests were refused with 429" if is_bad else ""


def _queue(signals: Signals) -> str:
    long = [f"{stage} ({waiting})" for stage, waiting in sorted(signals.queues.items()) if waiting >= 8]
    return f"for a minute work has waited at {', '.join(long)}" if long else ""


def _full(signals: Signals) -> str:
    full = [f"{stage} ({share:.0%})" for stage, share in sorted(signals.full_pools.items()) if share > 0.95]
    return f"the KV pool is nearly full: {', '.join(full)}" if full else ""


def _preempting(signals: Signals) -> str:
    is_bad = signals.num_preemptions >= 5
    return f"{signals.num_preemptions} requests gave way in the last minute: decode's KV pool is too small" if is_bad else ""


def _failed_transfers(signals: Signals) -> str:
    is_bad = signals.num_failed_transfers >= 3
    return f"{signals.num_failed_transfers} transfers failed in the last minute" if is_bad else ""


def _corrupt(signals: Signals) -> str:
    num = signals.num_corrupt_transfers
    return f"{num} transfers in the last minute did not have their checksum: a worker's memory may be failing" if num else ""


def _thrash(signals: Signals) -> str:
    share = signals.encoder_hit_share
    if signals.num_encoder_evictions < 20 or share is None or share > 0.5:
        return ""
    return f"the encoder cache gave up {signals.num_encoder_evictions} blocks in the last minute and hit {share:.0%}"


def _unclean(signals: Signals) -> str:
    return f"{', '.join(signals.unclean)} found its own tables contradicting each other" if signals.unclean else ""


RULES = (
    Rule("EpdNoWorker", "critical", _no_worker, for_s=5.0),
    Rule("EpdWorkerLost", "warning", _worker_lost),
    Rule("EpdTtftSloBurn", "warning", lambda signals: _missed(signals.num_ttft_missed, signals.num_judged, "TTFT"), for_s=10.0),
    Rule("EpdTpotSloBurn", "warning", lambda signals: _missed(signals.num_tpot_missed, signals.num_judged, "TPOT"), for_s=10.0),
    Rule("EpdRequestsFail", "critical", _failing, for_s=10.0),
    Rule("EpdRefusals", "warning", _refusing, for_s=10.0),
    Rule("EpdQueueGrows", "warning", _queue),
    Rule("EpdKvPoolNearlyFull", "warning", _full),
    Rule("EpdPreemptions", "warning", _preempting),
    Rule("EpdTransfersFail", "warning", _failed_transfers),
    Rule("EpdTransferCorrupt", "critical", _corrupt),
    Rule("EpdEncoderCacheThrashes", "warning", _thrash),
    Rule("EpdIntegrityCheckFailed", "critical", _unclean),
)
