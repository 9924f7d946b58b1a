"""The device class net between two host processes, each in a network namespace of its own: real TAP interfaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from device_support import Bench, bench, until

from host.devices import DeviceError
from idc.device.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs_root,
              pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists() or not shutil.which("ip"),
                                 reason="takes root, /dev/net/tun and iproute2")]
CONNECTED = (State.CONNECTED, State.CONNECTED)
OPTIONS = {"mtu": 65521, "front_address": "10.83.0.1/24,fd83::1/64", "back_address": "10.83.0.2/24,fd83::2/64"}
#: Sends datagrams of these lengths to an address and says what comes back; or sends back what comes.
ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(20)
if sys.argv[2] == "serve":
    s.bind((sys.argv[1], 7))
    print("ready", flush=True)
    while True:
        s.sendto(*s.recvfrom(65536))
for length in map(int, sys.argv[2:]):
    s.sendto(bytes(length), (sys.argv[1], 7))
    print(len(s.recvfrom(65536)[0]))
"""


@contextlib.contextmanager
def domains() -> Iterator[Bench]:
    with bench("front", "back", start=False) as here:
        for domain in here.domains.values():
            domain.prefix = ("unshare", "--net")
            domain.start()
        yield here


def inside(here: Bench, name: str, *command: str) -> list[str]:
    """A command in the domain's namespace."""
    process = here.domains[name].process
    assert process is not None
    return ["nsenter", "--net", "--target", str(process.pid), *command]


def run(here: Bench, name: str, *command: str) -> str:
    return subprocess.run(inside(here, name, *command), capture_output=True, text=True, check=True, timeout=60).stdout


def link(here: Bench, name: str, interface: str) -> dict[str, object]:
    found = json.loads(run(here, name, "ip", "-json", "link", "show"))
    return next((entry for entry in found if entry["ifname"] == interface), {})


def up(here: Bench, name: str, interface: str) -> bool:
    return "LOWER_UP" in str(link(here, name, interface).get("flags"))


@contextlib.contextmanager
def echo(here: Bench, address: str) -> Iterator[None]:
    serving = subprocess.Popen(inside(here, "back", sys.executable, "-c", ECHO, address, "serve"),
                               stdout=subprocess.PIPE)
    assert serving.stdout is not None
    try:
        assert serving.stdout.readline() == b"ready\n"
        yield
    finally:
        serving.kill()
        serving.wait()
        serving.stdout.close()


def test_datagrams_cross_and_the_carrier_follows_the_back_end() -> None:
    with domains() as here:
        seen = here.controller.attach("net", "front", "back", OPTIONS, wait=60)
        assert seen.states == CONNECTED
        assert link(here, "front", "idc0")["mtu"] == link(here, "back", "vif0.front")["mtu"] == 65521
        for address in ("10.83.0.2", "fd83::2"):
            with echo(here, address):
                said = run(here, "front", sys.executable, "-c", ECHO, address, "1", "1400", "9000", "65000")
                assert said.split() == ["1", "1400", "9000", "65000"]
        os.kill(here.domains["back"].worker, 9)
        until(lambda: not up(here, "front", "idc0"))
        until(lambda: up(here, "front", "idc0") and up(here, "back", "vif0.front"))
        with echo(here, "10.83.0.2"):
            assert run(here, "front", sys.executable, "-c", ECHO, "10.83.0.2", "9000").split() == ["9000"]
        here.domains["back"].stop()
        until(lambda: not up(here, "front", "idc0"))
        here.controller.detach(seen.name)
        assert link(here, "front", "idc0") == {}


def test_a_name_that_is_taken_is_said_and_nothing_is_left() -> None:
    with domains() as here:
        until(lambda: all("has its drivers" in domain.log.read_text() for domain in here.domains.values()))
        with pytest.raises(DeviceError, match="an interface lo is there already, and is no TAP"):
            here.controller.attach("net", "front", "back", {"front_name": "lo"}, wait=4)
        assert link(here, "back", "vif0.front") == {}
        assert here.controller.devices() == []
