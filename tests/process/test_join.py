"""A host process joins a served region as `idc` sees regions: same header, doorbells both ways, nothing left."""

from __future__ import annotations

import os

import pytest
from region_support import DEADLINE, link, running, settle

from host.errors import PeerError
from host.ivshmem.client import join
from idc.region import wait_event


def test_join_gives_a_region_with_working_doorbells() -> None:
    with running() as service:
        served = service.create(link())
        files = len(os.listdir("/proc/self/fd"))
        with join(served.socket("front")) as front, join(served.socket("back")) as back:
            settle(service)
            assert (front.member, back.member) == (0, 1)
            assert front.header.uuid == back.header.uuid == served.header.uuid
            front.memory[90_000] = 9
            assert back.memory[90_000] == 9
            front.bell(1, 2).ring()
            assert wait_event(back.events[2], DEADLINE)
            with pytest.raises(PeerError):
                front.bell(5, 0)
        assert len(os.listdir("/proc/self/fd")) == files
