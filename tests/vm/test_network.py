"""The network between VMs."""

import os
import sys
from pathlib import Path

import pytest

from testbed import network
from testbed.errors import NetworkError
from testbed.run import Run
from testbed.vm import boot_all

from .conftest import SpecMaker


@pytest.mark.parametrize("wish", ["tap", "stream"])
def test_two_vms_reach_each_other(spec: SpecMaker, run: Run, wish: str) -> None:
    if wish == "tap" and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        with pytest.raises(NetworkError, match="/dev/net/tun"):
            network.make(2, wish="tap")
        return
    before = set(os.listdir("/sys/class/net"))
    with network.make(2, wish=wish) as net:  # type: ignore[arg-type]
        members = net.members
        vms = boot_all([spec(f"n{i}", nics=(m.nic,), ip=m.ip) for i, m in enumerate(members)], run)
    assert set(os.listdir("/sys/class/net")) == before, "the network shows outside its namespace"
    one, two = vms
    with one, two:
        port = 5201
        server = two.spawn(["iperf3", "-s", "-1", "-p", str(port)])
        two.wait_until_succeeds(f"ss -ltn | grep -q :{port}")
        one.succeed(f"iperf3 -c {members[1].address} -p {port} -n 1M")
        assert server.wait(60).exit_code == 0
        offloads = "1" if wish == "tap" else "0"
        mtu = one.succeed("cat /sys/class/net/eth0/mtu").strip()
        assert mtu == (str(network.TAP_MTU) if offloads == "1" else "1500")


def test_more_than_two_vms_need_taps() -> None:
    with pytest.raises(NetworkError, match="need TAPs"):
        network.make(3, wish="stream")


def test_a_tap_that_cannot_be_had_is_said_to_be_and_what_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "python"
    code = "from testbed import network; network._TUN = '/no/tun'; network.main()"
    child.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "{code}" "$@"\n')
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(NetworkError, match="cannot make a TAP: ") as caught:
        network.make(2, wish="tap")
    assert 'a network of kind "stream" joins two VMs without any' in caught.value.hint
    assert "\n" not in caught.value.message
    with network.make(2) as net:
        assert net.kind == "stream"
        assert net.reason.startswith("cannot make a TAP: ")
