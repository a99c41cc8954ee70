from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=\s]+", line) for line in lines), "a pin names one exact version"
    assert lines == sorted(lines)
    return {normalised(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_requirement_is_pinned() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    names = {normalised(re.split(r"[<>=;\[ ]", line, maxsplit=1)[0]) for text in texts for line in text.split("\n") if line}
    assert names - pins().keys() == set()


def test_the_installer_says_what_is_missing(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "tools" / "install.sh", tmp_path / "venv", "", "cpu"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "apt-get install python3 python3-venv" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("run-cluster", "test", "check-deploy", "check-dashboard", "lint", "bench", "eval", "clean"):
        assert f"make {target} " in shown


def test_make_variables_reach_the_cluster() -> None:
    words = ["make", "-n", "run-cluster", "MODEL=/m", "PORT=9", "GATEWAYS=2", "ENCODE=3", "PREFILL=4", "DECODE=5", "DEVICE=cpu"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    assert '/epd cluster --model "/m" --port 9 --gateways 2 --encode 3 --prefill 4 --decode 5 --device cpu' in " ".join(
        shown.split()
    )
