"""How VMs are joined, as far as it needs no VM: vhost where it can be had, and what a result says of it."""

import os
from pathlib import Path

import pytest

from testbed import network
from testbed.errors import NetworkError


@pytest.fixture
def taps() -> list[int]:
    return [os.open("/dev/null", os.O_RDWR) for _ in range(2)]


def test_vhost_is_on_where_its_device_opens(taps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_VHOST", "/dev/null")
    with network._tap_network(list(taps), 65521, 3) as made:
        assert (made.kind, made.vhost, made.reason) == ("tap", "on", "")
        assert made.description == "tap (bridge, vnet headers, offloads, MTU 65521, vhost)"
        for member, tap in zip(made.members, taps, strict=True):
            assert member.nic.fds[0] == tap
            assert len(set(member.nic.fds)) == 2
            assert member.nic.netdev == f"tap,fd={tap},vhost=on,vhostforce=on,vhostfd={member.nic.fds[1]}"
        held = [fd for member in made.members for fd in member.nic.fds]
        assert len(set(held)) == 4
    for fd in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_without_its_device_it_is_off_and_why(taps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_VHOST", str(tmp_path / "vhost-net"))
    with network._tap_network(list(taps), 1500, 0) as made:
        assert made.vhost == f"off: this machine has no {tmp_path / 'vhost-net'} (kernel module vhost_net)"
        assert made.description == "tap (bridge, vnet headers, offloads, MTU 1500)"
        assert [member.nic.netdev for member in made.members] == [f"tap,fd={tap}" for tap in taps]
    monkeypatch.setattr(network, "_VHOST", str(tmp_path))
    with network._tap_network([os.open("/dev/null", os.O_RDWR)], 1500, 0) as made:
        assert made.vhost == f"off: {tmp_path} may not be opened by this user: Is a directory"


def test_a_result_says_whether_its_vms_had_taps(taps: list[int]) -> None:
    with network._tap_network(list(taps), 1500, 0) as made:
        assert network.over_tap({"network": made.description}) is True
    with network.make(2, wish="stream") as made:
        assert network.over_tap({"network": made.description}) is False
        assert made.vhost == "off: it is for TAPs only"
    assert network.over_tap({"cpu": "one"}) is None
    with pytest.raises(NetworkError, match="has no bridge"):
        network.user(1).namespace()
