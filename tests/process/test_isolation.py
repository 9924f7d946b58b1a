"""A region taken away from a member that need not agree, between host processes: what is left at either side."""

from __future__ import annotations

import mmap
import os
import struct

import pytest
from region_support import link, running, settle, short_directory, until

from host.errors import PeerError, ProtocolError, RegionError, ServerError
from host.ivshmem.client import Peer, connect
from host.region import PlainAttachment, RegionService, RegionSpec
from host.revocation import Worth
from idc.layout import HEADER_BYTES, Rights, parse_header

AT = 512 << 10  # behind header and channel
SECRET = b"what the pair alone knows"


def blocks(memory: int) -> int:
    return os.fstat(memory).st_blocks


def test_the_revoked_member_keeps_a_mapping_that_leads_nowhere() -> None:
    with running() as service:
        old = service.create(link())
        with connect(old.socket("front")) as front, connect(old.socket("back")) as back:
            front.memory[AT : AT + len(SECRET)] = SECRET
            done = service.abandon(old, "back")
            assert (done.region, done.member, done.held) == ("link", "back", Worth.ABANDONED)
            assert done.fresh is not None
            assert done.holders == ("back", "front")
            assert service.regions() == ["link.1"]
            assert bytes(back.memory[:]) == bytes(back.size)  # header page and all
            with connect(done.fresh.socket("front")) as moved:
                assert bytes(moved.memory[AT : AT + len(SECRET)]) == SECRET
                back.memory[AT : AT + 4] = b"evil"
                back.memory[0:8] = b"\xff" * 8
                assert bytes(moved.memory[AT : AT + len(SECRET)]) == SECRET
                moved.memory[AT : AT + 5] = b"fresh"
                assert bytes(back.memory[AT : AT + 5]) == b"evil\0"
                # its eventfds are the old region's
                back.ring(0, 1)
                assert moved.wait(1, 0.05) == 0
                assert parse_header(moved.memory[:HEADER_BYTES], moved.size).name == "link.1"


def test_the_layout_stays_and_nobody_can_be_who_was_taken_out() -> None:
    with running() as service:
        old = service.create(link(third=Rights.RO))
        fresh = service.abandon(old, "back").fresh
        assert fresh is not None
        assert fresh.header.channels == old.header.channels
        assert fresh.header.parts == old.header.parts
        assert [member.name for member in fresh.header.members] == ["front", "revoked.1", "third"]
        assert fresh.header.uuid != old.header.uuid
        assert isinstance(fresh.attachment("third"), PlainAttachment)
        for name in ("back", "revoked.1"):
            with pytest.raises(RegionError, match=name):
                fresh.attachment(name)
            with pytest.raises(RegionError, match="rw members: front"):
                fresh.socket(name)
            with pytest.raises(RegionError, match="no member"):
                service.abandon(fresh, name)
        with pytest.raises(RegionError, match="no member can be called"):
            service.create(RegionSpec("more", 1 << 20, {"revoked.1": Rights.RW}))


def test_a_read_only_member_is_taken_out() -> None:
    with running() as service:
        old = service.create(link(third=Rights.RO))
        with connect(old.socket("front")) as front:
            fd = old.open_memory()
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as third:
                os.close(fd)
                front.memory[AT : AT + len(SECRET)] = SECRET
                assert third[AT : AT + len(SECRET)] == SECRET
                done = service.abandon(old, "third")
                assert third[:] == bytes(len(third))
        assert done.holders == ("front", "third")


def test_only_what_is_asked_for_is_kept() -> None:
    with running() as service:
        old = service.create(link())
        with connect(old.socket("front")) as front:
            front.memory[AT : AT + 8] = b"12345678"
            for offset, length in ((0, 8), (HEADER_BYTES, old.header.size), (AT, -1)):
                with pytest.raises(RegionError, match="cannot be kept"):
                    service.abandon(old, "back", live=[(offset, length)])
            fresh = service.abandon(old, "back", live=[(AT + 2, 3)]).fresh
        assert fresh is not None
        fd = fresh.open_memory()
        try:
            assert os.pread(fd, 8, AT) == b"\0\x00345\0\0\0"
        finally:
            os.close(fd)


