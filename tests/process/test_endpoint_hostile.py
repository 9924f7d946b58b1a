"""A peer that writes random bytes over the whole region, one that rings without end, one that is stopped.

Each harms its own connection at most, while another endpoint of the same process goes on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running

from host.region import Region, RegionSpec
from idc.endpoint import Client, Completion, Endpoint, Resources, Result, State
from idc.layout import ChannelSpec, Kind, Rights
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
LIMIT = 20.0


class Load:
    """Keeps a few transactions outstanding on one endpoint and counts what comes of them."""

    def __init__(self, region: Region) -> None:
        self.endpoint = Endpoint(open_port(f"member:{region.socket('front')}/service"), Client(), Resources())
        self.answers = 0
        self.unknown = 0

    def turn(self) -> None:
        while (self.endpoint.outstanding < 4
               and self.endpoint.submit_transaction(b"%d" % self.answers, self._done) is Result.OK):
            pass
        self.endpoint.pump(0.001)

    def _done(self, completion: Completion) -> None:
        self.answers += completion.result is Result.OK
        self.unknown += completion.result is Result.OUTCOME_UNKNOWN


@pytest.fixture
def regions() -> Iterator[tuple[Region, Region]]:
    channel = ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)
    members = {"front": Rights.RW, "back": Rights.RW}
    with running() as service:
        one, two = (service.create(RegionSpec(name, 1 << 20, members, [channel])) for name in ("good", "bad"))
        yield one, two


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def turn_until(loads: list[Load], condition: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, [(load.endpoint.state, load.endpoint.reason) for load in loads]
        for load in loads:
            load.turn()


@contextmanager
def both(regions: tuple[Region, Region], what: str, log: Path) -> Iterator[tuple[Load, Load, subprocess.Popen[str]]]:
    """An honest back end on the first region, a hostile one on the second, which has just turned."""
    good, bad = Load(regions[0]), Load(regions[1])
    try:
        with (process(str(HERE / "endpoint_nursery.py"), f"member:{regions[0].socket('back')}/service", str(log)),
              process(str(HERE / "endpoint_hostile.py"), str(regions[1].socket("back")), what) as hostile):
            turn_until([good, bad], lambda: bad.answers >= 50 and good.answers >= 50)
            assert hostile.stdout is not None
            assert hostile.stdout.readline() == "now\n"
            yield good, bad, hostile
    finally:
        good.endpoint.destroy()
        bad.endpoint.destroy()


def test_random_bytes_over_the_whole_region(regions: tuple[Region, Region], tmp_path: Path) -> None:
    with both(regions, "scribble", tmp_path / "log") as (good, bad, _):
        before = good.answers
        turn_until([good, bad], lambda: bad.endpoint.reason != "", 1.0)
        until = time.monotonic() + 1.5
        turn_until([good, bad], lambda: time.monotonic() > until)
        assert good.endpoint.state is State.CONNECTED
        assert good.endpoint.connections == 1
        assert good.answers > before + 100


def test_a_peer_that_rings_without_end_costs_others_little(regions: tuple[Region, Region], tmp_path: Path) -> None:
    with both(regions, "ring", tmp_path / "log") as (good, bad, _):
        memory, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, good.answers
        until = time.monotonic() + 2.0
        turn_until([good, bad], lambda: time.monotonic() > until)
        assert good.answers > before + 100
        assert good.endpoint.connections == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 20_000  # KiB


def test_a_stopped_peer_holds_up_nobody_else(regions: tuple[Region, Region], tmp_path: Path) -> None:
    """What it owes is bounded by the quota; it goes on where it stopped."""
    with both(regions, "ring", tmp_path / "log") as (good, bad, hostile):
        os.kill(hostile.pid, signal.SIGSTOP)
        while bad.endpoint.submit_transaction(b"x") is Result.OK:
            pass
        assert bad.endpoint.submit_transaction(b"x") is Result.BACK_PRESSURED
        assert bad.endpoint.status.outstanding == 16
        cpu, until = time.process_time(), time.monotonic() + 0.5
        while time.monotonic() < until:
            bad.endpoint.pump(0.1)
        assert time.process_time() - cpu < 0.1  # who waits for it sleeps
        before = good.answers
        turn_until([good], lambda: good.answers > before + 500)
        assert bad.endpoint.state is State.CONNECTED
        os.kill(hostile.pid, signal.SIGCONT)
        turn_until([bad], lambda: bad.endpoint.outstanding == 0 or bad.endpoint.state is not State.CONNECTED)
