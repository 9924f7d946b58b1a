"""The registry between VMs: they find each other's keys, watches fire, and a third one's private key stays private."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from idc.registry import Registry
from idc.transport.address import open_port
from testbed.bed import Testbed

NAMES = ("front", "back", "third")
LIMIT = 120.0
PROGRAM = """
import json, sys
from idc.errors import DeniedError
from idc.registry import Permissions, Permit, Registry

def tell(**what):
    print(json.dumps(what), flush=True)

def denied(path):
    try:
        registry.read(path)
    except DeniedError:
        return True

peer, *others = sys.argv[1:]
with Registry.here(timeout=60) as registry:
    home = registry.home
    registry.write(f"{home}/secret", "x")
    registry.write(f"{home}/up", "1", ephemeral=True)
    registry.write(f"{home}/open", registry.domain)
    registry.set_permissions(f"{home}/open", Permissions(registry.domain, Permit.READ))
    events = []
    registry.watch(f"/domain/{peer}/open", events.append)

    def seen():
        return None if denied(f"/domain/{peer}/open") else registry.get(f"/domain/{peer}/open")

    while not seen():
        registry.pump(1.0)
    tell(domain=registry.domain, peer=seen().decode(),
         denied=[denied(f"/domain/{who}/{what}") for who in others for what in ("secret", "absent")])
    told = len(events)
    while seen() != b"again":
        registry.pump(1.0)
    tell(fired=len(events) > told, path=events[-1].path)
    registry.watch(f"{home}/stay", events.append)
    while registry.exists(f"{home}/stay"):
        registry.pump(1.0)
"""
READ = """
from idc.registry import Registry
with Registry.here(timeout=60) as registry:
    print(registry.read(f"{registry.home}/kept").decode())
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never", broker=True) as bed:
        bed.boot(*NAMES)
        yield bed


def test_the_registry_killed_under_vms_comes_back_with_their_keys(bed: Testbed) -> None:
    assert bed.service is not None
    vm = bed.vms["third"]
    assert vm.succeed("echo $IDC_REGISTRY") == "ivshmem:control-third/registry\n"
    with Registry(open_port(bed.registry_address), timeout=60) as host:
        host.write("/domain/third/kept", "v")
        assert vm.succeed(["python3", "-c", READ], timeout=LIMIT) == "v\n"
        bed.service.restart_registry()
        assert vm.succeed(["python3", "-c", READ], timeout=LIMIT) == "v\n"
        host.rm("/domain/third/kept")


def test_two_vms_see_each_others_keys_and_a_third_ones_stay_private(bed: Testbed) -> None:
    peers = {"front": "back", "back": "front", "third": "front"}
    with Registry(open_port(bed.registry_address), timeout=60) as host:
        running, lines = {}, {}
        for name, peer in peers.items():
            host.write(f"/domain/{name}/stay", "")
            others = [other for other in NAMES if other != name]
            running[name] = bed.vms[name].spawn(["python3", "-c", PROGRAM, peer, *others])
            lines[name] = running[name].lines(LIMIT)
        for name, peer in peers.items():
            facts: dict[str, Any] = json.loads(next(lines[name]))
            assert facts == {"domain": name, "peer": peer, "denied": [True] * 4}
        for name in NAMES:
            host.write(f"/domain/{name}/open", "again")
        for name, peer in peers.items():
            assert json.loads(next(lines[name])) == {"fired": True, "path": f"/domain/{peer}/open"}
        assert host.read("/domain/back/up") == b"1"
        bed.vms["back"].close()
        host.watch("/domain/back/up", lambda _event: None)
        while host.exists("/domain/back/up"):
            host.pump(1.0)
        for name in ("front", "third"):
            host.rm(f"/domain/{name}/stay")
            assert running[name].wait(LIMIT).exit_code == 0
            assert host.list(f"/domain/{name}") == ["open", "secret"]
        assert host.list("/domain/back") == ["open", "secret", "stay"]
