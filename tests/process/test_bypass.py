"""A stack of three drivers in three processes: the bytes bypass the middle, each copied once. As VMs: tests/vm."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from bypass_support import BUS, BYTES, LINKS, ROLES, STACK, channels_of, specs, verify
from region_support import running

from host.broker import CHANNEL
from idc.domain import VARIABLE
from idc.remote.control import VARIABLE as CONTROL

if TYPE_CHECKING:
    from host.region import Region, RegionService

LIMIT = 60.0


def stack(service: RegionService, names: tuple[str, ...], route: str, *, broker: bool) -> None:
    regions = [service.create(spec) for spec in specs(*names)]
    controls = {role: service.control(role) for role in ROLES} if broker else {}
    processes = []
    try:
        for role in ROLES:
            env = dict(os.environ) | {VARIABLE: " ".join(places(regions, role))}
            if broker:
                env[CONTROL] = f"member:{controls[role].socket(role)}/{CHANNEL}"
            command = [sys.executable, str(STACK), role, route]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                              text=True))
        outputs = []
        for role, process in zip(ROLES, processes, strict=True):
            out, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, f"{role}: {errors}"
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    verify(outputs, {"host": "host copy", "direct": "direct"}[route])


def places(regions: list[Region], role: str) -> list[str]:
    return [f"{channel}=member:{region.socket(role)}/{channel}" for region in regions
            for channel in channels_of(region, role)]


def test_the_broker_copies_each_byte_once_between_links_of_their_own() -> None:
    with running() as service:
        service.start_broker()
        stack(service, LINKS, "host", broker=True)
        counts = service.broker_status()["counts"]
        assert counts["back"]["copied"] == 2 * BYTES
        assert counts["back"]["pieces"] == 2 * BYTES >> 20
        assert counts["middle"]["copied"] == counts["front"]["copied"] == 0
        assert all(count["refused"] == 0 for count in counts.values())


def test_the_back_end_copies_each_byte_once_on_a_bus() -> None:
    with running() as service:
        stack(service, BUS, "direct", broker=False)
