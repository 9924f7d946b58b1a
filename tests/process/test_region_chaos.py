"""Members that come and go in any order while the server is killed at any moment: the books always agree."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from region_support import DEADLINE, descriptors, running, until, word

from host.errors import HostError
from host.ivshmem.client import Peer, connect
from host.region import Region, RegionService, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from pathlib import Path

MEMBERS = ("watch", "m1", "m2", "m3")
CHANNELS = [ChannelSpec(f"c{i}", Kind.BYTE, "watch", f"m{i}", 4096) for i in (1, 2, 3)]


def kill_soon(pid: int, delay: float) -> threading.Timer:
    """Kill the server in the middle of whatever it will be doing then."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(delay, kill)
    timer.start()
    return timer


def write_garbage(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.connect(str(path))
        sock.send(b"garbage")


def check(service: RegionService, region: Region, watch: Peer, peers: dict[str, Peer]) -> None:
    """Whoever is connected is present, whoever is not is gone, in the server's books and in the header page."""

    def agree() -> bool:
        books = service.members(region.name)
        return all(
            word(watch, region.header.member(name).id) == books[name] and books[name][1] == (name in peers)
            for name in MEMBERS[1:]
        )

    until("books that agree", agree)
    assert word(watch, 0) == (1, True)
    assert watch.update() == []
    for name, peer in peers.items():
        watch.ring(peer.id, 1)
        until(f"a doorbell at {name}", lambda p=peer: p.wait(1, DEADLINE) > 0)  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
def test_books_agree_whatever_dies_when(seed: int) -> None:
    chance = random.Random(seed)
    with running() as service:
        region = service.create(RegionSpec("link", 1 << 20, dict.fromkeys(MEMBERS, Rights.RW), CHANNELS))
        with connect(region.socket("watch")) as watch:
            service.members("link")  # the greeting is in the books; one that is not may be cut off
            files = descriptors(service.holder_pid)
            peers: dict[str, Peer] = {}
            for _ in range(25):
                timer = kill_soon(service.server_pid, chance.random() * 0.004) if chance.random() < 0.4 else None
                for name in chance.sample(MEMBERS[1:], 2):
                    if name in peers:
                        peers.pop(name).close()
                    elif chance.random() < 0.2:
                        write_garbage(region.socket(name))
                    elif timer is None:
                        peers[name] = connect(region.socket(name))
                    else:
                        # Killed while it greets: such a client is cut off, or waits for a server in vain.
                        with contextlib.suppress(HostError):
                            peers[name] = connect(region.socket(name), timeout=0.05)
                if timer is not None:
                    timer.join()
                    service.restart()
                    for name, peer in list(peers.items()):
                        try:
                            service.members("link")
                            peer.update()
                        except HostError:
                            peers.pop(name).close()
                check(service, region, watch, peers)
            for peer in peers.values():
                peer.close()
            until("no descriptor kept", lambda: descriptors(service.holder_pid) == files)
