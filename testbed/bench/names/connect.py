"""How long it takes from asking for a device between two running VMs to its two ends being connected.

Measured where a user waits: from the controller's call until both ends have said *connected* in the registry, and so
with all of it: record, region, keys, drivers. `shared`: the link of the two VMs is plugged already, and was used
before. `hotplug`: a region is made and plugged into both; none is unplugged in between. Depends on `testbed.devices`
and below.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.bed import Testbed
from testbed.bench import facts
from testbed.bench.groups import Found
from testbed.bench.names import Alone, Bench
from testbed.bench.names.boot import percentile
from testbed.bench.rows import Row

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.setting import Setting

#: Seconds for drivers to start in both VMs, and then for one device.
FIRST_SECONDS, SECONDS = 120.0, 60.0
_CLASS = "loop"
_SOURCE = """
from idc.device import BackDriver, DeviceClass

class Loop(BackDriver):
    def transaction(self, endpoint, transaction):
        transaction.complete(transaction.parameters)

class LoopDevice(DeviceClass):
    name = "loop"
    back = Loop
"""


def measure(setting: Setting, pace: Pace) -> Alone:
    """Attach and detach a device, one at a time, with the link plugged before and without."""
    samples = {"shared": 5, "hotplug": 2} if pace.quick else {"shared": 50, "hotplug": 10}
    say = setting.steps.say
    with tempfile.TemporaryDirectory(prefix="idc-connect-") as site:
        _install(Path(site))
        sys.path.insert(0, site)
        try:
            with Testbed(accel=setting.accel, qemu=setting.qemu, broker=True, notify=say) as bed:
                bed.boot(*(bed.spec(name, region_ports=samples["hotplug"] + 3, region_port_mib=2)
                           for name in ("front", "back")))
                for vm in bed.vms:
                    bed.devices.prepare(vm, _CLASS)
                say("drivers start in both VMs")
                first = bed.devices.attach(_CLASS, "front", "back", wait=FIRST_SECONDS)
                bed.devices.detach(first.name, wait=SECONDS)  # its link is a spare one from now on
                found = []
                for mode, count in samples.items():
                    say(f"{count} devices, {mode}")
                    found.append(_found(mode, _connect(bed, count, shared=mode == "shared")))
                return Alone(bed.verdict, found, facts.of_testbed(bed))
        finally:
            sys.path.remove(site)


def _connect(bed: Testbed, count: int, *, shared: bool) -> list[float]:
    """Milliseconds of each. Where the link is not shared, all devices stay attached to the end."""
    taken = []
    with bed.devices.controller() as controller:
        if not shared:
            controller.attach(_CLASS, "front", "back", number="9999", wait=SECONDS)  # takes the spare link
        for number in range(count):
            began = time.monotonic()
            name = controller.attach(_CLASS, "front", "back", number=str(number), wait=SECONDS).name
            taken.append(1e3 * (time.monotonic() - began))
            if shared:
                controller.detach(name, wait=SECONDS, keep_link=True)
    return taken


def _install(site: Path) -> None:
    """A class of its own: what is measured must not depend on what is installed."""
    metadata = site / "idc_bench_connect-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: idc-bench-connect\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[idc_testbed.devices]\nloop = idc_bench_connect:LoopDevice\n")
    (site / "idc_bench_connect.py").write_text(_SOURCE)


def _found(mode: str, taken: list[float]) -> Found:
    note = "from the call that attaches a device to both ends connected" + (
        "; the region is plugged before" if mode == "shared" else "; a region is made and plugged into both VMs")
    return Found(Row("connect", "ivshmem", "vm-vm", mode, "python", 0, "ms", len(taken), rounds=tuple(taken),
                     p50=percentile(taken, 50), p90=percentile(taken, 90), p99=percentile(taken, 99),
                     p999=percentile(taken, 99.9), max=max(taken), note=note), None)


BENCH = Bench("connect", "from attaching a device to its ends connected: link plugged before, or by hot-plug",
              alone=measure, default=False, order=95)
