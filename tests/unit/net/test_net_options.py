"""What a network device is asked for: each mistake is one line that names the option; and what `ip` is told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from idc.device import find
from idc.device import options as options_of
from idc.device.driver import Device
from idc.device.states import Role
from idc.errors import MisuseError
from idc.net.addresses import commands
from idc.net.device import Net, name_of, settings
from testbed.topology import DeviceTable

if TYPE_CHECKING:
    from collections.abc import Mapping


def values(given: Mapping[str, object]) -> dict[str, options_of.Value]:
    return options_of.fill(Net.options, given, "device class net")


def device(role: Role, number: str = "0", **given: object) -> Device:
    here, peer = ("web", "database") if role is Role.FRONT else ("database", "web")
    return Device("net", number, role, here, peer, values(given), Net.service, "device", Path("/run/idc"))


@pytest.mark.parametrize(("given", "said"), [
    ({"mtu": 67}, "option mtu: 67 is less than 68"),
    ({"mtu": 65522}, "option mtu: 65522 is more than 65521"),
    ({"mtu": 1279, "back_address": "fd00::1/64"}, "option mtu: 1279 is less than 1280, which IPv6 needs"),
    ({"queues": 0}, "option queues: 0 is less than 1"),
    ({"queues": 9}, "option queues: 9 is more than 8"),
    ({"poll": -1}, "option poll: -1 is less than 0 microseconds (0 to 1000000)"),
    ({"poll": 1_000_001}, "option poll: 1000001 is more than 1000000 microseconds (0 to 1000000)"),
    ({"poll": 0.5}, "option poll: 0.5 is no int"),
    ({"front_address": "10.0.0.1/24,10.0.0.300"}, "option front_address: '10.0.0.300' is no address with a prefix"),
    ({"back_mac": "02:00:00:00:00"}, "option back_mac: '02:00:00:00:00' is no MAC address of one interface"),
    ({"front_mac": "03:00:00:00:00:01"}, "'03:00:00:00:00:01' is no MAC address of one interface"),
    ({"front_mac": "02:00:00:00:00:0A", "back_mac": "02:00:00:00:00:0a"}, "both ends have the MAC address"),
    ({"front_name": "a-name-that-is-too-long"}, "option front_name: 'a-name-that-is-too-long' is no name"),
    ({"back_name": "a/b"}, "option back_name: 'a/b' is no name of an interface"),
    ({"address": "10.0.0.1/24"}, "no option 'address'"),
])
def test_what_makes_no_sense_is_refused_in_a_line(given: dict[str, object], said: str) -> None:
    with pytest.raises(MisuseError) as raised:
        Net.plan("front", "back", values(given))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_is_installed_and_its_region_has_room_for_all_queues() -> None:
    assert find("net") is Net
    for queues in (1, 2, 8):
        channels, size = Net.plan("front", "back", values({"queues": queues}))
        assert [channel.name for channel in channels] == ["device", *(f"queue-{index}" for index in range(queues))]
        assert size >= queues * 2 * 64 * 65553


def test_what_ip_is_told() -> None:
    told = settings(device(Role.FRONT, mtu=9000, front_address="10.0.0.1/24 fd00::1/64", front_mac="02:00:00:00:00:0A"))
    assert commands("idc0", told) == [
        "link set dev idc0 address 02:00:00:00:00:0a mtu 9000 alias 'idc net-0, the other end is in database'",
        "addr replace 10.0.0.1/24 dev idc0",
        "addr replace fd00::1/64 dev idc0 nodad",
        "link set dev idc0 up",
    ]


def test_names_and_macs_are_the_same_whenever_the_drivers_come_and_differ_between_ends_and_devices() -> None:
    ends = [device(role, number) for role in Role for number in ("0", "1")]
    assert [name_of(end) for end in ends] == ["idc0", "idc1", "vif0.web", "vif1.web"]
    macs = [settings(end).mac for end in ends]
    assert len(set(macs)) == 4
    assert macs == [settings(end).mac for end in ends]
    assert all(mac.startswith("02:") for mac in macs)
    assert name_of(device(Role.BACK, back_name="lan")) == "lan"


def test_the_example_of_the_documentation_is_a_device() -> None:
    text = (Path(__file__).parents[3] / "docs/net.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (table,) = (DeviceTable(**entry) for entry in tomllib.loads(block)["devices"].values())
    Net.plan(table.frontend, table.backend, values(table.options))
    (line,) = re.findall(r"testbed attach net --frontend \w+ --backend \w+ (.*)", text)
    Net.plan("web", "db", options_of.fill(Net.options, {}, "net")
             | options_of.parse(Net.options, dict(word.split("=") for word in line.split()), "net"))
