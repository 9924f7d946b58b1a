"""Several endpoints driven by one thread. Depends on idc.endpoint.endpoint."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.endpoint.endpoint import Endpoint


def drive(endpoints: Sequence[Endpoint], timeout: float = 1.0) -> bool:
    """Let each do what is due; if nothing is, sleep until one has more to do, up to `timeout` seconds.

    Returns:
        Whether anything happened.
    """
    if len(endpoints) == 1:
        return endpoints[0].pump(timeout)  # waits in the core, which polls first where that pays
    busy = [endpoint.pump(0.0) for endpoint in endpoints]
    if any(busy):
        return True
    poller, naps = select.poll(), [timeout]
    for endpoint in endpoints:
        if endpoint.state.value == "destroyed":
            continue
        if not endpoint.arm():
            return False
        poller.register(endpoint.fileno(), select.POLLIN)
        if (patience := endpoint.patience) is not None:
            naps.append(patience)
    poller.poll(min(naps) * 1000)
    return False
