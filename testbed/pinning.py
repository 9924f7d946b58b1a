"""Virtual CPUs on host CPUs of their own. Depends on `testbed.errors`; works on a VM that runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.vm import Vm


def pin(vm: Vm) -> None:
    """Bind each virtual CPU's thread to the host CPU that its spec names. Raises SpecError if that one is not ours."""
    places = vm.spec.pin
    if not places:
        return
    for cpu in vm.qmp("query-cpus-fast"):
        place = places[cpu["cpu-index"] % len(places)]
        try:
            os.sched_setaffinity(cpu["thread-id"], {place})
        except OSError as error:
            raise SpecError(
                f"VM {vm.name}: cannot pin a virtual CPU to host CPU {place}: {error.strerror}",
                hint=f"allowed here: {sorted(os.sched_getaffinity(0))}",
            ) from error
