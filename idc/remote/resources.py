"""All that remote buffers on one endpoint will ever need, set aside beforehand. Depends on this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc.endpoint.frames import ASK_BYTES, MAX_BODY, MAX_SLOTS
from idc.endpoint.session import Slots
from idc.errors import MisuseError
from idc.remote.exports import Exports
from idc.remote.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.registry import Strategy
    from idc.remote.broker import Broker
    from idc.remote.routes import Route

#: Longest request or answer, unless asked for otherwise or the carrier's frames are shorter.
PIECE: Final = 1 << 16


class Remote:
    """What to pass as `Resources(remote=...)`.

    Args:
        exports: what this domain lets others reach; share one among all its endpoints. By default one of its own, for
            an endpoint that only uses others' buffers and forwards nothing.
        asks: own requests to the peer's library outstanding at a time.
        serves: the peer's requests at a time.
        ask_bytes: longest request or answer; owner copy goes in pieces of that. 256 at least.
        buffers: remote buffers open at a time.
        operations: transfers and the like outstanding at a time.
        broker: who copies between regions of which this domain maps one only.
        route: force it on all transfers, for measurements and tests; what cannot be done so is refused.
        strategy: force it on `share` and `move`, likewise.

    Raises:
        MisuseError: a number that is out of range.
    """

    def __init__(self, exports: Exports | None = None, *, asks: int = 8, serves: int = 8, ask_bytes: int = PIECE,
                 buffers: int = 64, operations: int = 16, broker: Broker | None = None, route: Route | None = None,
                 strategy: Strategy | None = None) -> None:
        if not ASK_BYTES <= ask_bytes <= MAX_BODY:
            raise MisuseError(f"requests of up to {ask_bytes} bytes: must be {ASK_BYTES} to {MAX_BODY}")
        for name, value in (("asks", asks), ("serves", serves), ("buffers", buffers), ("operations", operations)):
            if not 1 <= value <= MAX_SLOTS:
                raise MisuseError(f"{value} {name} of remote buffers: must be 1 to {MAX_SLOTS}")
        self.exports = Exports(0, 0, 0) if exports is None else exports
        self.asks = Slots(asks)
        self.serves = serves
        self.ask_bytes = ask_bytes
        self.buffers = buffers
        self.operations = operations
        self.broker = broker
        self.route = route
        self.strategy = strategy

    def party(self, name: str, notify: Callable[[], None]) -> Link:
        """See `idc.endpoint.party.Sharing`."""
        return Link(self, name, notify)
