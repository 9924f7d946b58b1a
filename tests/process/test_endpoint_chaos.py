"""A back end killed with -9 at random points under numbered transactions: each completes once at its submitter, is
executed at most once, and what was acknowledged was executed. Over shared memory and over TCP."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ports import free_port
from region_support import running

from host.region import RegionSpec
from idc.endpoint import Client, Completion, Endpoint, Quotas, Resources, Result, State
from idc.layout import ChannelSpec, Kind, Rights
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NURSERY = Path(__file__).with_name("endpoint_nursery.py")
LIMIT = 30.0


@contextmanager
def shared_memory() -> Iterator[tuple[str, str]]:
    channel = ChannelSpec("service", Kind.MESSAGE, "front", "back", 64 * 512, 512)
    with running() as service:
        region = service.create(RegionSpec("link", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, [channel]))
        yield f"member:{region.socket('front')}/service", f"member:{region.socket('back')}/service"


@contextmanager
def tcp() -> Iterator[tuple[str, str]]:
    place = f"127.0.0.1:{free_port()}"
    yield f"tcp-dial:{place}", f"tcp-listen:{place}"


class Front:
    """Submits without end, and keeps account."""

    def __init__(self, address: str) -> None:
        resources = Resources(Quotas(requests=8, messages=8), requests=8, messages=8)
        self.endpoint = Endpoint(open_port(address), Client(), resources)
        self.completed: dict[int, Completion] = {}
        self.next = 0

    def run(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not until():
            assert time.monotonic() < deadline, (self.endpoint.state, self.endpoint.reason)
            while self.endpoint.submit_transaction(b"%d" % self.next, self._done(self.next)) is Result.OK:
                self.next += 1
            self.endpoint.pump(0.01)

    def _done(self, number: int) -> Callable[[Completion], None]:
        def done(completion: Completion) -> None:
            assert number not in self.completed, f"{number} completed twice"
            assert completion.result is Result.OUTCOME_UNKNOWN or completion.status == b"%d" % number
            self.completed[number] = completion
        return done


def chaos(place: tuple[str, str], cycles: int, seed: int, log: Path) -> None:
    chance, front = random.Random(seed), Front(place[0])
    nursery = subprocess.Popen([sys.executable, str(NURSERY), place[1], str(log)], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    files = 0
    try:
        assert nursery.stdout is not None
        for cycle in range(cycles):
            victim = int(nursery.stdout.readline())
            front.run(lambda: front.endpoint.state is State.CONNECTED)
            at = time.monotonic() + chance.uniform(0, 0.02)
            front.run(lambda at=at: time.monotonic() >= at)  # type: ignore[misc]
            os.kill(victim, signal.SIGKILL)
            front.run(lambda: front.endpoint.state is not State.CONNECTED)
            if cycle == 2:
                files = len(os.listdir("/proc/self/fd"))
        # one more or less: a new connection may be under way at either look
        assert len(os.listdir("/proc/self/fd")) <= files + 2, "descriptors leak"
        last = front.next
        front.run(lambda: len(front.completed) > last + 8 and front.endpoint.state is State.CONNECTED)
    finally:
        os.killpg(nursery.pid, signal.SIGKILL)
        nursery.communicate()
        front.endpoint.destroy()
    executed = [int(line) for line in log.read_text().split()]
    assert len(executed) == len(set(executed)), "executed twice"
    assert sorted(front.completed) == list(range(front.next)), "one was never completed"
    acknowledged = {number for number, completion in front.completed.items() if completion.result is Result.OK}
    assert acknowledged <= set(executed), "acknowledged, and never executed"
    assert len(acknowledged) > cycles
    assert front.endpoint._resources.requests.outstanding == 0


PLACES = pytest.mark.parametrize("place", [shared_memory, tcp])


@PLACES
def test_killed_again_and_again(place: Callable[[], Iterator[tuple[str, str]]], tmp_path: Path) -> None:
    with place() as ends:  # type: ignore[attr-defined]
        chaos(ends, 100, 20261125, tmp_path / "log")


@pytest.mark.soak
@PLACES
def test_killed_a_thousand_times(place: Callable[[], Iterator[tuple[str, str]]], tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    sys.stdout.write(f"seed {seed}\n")
    with place() as ends:  # type: ignore[attr-defined]
        chaos(ends, 1000, seed, tmp_path / "log")
