"""`make check-deploy`: rules and dashboard as Prometheus' own tools and a real server understand them.

Not collected by `make test`: it needs `promtool` and `prometheus`, which the Makefile asks for by name. A Prometheus scrapes a
real `epd serve` that has answered, and every expression of the rules and the dashboard is put to it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml

from tests.deploy.test_rules_and_dashboard import DEPLOY, EXPRESSIONS
from tests.e2e.mix import data_url
from tests.support.cluster import MODEL_NAME, SMALL, WAIT_S, Process, wait_until
from tests.support.scrape import selectors
from tests.support.text import png

RULES = DEPLOY / "prometheus" / "alerts.yml"


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=RULES.parent, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that has scraped a service, twice after it had answered."""
    folder = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        service = Process("serve", "--port", "0", *SMALL)
        stack.callback(service.close)
        url = service.line(r"epd is ready at (\S+)")[1]
        config = folder / "prometheus.yml"
        config.write_text(_config(url))
        port = _free_port()
        log = stack.enter_context(open(folder / "log", "w"))
        words = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        server = subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        stack.callback(server.wait, WAIT_S)
        stack.callback(server.terminate)
        at = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{at}/-/ready"), "prometheus to be ready", (folder / "log").read_text)
        for _ in range(3):  # rates need growth between scrapes
            seen = _num_scrapes(at)
            _ask(url)
            wait_until(lambda seen=seen: _num_scrapes(at) >= seen + 2, "two scrapes", (folder / "log").read_text)  # type: ignore[misc]
        yield at


def test_every_rule_is_healthy_and_none_fires(prometheus: str) -> None:
    wait_until(lambda: all(rule["lastEvaluation"] > "0001" for rule in _rules(prometheus)), "the rules to be evaluated")
    rules = _rules(prometheus)
    assert {rule["name"] for rule in rules} == {name for name, _ in EXPRESSIONS if name.startswith("Epd")}
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in rules} == {
        rule["name"]: ("ok", None) for rule in rules
    }
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []


@pytest.mark.parametrize("expression", [expression for _, expression in EXPRESSIONS], ids=[name for name, _ in EXPRESSIONS])
def test_prometheus_can_answer(prometheus: str, expression: str) -> None:
    _query(prometheus, _plain(expression))


def test_prometheus_has_every_metric_that_is_asked_for(prometheus: str) -> None:
    names = {selector.name for _, expression in EXPRESSIONS for selector in selectors(expression)}
    missing = {name for name in names if not _query(prometheus, f'{{__name__="{name}"}}')}
    # There is no accelerator that NVML could tell of where this runs, or there is; it is no emulated one.
    assert {name for name in missing if not name.startswith(("epd_device_", "epd_emulated_"))} == set()


def test_what_grows_is_a_counter_to_prometheus(prometheus: str) -> None:
    target = urllib.parse.quote('{job="epd"}')
    metadata = _get(f"{prometheus}/api/v1/targets/metadata?match_target={target}")["data"]
    kinds = {each["metric"]: each["type"] for each in metadata}
    names = {selector.name for _, expression in EXPRESSIONS for selector in selectors(expression)}
    totals = {name for name in names if name.startswith("epd_") and name.endswith("_total")}
    assert {name: kinds.get(name) for name in totals} == dict.fromkeys(totals, "counter")


# --- helpers --------------------------------------------------------------------------------------------------------


def _config(url: str) -> str:
    config: dict[str, Any] = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    return str(yaml.safe_dump(config))


def _ask(url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "How many?"}]
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        assert answer.status == 200


def _plain(expression: str) -> str:
    """As Grafana sends it."""
    return expression.replace("$__rate_interval", "10s").replace("$instance", ".*")


def _query(at: str, expression: str) -> list[Any]:
    answer = _get(f"{at}/api/v1/query?query={urllib.parse.quote(expression)}")
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found


def _rules(at: str) -> list[dict[str, Any]]:
    return [rule for group in _get(f"{at}/api/v1/rules")["data"]["groups"] for rule in group["rules"]]


def _num_scrapes(at: str) -> int:
    found = _query(at, 'count_over_time(up{job="epd"}[1h])')
    return int(found[0]["value"][1]) if found else 0


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
