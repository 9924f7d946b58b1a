"""A front end and a stack of three back ends, four processes in all, each saturated with one request and one message
at a time: over rings, over TCP, and over both in one stack. The same folded across one link is in tests/conformance."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ports import free_port
from region_support import running

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

from liveness import COUNT, Front, turn

from host.region import RegionService, RegionSpec
from idc.endpoint import Completion, Result
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from collections.abc import Callable

    Level = Callable[[RegionService, int], tuple[str, str]]

STACK = Path(__file__).with_name("endpoint_stack.py")
LIMIT = 90.0


def rings(service: RegionService, number: int) -> tuple[str, str]:
    """Addresses of the upper and the lower end of a link with a region of its own."""
    channel = ChannelSpec("service", Kind.MESSAGE, "up", "down", 16 * 512, 512)
    region = service.create(RegionSpec(f"link{number}", 1 << 17, {"up": Rights.RW, "down": Rights.RW}, [channel]))
    return f"member:{region.socket('up')}/service", f"member:{region.socket('down')}/service"


def tcp(_: RegionService, number: int) -> tuple[str, str]:
    place = f"127.0.0.1:{free_port()}"
    return f"tcp-dial:{place}", f"tcp-listen:{place}"


LEVELS = pytest.mark.parametrize("levels", [(rings, rings, rings), (tcp, tcp, tcp), (rings, tcp, rings)],
                                 ids=["rings", "tcp", "mixed"])


@LEVELS
def test_a_stack_of_three_back_ends_gets_on(levels: tuple[Level, ...]) -> None:
    with running() as service, ExitStack() as after:
        links = [level(service, number) for number, level in enumerate(levels)]
        places = [end for link in links for end in link]
        ends = []
        for words in (places[1:3], places[3:5], places[5:]):
            end = subprocess.Popen([sys.executable, str(STACK), *words], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
            after.callback(end.communicate)
            after.callback(end.kill)
            ends.append(end)
        front = Front(places[0], levels=2)
        turn([front.endpoint], until=lambda: front.finished, each=front.press)
        front.settle([])
        for end in ends:
            out, errors = end.communicate(timeout=LIMIT)
            assert end.returncode == 0, errors
            assert int(out) >= COUNT


class Patient(Front):
    """Takes a failure for an answer: one that says so is one that was not lost."""

    failed = 0

    def _answered(self, body: bytes, completion: Completion) -> None:
        if completion.result is Result.OK:
            super()._answered(body, completion)
        else:
            assert completion.result is Result.ERROR, completion
            assert "outcome unknown" in completion.reason
            self.failed += 1


@LEVELS
def test_a_back_end_in_the_middle_is_killed_and_comes_again(levels: tuple[Level, ...]) -> None:
    """What it had under way completes as unknown at the one above it, which says so further up; then all get on."""
    with running() as service, ExitStack() as after:
        links = [level(service, number) for number, level in enumerate(levels)]
        places = [end for link in links for end in link]

        def start(*words: str) -> subprocess.Popen[bytes]:
            end = subprocess.Popen([sys.executable, str(STACK), *words], env=os.environ | {"IDC_STAY": "1"})
            after.callback(end.wait)
            after.callback(end.kill)
            return end

        start(*places[1:3])
        middle = start(*places[3:5])
        start(*places[5:])
        front = Patient(places[0], levels=2)
        for _ in range(5):
            before = front.answers
            turn([front.endpoint], until=lambda before=before: front.answers > before + 20, each=front.press)  # type: ignore[misc]
            middle.kill()
            middle.wait()
            middle = start(*places[3:5])
        turn([front.endpoint], until=lambda: front.finished, each=front.press)
        assert front.failed <= 5  # one request at a time, five deaths
        assert front.endpoint.connections == 1
        front.settle([])
