"""Each daemon of the host killed under a checked stream between process domains: no connection notices, it is started
again by whoever minds it, and a peer that dies afterwards rejoins. Between VMs: tests/vm/test_device_lives.py.
"""

from __future__ import annotations

import os
import signal

import pytest
from device_support import Stream, bench, until

from idc.device.states import State

CONNECTED = [(State.CONNECTED, State.CONNECTED)]


@pytest.mark.parametrize("daemon", ["region server", "registry", "broker"])
def test_a_daemon_killed_under_a_stream(daemon: str) -> None:
    with bench("front", "back") as here:
        here.service.start_broker()
        path = here.directory / "ledger"
        name = here.controller.attach("ledger", "front", "back", {"path": str(path)}).name
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            stream.go_on()
            os.kill(here.service.processes()[daemon], signal.SIGKILL)
            for _ in range(50):
                assert stream.one()
            until(lambda: here.service.mend() == [daemon])
            for _ in range(50):
                assert stream.one()
            for end in ("back", "front"):
                here.domains[end].replace("kill")
                stream.go_on()
        stream.check(path)
        until(lambda: here.states() == CONNECTED)
        assert here.service.mend() == []
        here.controller.detach(name)


def test_what_runs_is_left_alone_and_a_service_that_cannot_start_says_so() -> None:
    with bench() as here:
        before = here.service.processes()
        assert here.service.mend() == []
        assert here.service.processes() == before
        assert set(before) == {"fd holder", "region server", "registry"}
