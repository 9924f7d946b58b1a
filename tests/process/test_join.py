"""A host process joins a served region as `idc` sees regions: same header, doorbells both ways, nothing left."""

from __future__ import annotations

import os

import pytest
from region_support import CHANNEL, DEADLINE, PAIR, link, running, settle

from host.errors import PeerError
from host.ivshmem.client import join
from host.region import RegionSpec
from idc.errors import BackPressuredError, MisuseError
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


def test_each_member_allocates_from_its_own_part() -> None:
    with running() as service:
        served = service.create(RegionSpec("link", 1 << 20, PAIR, [CHANNEL], parts={"front": 8192}))
        with join(served.socket("front")) as front, join(served.socket("back")) as back:
            buffer = front.pool.allocate(8192)
            (part,) = front.header.parts
            assert list(front.pool.pages(buffer)) == [part.offset, part.offset + 4096]
            with pytest.raises(BackPressuredError):
                front.pool.allocate(1)
            assert front.pools == (front.pool,)
            assert back.pools == ()
            with pytest.raises(MisuseError, match="member 1 owns no part of region 'link'"):
                _ = back.pool
