"""The units in the docs start what is there: each option of theirs is one that the daemon has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
STARTS = [line for page in ("daemons.md", "registry.md")
          for line in re.findall(r"^ExecStart=/usr/bin/python3 (.+)$", (DOCS / page).read_text(), re.MULTILINE)]


def test_every_daemon_has_a_unit() -> None:
    assert {start.partition("-m ")[2].split()[0] for start in STARTS} == {
        "host.holder", "host.ivshmem.member", "host.registry", "host.broker", "guest.drivers"}


@pytest.mark.parametrize("start", STARTS)
def test_a_units_command_is_one_that_the_daemon_takes(start: str) -> None:
    flags, _, command = start.partition("-m ")
    module, *words = command.split()
    told = subprocess.run([sys.executable, *flags.split(), "-m", module, "--help"], capture_output=True, text=True,
                          check=True, cwd=DOCS.parent, env={"PYTHONPATH": str(DOCS.parent)}).stdout
    assert all(word in told for word in words if word.startswith("--"))
