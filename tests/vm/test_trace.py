"""Tracing between the VMs of a running testbed: the front-end VM logs, the back-end VM writes, and `testbed trace`
fetches both and draws them on one timeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from cli_support import ROOT, Cli, running
from trace_support import check_perfetto

from idc.trace import store
from testbed.trace.align import align, load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIDE = ROOT / "tests" / "process" / "trace_side.py"
COUNT = 600
TOPOLOGY = """
keep = "never"
[vms.front]
[vms.back]
[regions.trace]
size = "4M"
members = { front = "rw", back = "rw" }
[regions.trace.channels.trace]
kind = "byte"
members = ["front", "back"]
ring = "1M"
[regions.link]
size = "1M"
members = { front = "rw", back = "rw" }
[regions.link.channels.service]
kind = "message"
members = ["front", "back"]
ring = "64K"
slot = "512"
"""


def start(cli: Cli, vm: str, command: str) -> None:
    """Start a command that stays; its output goes to a file."""
    cli("exec", "-n", vm, "--", f"setsid {command} >/tmp/{vm}.log 2>&1 & echo $! >>/tmp/pids")


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with running(TOPOLOGY) as cli:
        yield cli


def test_no_trace_yet_is_one_clear_line(cli: Cli, tmp_path: Path) -> None:
    said = cli("trace", "-o", str(tmp_path / "none"), code=1)
    assert said.startswith(f"error: there are no traces in {store.DIRECTORY} of ")
    assert len(said.splitlines()) == 1


def test_two_vms_on_one_timeline(cli: Cli, tmp_path: Path) -> None:
    for vm in ("front", "back"):
        cli("cp", "-q", str(SIDE), f"{vm}:/tmp/side.py")
    start(cli, "back", "python3 -m idc.trace.record ivshmem:trace/trace --domain front --here back")
    start(cli, "back", f"python3 /tmp/side.py back ivshmem:link/service back {store.DIRECTORY}")
    out = cli("exec", "-n", "front", "--", "python3", "/tmp/side.py", "front", "ivshmem:link/service",
              "ivshmem:trace/trace", "lossless", str(COUNT), "20")
    assert json.loads(out)["dropped"] == 0
    cli("exec", "-n", "back", "--", "for pid in $(cat /tmp/pids); do kill $pid; done; "
        "for pid in $(cat /tmp/pids); do while kill -0 $pid 2>/dev/null; do sleep 0.1; done; done")

    output = tmp_path / "all.pftrace"
    report = json.loads(cli("trace", "-o", str(output), "--json"))
    assert report["reference"] == "back"
    assert report["across"] == COUNT // 10
    back, front = report["domains"]
    assert (back["name"], front["name"]) == ("back", "front")
    assert back["dropped"] == front["dropped"] == front["missing"] == front["unread"] == 0
    assert front["worst"] < 100_000_000

    checked = check_perfetto(output)
    assert sorted(checked.processes.values()) == ["back", "front"]
    arrows = checked.arrows()
    assert len(arrows) == COUNT // 10
    assert all((one[1], other[1]) == ("front", "back") and one[0] <= other[0] for one, other in arrows)
    assert sum(name == "number" for _, _, name in checked.instants) == COUNT

    paths = [tmp_path / f"{name}.1.idctrace" for name in ("front", "back")]
    for path in paths:
        cli("cp", "-q", f"back:{store.DIRECTORY}/{path.name}", str(path))
    aligned = align([load(store.read(path)) for path in paths])
    theirs, mine = (source.events for source in aligned.sources)
    numbers = [int.from_bytes(event.data[:4], "little") for event in theirs if event.text == "number"]
    assert numbers == list(range(COUNT))
    for submit, handle in aligned.arrows:
        sent, bound = aligned.at("front", theirs[submit.begin].time)
        assert sent - bound <= mine[handle.begin].time
        seen, bound = aligned.at("front", theirs[submit.end].time)
        assert mine[handle.end].time <= seen + bound
