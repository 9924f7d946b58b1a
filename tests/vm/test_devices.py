"""Devices between running VMs, by the commands of a user: a class that a third party brings, attached at run time."""

import sys
import time
from collections.abc import Iterator

import pytest
from device_support import install

from host.devices import DeviceError
from idc.device.states import State
from testbed.bed import Testbed
from testbed.devices import LOG
from testbed.errors import SpecError

LIMIT = 120.0
CONNECTED = (State.CONNECTED, State.CONNECTED)
PROGRAM = """
import sys
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.errors import OutcomeUnknownError
from idc.transport.address import open_port

device, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
unknown = []
with Caller(open_port(f"unix:/run/idc/{device}"), Service(device).resources()) as program:
    for number in range(first, last):
        try:
            answer = program.transact(b"%d " % number, timeout=60)
        except OutcomeUnknownError:
            unknown.append(number)
        else:
            assert answer == b"%d " % number * 2, (number, answer)
        print(number, flush=True)
print("unknown", *unknown)
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    classes = install(tmp_path_factory.mktemp("site") / "classes")
    sys.path.insert(0, str(classes))
    try:
        with Testbed(broker=True) as bed:
            bed.boot("front", "back")
            yield bed
    finally:
        sys.path.remove(str(classes))


def use(bed: Testbed, first: int, last: int, device: str = "echo-0") -> list[str]:
    return bed.vms["front"].succeed(["python3", "-c", PROGRAM, device, str(first), str(last)], timeout=LIMIT).split()


def links(bed: Testbed) -> list[str]:
    return [name for name in bed.regions if name.startswith("dev-")]


def nothing_left(bed: Testbed, *, spares: int = 0) -> None:
    assert bed.devices.list() == []
    assert len(links(bed)) == spares
    for vm in bed.vms.values():
        assert len([device for device in vm.devices if "dev-" in device]) == spares


def test_attached_to_running_vms_used_its_back_end_killed_and_detached(bed: Testbed) -> None:
    seen = bed.devices.attach("echo", "front", "back", {"times": 2}, wait=LIMIT)
    try:
        assert seen.states == CONNECTED
        assert use(bed, 0, 50)[-1] == "unknown"
        program = bed.vms["front"].spawn(["python3", "-c", PROGRAM, "echo-0", "100", "400"])
        bed.vms["back"].wait_until_succeeds(f"test -s {LOG}")
        keeper = "$(pgrep -o -f 'python3 -m guest.drivers')"
        bed.vms["back"].succeed(f"kill -9 $(pgrep -P {keeper})")
        result = program.wait(LIMIT)
        assert result.exit_code == 0, result.err
        assert len(result.out.partition("unknown")[2].split()) <= 1  # it sends one after the other
        assert use(bed, 500, 520)[-1] == "unknown"
    except BaseException:
        for name, vm in bed.vms.items():
            sys.stderr.write(f"--- {name}\n{vm.succeed(f'cat {LOG}')}\n")
        raise
    finally:
        bed.devices.detach(seen.name, wait=LIMIT)
    nothing_left(bed)


def test_no_free_port_leaves_nothing(bed: Testbed) -> None:
    attached = []
    try:
        for number in range(3):  # the fourth port is the control region's
            seen = bed.devices.attach("echo", "front", "back", number=str(number), wait=LIMIT)
            attached.append(seen.name)
        with pytest.raises(SpecError, match="all 4 region ports are taken"):
            bed.devices.attach("echo", "front", "back", number="3")
        assert [seen.states for seen in bed.devices.list()] == [CONNECTED] * 3
        assert len(links(bed)) == 3
    finally:
        for name in attached:
            bed.devices.detach(name, wait=LIMIT)
    nothing_left(bed)


def test_a_link_that_is_kept_serves_the_next_device(bed: Testbed) -> None:
    with pytest.raises(DeviceError, match="frontend 'fornt' is no domain"):
        bed.devices.attach("echo", "fornt", "back")
    first = bed.devices.attach("echo", "front", "back", {"times": 2}, wait=LIMIT)
    bed.devices.detach(first.name, wait=LIMIT, keep_link=True)
    nothing_left(bed, spares=1)
    second = bed.devices.attach("echo", "front", "back", {"times": 2}, wait=LIMIT)
    assert second.record.link == first.record.link
    assert use(bed, 0, 5)[-1] == "unknown"
    bed.devices.detach(second.name, wait=LIMIT)
    nothing_left(bed)
    assert second.record.link not in bed.vms["front"].succeed("python3 -m guest.ivshmem")


def test_a_device_whose_back_end_is_stuck_is_detached_by_force(bed: Testbed) -> None:
    back = bed.vms["back"]
    seen = bed.devices.attach("echo", "front", "back", wait=LIMIT)
    back.succeed(["pkill", "-STOP", "-f", "guest.drivers"])
    with pytest.raises(DeviceError, match=r"the back end \(connected\) does not close within 0.5 s.* by force"):
        bed.devices.detach(seen.name, wait=0.5)
    assert bed.devices.detach(seen.name, wait=0.5, force=True) == ("back",)
    assert bed.devices.list() == []
    assert links(bed) == []
    assert [name for name in bed.vms["front"].devices if "dev-" in name] == []
    held = f"iv-{seen.record.link}"
    assert held in back.devices
    # Once its drivers go on it lets go, and is as good as before.
    back.succeed(["pkill", "-CONT", "-f", "guest.drivers"])
    deadline = time.monotonic() + LIMIT
    while held in back.devices:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = bed.devices.attach("echo", "front", "back", {"times": 2}, wait=LIMIT)
    assert use(bed, 0, 5)[-1] == "unknown"
    bed.devices.detach(again.name, wait=LIMIT)
    nothing_left(bed)
    assert not [one for one in back.qmp("query-chardev") if "dev-" in one["label"]]