def test_the_memory_goes_back_and_the_copy_keeps_holes() -> None:
    with running() as service:
        old = service.create(link(size=64 << 20))
        memory = old.open_memory(writable=True)
        try:
            for at in range(AT, AT + (8 << 20), 4096):
                os.pwrite(memory, b"x", at)
            used = blocks(memory)
            fresh = service.abandon(old, "back").fresh
            assert fresh is not None
            assert blocks(memory) == 0
            assert os.fstat(memory).st_size == old.header.size
            copy = fresh.open_memory()
            assert blocks(copy) == used
            os.close(copy)
        finally:
            os.close(memory)


def test_dead_mappings_are_counted_and_capped() -> None:
    with short_directory() as directory, RegionService(directory, dead_cap=2) as service:
        for name in ("one", "two"):
            service.abandon(service.create(link(name)), "back")
        assert service.dead == {"back": ("one", "two")}
        third = service.create(link("three"))
        with connect(third.socket("front")) as front, connect(third.socket("back")):
            with pytest.raises(RegionError, match=r"back holds 2 dead mappings already \(one, two\), which is the cap"):
                service.abandon(third, "back")
            front.memory[AT] = 1
            assert service.members("three") == {"front": (1, True), "back": (1, True)}  # nothing was changed
            service.released("one", "back")
            service.released("one", "back")
            service.abandon(third, "back")
            assert service.dead == {"back": ("two", "three"), "front": ("three",)}
        with pytest.raises(RegionError, match="was abandoned and is still mapped by back, front"):
            service.create(link("three"))
        for domain in ("front", "back"):
            service.released("three", domain)
        service.create(link("three"))


def test_revoked_one_after_the_other() -> None:
    with running() as service:
        region = service.create(link(third=Rights.RW))
        for member, name in (("back", "link.1"), ("third", "link.2")):
            fresh = service.abandon(region, member).fresh
            assert fresh is not None
            assert fresh.name == name
            region = fresh
        assert [member.name for member in region.header.members] == ["front", "revoked.1", "revoked.2"]


def test_a_region_of_that_name_that_is_another_is_left_alone() -> None:
    with running() as service:
        stale = service.create(link())
        service.drop("link")
        with pytest.raises(RegionError, match="no region 'link'"):
            service.abandon(stale, "back")
        region = service.create(link())
        with connect(region.socket("front")) as front:
            front.memory[AT] = 7
            with pytest.raises(RegionError, match="any more"):
                service.abandon(stale, "back")
            assert front.memory[AT] == 7
        assert service.regions() == ["link"]
        assert service.dead == {}


def test_a_control_link_cannot_be_abandoned() -> None:
    with running() as service:
        region = service.control("front")
        with pytest.raises(RegionError, match="control link"):
            service.abandon(region, "front")


def test_the_server_killed_before_and_after() -> None:
    with running() as service:
        old = service.create(link())
        with connect(old.socket("front")) as front, connect(old.socket("back")) as back:
            front.memory[AT : AT + len(SECRET)] = SECRET
            settle(service)
            os.kill(service.server_pid, 9)
            with pytest.raises(ServerError):
                service.abandon(old, "back")
            assert bytes(back.memory[AT : AT + len(SECRET)]) == SECRET
            service.restart()
            assert service.members("link") == {"front": (1, True), "back": (1, True)}
            fresh = service.abandon(old, "back").fresh
            assert fresh is not None
            service.restart()
            assert service.regions() == ["link.1"]
            with connect(fresh.socket("front")) as moved:
                assert bytes(moved.memory[AT : AT + len(SECRET)]) == SECRET


def test_who_was_taken_out_cannot_come_back_by_its_old_socket() -> None:
    with running() as service:
        old = service.create(link())
        with connect(old.socket("back")) as back:
            service.abandon(old, "back")
            until("the server cuts it off", lambda: _ended(back))
        with pytest.raises((OSError, PeerError, ProtocolError)):
            connect(old.socket("back"))


def _ended(peer: Peer) -> bool:
    try:
        peer.update()
    except PeerError:
        return True
    return False


def test_the_live_word_of_who_was_taken_out_stays_gone() -> None:
    with running() as service:
        old = service.create(link())
        with connect(old.socket("front")), connect(old.socket("back")):
            fresh = service.abandon(old, "back").fresh
        assert fresh is not None
        with connect(fresh.socket("front")) as moved:
            entry = fresh.header.members[1]
            assert struct.unpack_from("<Q", moved.memory, entry.word_offset) == (0,)
