from __future__ import annotations

import json
import re

import pytest

from tools.bench.machine import describe_machine, machine_slug


def test_the_description_is_json_and_says_what_a_figure_depends_on() -> None:
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["packages"]["torch"].startswith("2.")
    assert re.fullmatch(r"[0-9a-f]{40}|", machine["commit"])


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("AMD EPYC", "amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", "intel-xeon-platinum-8480c-2-cores"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-2-cores"),
    ],
)
def test_slugs(cpu: str, slug: str) -> None:
    assert machine_slug({"cpu": cpu, "cores": 2}) == slug
