"""The device class net between two VMs, as stock programs see it: ping, iperf3, HTTP, carriers, two at once."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from host.devices import Seen
from idc.device.states import State
from testbed.bed import Testbed
from testbed.calls import Process
from testbed.devices import LOG
from testbed.vm import Vm

pytestmark = pytest.mark.timeout(900)  # of which a slow machine needs most to boot, and to start the drivers
CONNECTED = (State.CONNECTED, State.CONNECTED)
FRONT, BACK = "idc0", "vif0.front"
ADDRESSES = {"front_address": "10.81.0.1/24,fd81::1/64", "back_address": "10.81.0.2/24,fd81::2/64"}
THERE = {4: "10.81.0.2", 6: "fd81::2"}
#: The process that has the drivers, as one word of a shell command.
KEEPER = "$(pgrep -o -f 'python3 -m guest.drivers')"
MIB = 1 << 20


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(broker=True) as bed:
        bed.boot("front", "back")
        yield bed


@pytest.fixture(scope="module")
def device(bed: Testbed) -> Iterator[Seen]:
    seen = bed.devices.attach("net", "front", "back", {"mtu": 9000, **ADDRESSES}, wait=120)
    yield seen
    bed.devices.detach(seen.name, wait=60)
    for vm, name in ((bed.vms["front"], FRONT), (bed.vms["back"], BACK)):
        assert name not in vm.succeed("ls /sys/class/net").split()


@pytest.fixture(autouse=True)
def logs(bed: Testbed, request: pytest.FixtureRequest) -> Iterator[None]:
    """What the drivers said, of a test that fails."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed != failed:
        for name, vm in bed.vms.items():
            said = vm.succeed(f"tail -n 40 {LOG}; ip addr; cat /run/idc/net-*.json || true")
            sys.stderr.write(f"--- {name}\n{said}\n")


def ping(vm: Vm, address: str) -> None:
    text = vm.succeed(["busybox", "ping", "-c", "5", "-i", "0.05", "-W", "20", address], timeout=60)
    assert " 0% packet loss" in text


def counters(vm: Vm, interface: str) -> dict[str, Any]:
    """The sums over all queues; the drivers write them twice a second."""
    queues = json.loads(vm.succeed(f"sleep 1.2; cat /run/idc/net-{interface}.json"))["queues"]
    return {name: sum(queue[name] for queue in queues) for name in queues[0] if name != "refused_with"}


def carrier(vm: Vm, interface: str, up: bool) -> None:
    vm.wait_until_succeeds(f"test $(cat /sys/class/net/{interface}/carrier) = {int(up)}", timeout=60)


def server(vm: Vm, command: list[str], port: int) -> Process:
    process = vm.spawn(command)
    vm.wait_until_succeeds(f"ss -Hltn sport = {port} | grep -q .")
    return process


def iperf(bed: Testbed, address: str, *options: str, port: int = 5201) -> float:
    """Bytes received in each second."""
    serving = server(bed.vms["back"], ["iperf3", "--server", "--one-off", "--port", str(port)], port)
    try:
        text = bed.vms["front"].succeed(["iperf3", "--client", address, "--port", str(port), "--json", "--time", "1",
                                         *options], timeout=90)
    finally:
        serving.kill()
        serving.wait(30)
    return float(json.loads(text)["end"]["sum_received"]["bytes"])


def test_the_interfaces_are_as_they_were_asked_for(bed: Testbed, device: Seen) -> None:
    assert device.states == CONNECTED
    for name, interface, address in (("front", FRONT, "10.81.0.1"), ("back", BACK, "10.81.0.2")):
        (link,) = json.loads(bed.vms[name].succeed(["ip", "-json", "addr", "show", "dev", interface]))
        assert link["mtu"] == 9000
        assert link["operstate"] == "UP"
        assert address in [entry["local"] for entry in link["addr_info"]]
        assert link["address"].startswith("02:")


@pytest.mark.parametrize("version", [4, 6])
def test_ping_in_both_directions(bed: Testbed, device: Seen, version: int) -> None:
    ping(bed.vms["front"], THERE[version])
    ping(bed.vms["back"], THERE[version][:-1] + "1")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("direction", ["out", "reverse"])
def test_tcp_crosses_in_segments_of_64_kib(bed: Testbed, device: Seen, version: int, direction: str) -> None:
    sender, interface = (bed.vms["front"], FRONT) if direction == "out" else (bed.vms["back"], BACK)
    # By itself TCP makes its pieces smaller where a round trip takes long, as on a busy machine.
    sender.succeed("sysctl -qw net.ipv4.tcp_min_tso_segs=64")
    before = counters(sender, interface)
    received = iperf(bed, THERE[version], *(["--reverse"] if direction == "reverse" else []))
    after = counters(sender, interface)
    moved = {name: after[name] - before[name] for name in before}
    assert received > MIB
    assert moved["sent_bytes"] >= received
    assert moved["sent_gso"] > 0
    assert after["sent_longest"] > 60_000
    assert after["late"] == 0


