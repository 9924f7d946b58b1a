"""The trace device between running VMs: attached to them, logged to, detached, and merged by `testbed trace`."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from cli_support import Cli, running
from trace_support import check_perfetto

from idc.trace import store
from testbed.trace.align import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNT = 2000
TOPOLOGY = """
name = "traced"
keep = "never"
[vms.front]
[vms.back]
[broker]
"""
#: Begun before there is a device; still there when it is detached.
PROGRAM = f"""
import sys
from idc.trace import open_tracer
with open_tracer("unix:/run/idc/trace-0", timeout=600) as tracer:
    with tracer.slice("all of them"):
        for number in range({COUNT}):
            tracer.instant("number", number.to_bytes(4, "little"))
    print("logged", tracer.dropped, flush=True)
    sys.stdin.read()
    print(tracer.instant("too late"), flush=True)
"""


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with running(TOPOLOGY) as cli:
        yield cli


@pytest.mark.timeout(900)  # programs start slowly in emulated guests, the more so on a machine that others use too
def test_attached_to_running_vms_logged_to_detached_and_merged(cli: Cli, tmp_path: Path) -> None:
    program = subprocess.Popen([*cli.words, "exec", "front", "--", "python3", "-c", PROGRAM], env=cli.env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    with program:
        said = cli("attach", "trace", "--frontend", "front", "--backend", "back", "lossless=true", "--wait", "200")
        assert "front end in front connected, back end in back connected" in said
        assert program.stdout.readline() == "logged 0\n"
        assert cli("detach", "trace", "--frontend", "front") == "trace-0 of front: detached\n"
        assert program.communicate(timeout=120)[0] == "False\n"

    output = tmp_path / "all.pftrace"
    report = json.loads(cli("trace", "-o", str(output), "--json"))
    assert report["reference"] == "back"
    (front,) = report["domains"]
    assert (front["name"], front["files"], front["dropped"], front["missing"], front["unread"]) == ("front", 2, 0, 0, 0)
    assert front["ended"] == ["the device was detached"] * 2
    assert front["worst"] < 1_000_000_000
    checked = check_perfetto(output)
    assert sum(name == "number" for _, _, name in checked.instants) == COUNT

    found = []
    for number in (1, 2):  # one of them has the comparisons of the clocks
        cli("cp", "-q", f"back:{store.DIRECTORY}/front.{number}.idctrace", str(tmp_path / "one.idctrace"))
        found += [int.from_bytes(event.data, "little") for event in load(store.read(tmp_path / "one.idctrace")).events
                  if event.text == "number"]
    assert found == list(range(COUNT))
