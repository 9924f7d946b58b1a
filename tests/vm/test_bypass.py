"""A stack of three drivers in three VMs: the bytes bypass the middle VM, each copied once. The program is the one that
tests/process runs in three processes."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from bypass_support import BUS, BYTES, LINKS, ROLES, STACK, channels_of, topology, verify

from idc.domain import VARIABLE
from testbed.bed import Testbed
from testbed.build import open_testbed

LIMIT = 120.0


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with open_testbed(topology()) as bed:
        for vm in bed.vms.values():
            vm.copy_to(STACK, "/tmp/stack.py")
        yield bed


def stack(bed: Testbed, names: tuple[str, ...], route: str) -> dict[str, dict[str, Any]]:
    regions = [bed.regions[name] for name in names]
    running = []
    for role in ROLES:
        places = " ".join(f"{channel}=ivshmem:{region.name}/{channel}" for region in regions
                          if role in region.sockets for channel in channels_of(region, role))
        running.append(bed.vms[role].spawn(["python3", "/tmp/stack.py", role, route], env={VARIABLE: places}))
    outputs = []
    for role, process in zip(ROLES, running, strict=True):
        result = process.wait(LIMIT)
        assert result.exit_code == 0, f"{role}: {result.err}"
        outputs.append(result.out)
    return verify(outputs, {"host": "host copy", "direct": "direct"}[route])


def counts(bed: Testbed) -> dict[str, dict[str, int]]:
    status = bed.broker_status()
    assert status is not None
    found: dict[str, dict[str, int]] = status["counts"]
    return found


def test_every_vm_has_its_control_link(bed: Testbed) -> None:
    for name, vm in bed.vms.items():
        assert vm.succeed("echo $IDC_CONTROL") == f"ivshmem:control-{name}/control\n"
        assert f"control-{name}" in vm.succeed("python3 -m guest.ivshmem")
        others = [role for role in ROLES if role != name]
        assert not any(f"control-{other}" in vm.succeed("python3 -m guest.ivshmem") for other in others)


def test_the_broker_copies_each_byte_once_between_vms_that_share_no_region(bed: Testbed) -> None:
    stack(bed, LINKS, "host")
    found = counts(bed)
    assert found["back"]["copied"] == 2 * BYTES
    assert found["front"]["copied"] == found["middle"]["copied"] == 0
    assert sum(count["refused"] for count in found.values()) == 0


def test_the_broker_killed_and_back_copies_as_before(bed: Testbed) -> None:
    assert bed.service is not None
    os.kill(bed.service.broker_pid, signal.SIGKILL)
    bed.service.restart_broker()
    stack(bed, LINKS, "host")
    assert counts(bed)["back"]["copied"] == 2 * BYTES
    assert bed.service.members("control-back")["back"] == (1, True)


def test_the_back_end_copies_each_byte_once_on_a_bus(bed: Testbed) -> None:
    before = counts(bed)["back"]["copied"]
    stack(bed, BUS, "direct")
    assert counts(bed)["back"]["copied"] == before


def test_the_owners_vm_killed_is_one_refusal(bed: Testbed) -> None:
    def places(role: str) -> dict[str, str]:
        name = {"front": "upper", "back": "lower"}[role]
        return {VARIABLE: f"{name}=ivshmem:{name}/{name}"}

    front, back = bed.vms["front"], bed.vms["back"]
    for vm in (front, back):
        vm.copy_to(STACK.with_name("two.py"), "/tmp/two.py")
    owner = front.spawn(["python3", "/tmp/two.py", "owner"], env=places("front"))
    reference = next(iter(owner.lines(LIMIT))).strip()
    asker = back.spawn(["python3", "/tmp/two.py", "asker", reference], env=places("back"))
    heard = asker.lines(LIMIT)
    assert [next(heard).strip() for _ in range(5)] == ["ok"] * 5
    front.crash()
    last = [line.strip() for line in heard][-1]
    assert last in ("error STALE", "error FAILED", "error NO_ROUTE")
    assert asker.wait(LIMIT).exit_code == 0
    status = bed.broker_status()
    assert status is not None
    assert "front" not in status["domains"]
    assert bed.service is not None
    assert bed.service.members("control-front")["front"] == (1, False)
