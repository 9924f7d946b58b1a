"""What a holder asks of a broker: who has the memory of regions that this domain does not map. Depends on nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.results import Completion, Result


class Broker(Protocol):
    """Copies between two registered buffers, after it has resolved both references with their owners.

    Driven by its own side (an endpoint's pump, a control link); `done` is called in the thread that drives the
    endpoint, never from within `copy`.
    """

    def copy(self, source: bytes, target: bytes, length: int, done: Callable[[Completion], None], *,
             source_offset: int = 0, target_offset: int = 0) -> Result:
        """Copy once, from one registration's bytes to the other's.

        Args:
            source: reference that allows READ.
            target: reference that allows WRITE.
            length: bytes.
            done: called once if the result here is OK: OK; ERROR with a `Refusal` in `error` (NO_ROUTE: not by this
                broker, so that the holder may take another route); or OUTCOME_UNKNOWN when the control link was lost.
            source_offset: within the source reference, bytes. `target_offset` likewise.

        Returns:
            OK, BACK_PRESSURED, NOT_CONNECTED or CLOSED; nothing was asked unless OK.
        """