def test_jumbo_frames_cross_whole(bed: Testbed, device: Seen) -> None:
    before = counters(bed.vms["front"], FRONT)
    text = bed.vms["front"].succeed(["busybox", "ping", "-c", "4", "-i", "0.05", "-s", "8972", THERE[4]], timeout=60)
    assert " 0% packet loss" in text
    after = counters(bed.vms["front"], FRONT)
    assert after["sent_bytes"] - before["sent_bytes"] >= 4 * 9014
    assert after["sent"] - before["sent"] < 20  # in one piece each


def download(bed: Testbed, mib: int) -> None:
    """A file over HTTP, held against its checksum."""
    front, back = bed.vms["front"], bed.vms["back"]
    back.succeed(f"mkdir -p /tmp/www && head -c {mib * MIB} /dev/urandom >/tmp/www/file", timeout=600)
    serving = server(back, ["busybox", "httpd", "-f", "-p", "8080", "-h", "/tmp/www"], 8080)
    try:
        wanted = back.succeed("sha256sum </tmp/www/file", timeout=900)
        got = front.succeed(f"busybox wget -q -O - http://{THERE[4]}:8080/file | sha256sum", timeout=900)
    finally:
        serving.kill()
        serving.wait(30)
        back.succeed("rm -r /tmp/www")
    assert got == wanted


def test_a_file_over_http_arrives_as_it_was_sent(bed: Testbed, device: Seen) -> None:
    download(bed, 32)


def changes(vm: Vm, interface: str) -> int:
    return int(vm.succeed(f"cat /sys/class/net/{interface}/carrier_changes"))


def test_the_carrier_follows_the_back_end_killed_and_returning(bed: Testbed, device: Seen) -> None:
    front, back = bed.vms["front"], bed.vms["back"]
    before = changes(front, FRONT)
    back.succeed(f"kill -9 $(pgrep -P {KEEPER})")
    front.wait_until_succeeds(f"test $(cat /sys/class/net/{FRONT}/carrier_changes) -ge {before + 2}", timeout=60)
    carrier(front, FRONT, up=True)
    carrier(back, BACK, up=True)
    ping(front, THERE[4])
    ping(back, "fd81::1")  # its interface has kept its addresses


def test_the_carrier_is_down_while_the_back_end_is_away(bed: Testbed, device: Seen) -> None:
    front, back = bed.vms["front"], bed.vms["back"]
    back.succeed(f"kill {KEEPER}")
    carrier(front, FRONT, up=False)
    back.wait_until_succeeds(f"test ! -e /sys/class/net/{BACK}", timeout=60)  # unloaded in order: it goes along
    front.execute(["busybox", "ping", "-c", "3", "-i", "0.05", "-W", "1", THERE[4]])  # queued, or refused: goes nowhere
    bed.devices.prepare("back", "net")
    carrier(front, FRONT, up=True)
    front.wait_until_succeeds(f"busybox ping -c 1 -W 5 {THERE[4]}", timeout=60)


def test_two_devices_at_once_one_of_them_with_two_queues(bed: Testbed, device: Seen) -> None:
    front, back = bed.vms["front"], bed.vms["back"]
    second = bed.devices.attach("net", "front", "back", {"queues": 2, "poll": 3000, "front_address": "10.82.0.1/24",
                                "front_name": "second", "back_address": "10.82.0.2/24", "back_mac":
                                "02:00:00:00:00:99"}, number="1", wait=120)
    try:
        assert "02:00:00:00:00:99" in back.succeed("cat /sys/class/net/vif1.front/address")
        servers = [server(back, ["iperf3", "--server", "--one-off", "--port", str(port)], port)
                   for port in (5301, 5302)]
        clients = [front.spawn(["iperf3", "--client", address, "--port", str(port), "--time", "1", "--parallel", "2"])
                   for address, port in ((THERE[4], 5301), ("10.82.0.2", 5302))]
        for process in (*clients, *servers):
            result = process.wait(120)
            assert result.exit_code == 0, result.err
        for interface in (FRONT, "second"):
            assert counters(front, interface)["sent_gso"] > 0
        assert counters(front, "second")["spins_won"] > 0
        for vm, name in ((front, "second"), (back, "vif1.front")):
            queues = json.loads(vm.succeed(f"cat /run/idc/net-{name}.json"))["queues"]
            assert [queue["poll"] for queue in queues] == [0.003, 0.003]
    finally:
        bed.devices.detach(second.name, wait=60)
    assert "second" not in front.succeed("ls /sys/class/net").split()
    ping(front, THERE[4])


@pytest.mark.soak
def test_a_large_file_over_http_arrives_as_it_was_sent() -> None:
    with Testbed(broker=True) as bed:
        bed.boot(bed.spec("front"), bed.spec("back", memory_mib=2560))  # /tmp is half of it at most
        bed.devices.attach("net", "front", "back", ADDRESSES, wait=120)
        download(bed, 1024)
