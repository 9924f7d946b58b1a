"""Measures how VMs come to be: cold boots, clones, what an idle clone costs. Depends on `testbed.bed` and below.

Every sample is kept with its unit; nothing is averaged away. Cold boots and clones are of the same machine in the same
run, one at a time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.bed import Testbed
from testbed.bench.groups import Found
from testbed.bench.names import Alone, Bench
from testbed.bench.rows import Row
from testbed.clone import Clone
from testbed.template_build import cpu_seconds, obtain
from testbed.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.groups import Pace
    from testbed.bench.setting import Setting

IDLE_SECONDS = 5.0
"""How long an idle clone is watched."""
IDLE_CLONES = 3
MEMORY_MIB = 256
_CALM_SECONDS = 1.0


@dataclass(frozen=True)
class Memory:
    """What one process holds, in MB of 10^6 bytes, from /proc/PID/smaps_rollup.

    `private` are pages that it alone has written, `proportional` counts each shared page by its share.
    """

    private: float
    proportional: float


def memory_of(pid: int) -> Memory:
    """What the process holds now."""
    sizes = {"Private_Dirty": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0])
    return Memory(sizes["Private_Dirty"] * 1024 / 1e6, sizes["Pss"] * 1024 / 1e6)


def measure(setting: Setting, pace: Pace) -> Alone:
    """Boot some VMs and clone more, one after the other, each to its agent's first answer as itself.

    Returns:
        See `Alone`; facts of VMs that are gone there are none.
    """
    samples, cold = (5, 1) if pace.quick else (20, 3)
    say = setting.steps.say
    with Testbed(accel=setting.accel, qemu=setting.qemu, notify=say) as bed:
        spec = bed.spec("bench", memory_mib=MEMORY_MIB)
        boots, clones, private, proportional, idle = [], [], [], [], []
        for index in range(cold):
            say(f"cold boot {index + 1} of {cold}")
            boots.append(_timed(Vm(spec, bed.run)))
        with obtain(spec, notify=say) as template:
            say(f"{samples} clones")
            for _ in range(samples):
                clones.append(_timed(Clone(template, spec, bed.run)))  # noqa: PERF401 - it is a boot, not a list
            say(f"{IDLE_CLONES} clones that idle for {IDLE_SECONDS:g} s")
            for _ in range(IDLE_CLONES):
                with Clone(template, spec, bed.run) as clone:
                    time.sleep(_CALM_SECONDS)
                    began, used = time.monotonic(), cpu_seconds(clone.pid)
                    time.sleep(IDLE_SECONDS)
                    idle.append(100 * (cpu_seconds(clone.pid) - used) / (time.monotonic() - began))
                    memory = memory_of(clone.pid)
                    private.append(memory.private)
                    proportional.append(memory.proportional)
    what = f"idle clone of {MEMORY_MIB} MiB"
    return Alone(bed.verdict, [
        _found("cold-boot", "s", boots, "QEMU's start to the agent's first answer"),
        _found("clone", "s", clones, "the same, as itself: name, clock, randomness"),
        _found("clone-memory", "MB", private, f"{what}: pages of its own, 10^6 bytes"),
        _found("clone-memory-pss", "MB", proportional, f"{what}: with its share of shared pages, 10^6 bytes"),
        _found("clone-idle", "%", idle, f"{what}: of one processor, over {IDLE_SECONDS:g} s"),
    ])


def _found(name: str, unit: str, samples: list[float], note: str) -> Found:
    return Found(Row(name, "boot", "vm", None, "core", MEMORY_MIB << 20, unit, len(samples), rounds=tuple(samples),
                     p50=percentile(samples, 50), p90=percentile(samples, 90), p99=percentile(samples, 99),
                     p999=percentile(samples, 99.9), max=max(samples), note=note), None)


def percentile(samples: Sequence[float], percent: float) -> float:
    """Nearest rank: always a value that was measured. `percent` from 0 to 100."""
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(0, math.ceil(percent / 100 * len(samples)) - 1)]


def _timed(vm: Vm) -> float:
    began = time.monotonic()
    with vm:
        vm.agent.ping()
        return time.monotonic() - began


BENCH = Bench("boot", "cold boots, clones, and what an idle clone costs", alone=measure, default=False, order=90)
