"""Copies go on and on while broker, owner and links die at random: what completes well is right, everything completes,
and afterwards all of it works again."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from broker_support import MIB, bench, drive, started
from region_support import DEADLINE

from host.region import RegionSpec
from idc.endpoint import Completion, Result, State
from idc.layout import Rights
from idc.remote.resolution import Refusal

if TYPE_CHECKING:
    import subprocess

    from broker_support import Bench, Party


BYTES = MIB
PATTERN = bytes(range(256)) * (BYTES // 256)
#: How a copy may end that was cut off, besides well.
CUT = {(Result.OUTCOME_UNKNOWN, 0), *((Result.ERROR, code) for code in (Refusal.STALE, Refusal.FAILED, Refusal.NO_ROUTE,
                                                                      Refusal.BUSY))}


class Asker:
    """Keeps copies of the owner's buffer under way, each to a buffer of its own."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.targets = [party.allocate("middle-back", bytes(BYTES)) for _ in range(4)]
        self.reference = b""
        self.idle = set(range(4))
        self.good = self.cut = 0

    def begin(self) -> None:
        """As many as there are buffers free, if there is a connection."""
        for n in tuple(self.idle):
            buffer, target = self.targets[n]
            with self.party.regions["middle-back"].pool.view(buffer) as view:
                view[:4096], view[-4096:] = bytes(4096), bytes(4096)
            result = self.party.control.copy(self.reference, target, BYTES, partial(self.ended, n))
            if result is not Result.OK:
                assert result is Result.NOT_CONNECTED
                return
            self.idle.discard(n)

    def ended(self, n: int, completion: Completion) -> None:
        self.idle.add(n)
        if completion.result is Result.OK:
            self.good += 1
            assert self.party.content("middle-back", self.targets[n][0]) == PATTERN
        else:
            self.cut += 1
            assert (completion.result, completion.error) in CUT, completion

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.begin()
            drive([self.party], lambda: True)
            self.party.control.endpoint.pump(0.001)


def chaos(rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    with bench("--piece", "16384", links=(("middle", "back"),)) as here:
        here.served["front-middle"] = here.service.create(
            RegionSpec("front-middle", 4 * MIB, {"front": Rights.RW, "middle": Rights.RW}))
        here.served["control-front"] = here.service.control("front")
        asker = Asker(here.parties["back"])
        done = 0
        while done < rounds:
            with started(here, "front", "front-middle", BYTES) as (owner, reference):
                asker.reference = reference
                killed = False
                while not killed and done < rounds:
                    done += 1
                    killed = blow(here, chance, owner, asker)
                    settle(here, asker, owner_lives=not killed)
        assert asker.good > rounds
        status = here.service.broker_status()
        assert status["jobs"] == 0
        assert status["mapped"] <= 2
        assert "Traceback" not in (here.service.log.parent / "broker.log").read_text()


def blow(here: Bench, chance: random.Random, owner: subprocess.Popen[str], asker: Asker) -> bool:
    """One thing goes wrong at a random moment; whether it was the owner's end."""
    asker.run(chance.uniform(0.0, 0.05))
    event = chance.choice(["broker", "owner", "stop", "link", "server"])
    if event == "broker":
        os.kill(here.service.broker_pid, signal.SIGKILL)
        asker.run(chance.uniform(0.0, 0.02))
        here.service.restart_broker()
    elif event == "owner":
        owner.kill()
    elif event == "stop":
        owner.send_signal(signal.SIGSTOP)
        asker.run(chance.uniform(0.0, 0.2))
        owner.send_signal(signal.SIGCONT)
    elif event == "link":
        asker.party.control.endpoint.disconnect()
    else:
        os.kill(here.service.server_pid, signal.SIGKILL)
        asker.run(chance.uniform(0.0, 0.02))
        here.service.restart()
    asker.run(chance.uniform(0.0, 0.05))
    return event == "owner"


def settle(here: Bench, asker: Asker, *, owner_lives: bool) -> None:
    """All that is under way ends; then a copy succeeds again, if there is an owner."""
    drive([asker.party], lambda: len(asker.idle) == len(asker.targets))
    if not owner_lives:
        return
    drive([asker.party], lambda: asker.party.control.endpoint.state is State.CONNECTED)
    before, deadline = asker.good, time.monotonic() + DEADLINE
    while asker.good == before:
        assert time.monotonic() < deadline, here.service.broker_status()
        asker.begin()
        drive([asker.party], lambda: len(asker.idle) == len(asker.targets))
        asker.party.control.endpoint.pump(0.001)  # also if asking found the connection lost, so that none is under way


def test_a_few_rounds() -> None:
    chaos(15, seed=2005)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_many_rounds() -> None:
    for seed in range(20):
        chaos(50, seed)


