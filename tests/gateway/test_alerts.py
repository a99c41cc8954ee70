"""Each rule speaks when it should and is silent just before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from epd.gateway.alerts import RULES, Alerts, Rule, Signals

CALM = Signals(num_judged=100, num_arrived=100, queues={"d/decode": 7}, full_pools={"d/decode": 0.95}, encoder_hit_share=0.2)

# What sets it off, and the same a little less.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EpdNoWorker": ({"missing_roles": ("decode",)}, {}),
    "EpdWorkerLost": ({"lost_workers": ("decode-0",)}, {}),
    "EpdTtftSloBurn": ({"num_ttft_missed": 11}, {"num_ttft_missed": 10}),
    "EpdTpotSloBurn": ({"num_tpot_missed": 11}, {"num_tpot_missed": 10}),
    "EpdRequestsFail": ({"num_failed": 6}, {"num_failed": 5}),
    "EpdRefusals": ({"num_refused": 6}, {"num_refused": 5}),
    "EpdQueueGrows": ({"queues": {"d/decode": 8}}, {}),
    "EpdKvPoolNearlyFull": ({"full_pools": {"d/decode": 0.96}}, {}),
    "EpdPreemptions": ({"num_preemptions": 5}, {"num_preemptions": 4}),
    "EpdTransfersFail": ({"num_failed_transfers": 3}, {"num_failed_transfers": 2}),
    "EpdTransferCorrupt": ({"num_corrupt_transfers": 1}, {}),
    "EpdEncoderCacheThrashes": ({"num_encoder_evictions": 20}, {"num_encoder_evictions": 20, "encoder_hit_share": 0.6}),
    "EpdIntegrityCheckFailed": ({"unclean": ("d/decode",)}, {}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_speaks_when_it_should(rule: Rule) -> None:
    wrong, nearly = CASES[rule.name]
    assert rule.check(dataclasses.replace(CALM, **wrong))
    assert not rule.check(dataclasses.replace(CALM, **nearly))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_nothing_is_wrong_with_nothing(rule: Rule) -> None:
    assert not rule.check(Signals())


def test_a_few_requests_mean_nothing() -> None:
    few = Signals(num_judged=9, num_ttft_missed=9, num_tpot_missed=9, num_failed=9, num_arrived=9, num_refused=9)
    assert Alerts().evaluate(few, 1000.0) == ([], [])


def test_an_alert_begins_after_its_time_and_ends_at_once() -> None:
    alerts = Alerts((Rule("Late", "warning", lambda signals: "late" if signals.num_failed else "", for_s=10.0),))
    bad, fine = Signals(num_failed=1), Signals()
    assert alerts.evaluate(bad, 100.0) == ([], [])
    assert alerts.evaluate(bad, 109.0) == ([], [])
    begun, ended = alerts.evaluate(bad, 110.0)
    assert [(alert.name, alert.since, alert.text) for alert in begun] == [("Late", 100.0, "late")]
    assert ended == []
    assert alerts.evaluate(bad, 111.0) == ([], [])
    assert list(alerts.active) == ["Late"]
    begun, ended = alerts.evaluate(fine, 112.0)
    assert (begun, [alert.name for alert in ended], alerts.active) == ([], ["Late"], {})
    # What was wrong for a moment does not add up.
    alerts.evaluate(bad, 113.0)
    alerts.evaluate(fine, 118.0)
    assert alerts.evaluate(bad, 124.0) == ([], [])


def test_every_rule_has_a_name_of_its_own() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) == len(CASES)
