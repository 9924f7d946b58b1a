"""What an endpoint asks of whoever does remote buffers for it: `idc.remote.link` does. Depends on nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import IncomingAsk, Session, Slots
    from idc.remote.buffer import RemoteBuffer
    from idc.remote.reference import Access
    from idc.remote.registration import Registration
    from idc.remote.routes import Route

#: Seconds that `unregister` waits for holders, unless told otherwise.
PATIENCE: Final = 5.0


class Party(Protocol):
    """Remote buffers on one endpoint, connection after connection. Nothing in here waits."""

    def begin(self, session: Session, *, near: bool) -> None:
        """Connected, before the client is told. `near`: the peer is on this machine."""

    def serve(self, ask: IncomingAsk) -> None:
        """The peer's library asks. Raises ProtocolError."""

    def work(self) -> bool:
        """Do a piece of what is due; whether there was any."""

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do at once."""

    @property
    def patience(self) -> float | None:
        """Seconds until `work` is due by the clock; None if it is not."""

    def end(self, reason: str) -> None:
        """The connection is over: complete what is in progress, let go of what the peer held."""

    def register(self, buffer: LocalBuffer, access: Access, *, filled: Callable[[int, int], None] | None,
                 returned: Callable[[], None] | None, direct: bool, outlives: bool) -> Registration:
        """See Endpoint.register."""

    def remote(self, reference: bytes, *, route: Route | None, revoked: Callable[[], None] | None) -> RemoteBuffer:
        """See Endpoint.remote."""


class Sharing(Protocol):
    """What `Resources` holds for remote buffers: `idc.remote.Remote` is one.

    Attributes:
        asks: slots of own requests.
        serves: requests of the peer's at a time.
        ask_bytes: longest request or answer that is accepted, where the carrier has room for it.
    """

    asks: Slots
    serves: int
    ask_bytes: int

    def party(self, name: str, notify: Callable[[], None]) -> Party:
        """For one endpoint.

        Args:
            name: of its peer, for messages.
            notify: wakes the peer for what was posted.
        """
