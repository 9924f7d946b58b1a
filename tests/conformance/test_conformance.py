"""The conformance suite over every transport: one process, two processes with shared memory, TCP between processes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running

sys.path.insert(0, str(Path(__file__).resolve().parent))

from liveness import PLACES, beside
from remote_scenarios import REMOTE_SCENARIOS
from scenarios import SCENARIOS as PLAIN_SCENARIOS

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENARIOS = PLAIN_SCENARIOS | REMOTE_SCENARIOS
SIDE = Path(__file__).with_name("side.py")
LIMIT = 120.0

pytestmark = pytest.mark.parametrize("name", SCENARIOS)


def processes(name: str, front: str, back: str) -> None:
    """Both sides, each in a process of its own."""
    ends = [subprocess.Popen([sys.executable, str(SIDE), side, address, name], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
            for side, address in (("front", front), ("back", back))]
    try:
        for end in ends:
            out, errors = end.communicate(timeout=LIMIT)
            assert end.returncode == 0, errors
            assert out == f"{name} ok\n"
    finally:
        for end in ends:
            end.kill()
            end.communicate()


def test_one_process(name: str) -> None:
    """Two threads, queues between them."""
    address = f"local:{name}-{secrets.token_hex(4)}"
    with ThreadPoolExecutor(2) as pool:
        sides = [pool.submit(side, address) for side in (SCENARIOS[name].front, SCENARIOS[name].back)]
        for side in sides:
            side.result(timeout=LIMIT)


@pytest.fixture(scope="module")
def sockets() -> Iterator[dict[str, Path]]:
    """A region served to two host processes."""
    members = {"front": Rights.RW, "back": Rights.RW}
    channels = [ChannelSpec(beside("service", n), Kind.MESSAGE, "front", "back", 64 * 512, 512) for n in range(PLACES)]
    with running() as service:
        region = service.create(RegionSpec("link", 1 << 20, members, channels))
        yield {member: region.socket(member) for member in members}


def test_two_processes_with_shared_memory(name: str, sockets: dict[str, Path]) -> None:
    """Rings and doorbells."""
    processes(name, f"member:{sockets['front']}/service", f"member:{sockets['back']}/service")


def free_ports(host: str, family: socket.AddressFamily) -> int:
    """The first of PLACES ports in a row that nobody uses."""
    while True:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            first = probes.enter_context(socket.create_server((host, 0), family=family)).getsockname()[1]
            for n in range(1, PLACES):
                probes.enter_context(socket.create_server((host, first + n), family=family))
            return int(first)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_two_processes_over_tcp(name: str, family: socket.AddressFamily) -> None:
    """No shared memory at all."""
    loopback = "127.0.0.1" if family == socket.AF_INET else "[::1]"
    port = free_ports(loopback.strip("[]"), family)
    processes(name, f"tcp-dial:{loopback}:{port}", f"tcp-listen:{loopback}:{port}")
