"""Makes a tracer: into another domain's ring, or into a file of this one. Depends on the rest of idc.trace."""

from __future__ import annotations

from pathlib import Path

from idc.channel import ByteChannel
from idc.errors import MisuseError
from idc.trace.local import Outlet
from idc.trace.place import open_place
from idc.trace.ring import RingSink
from idc.trace.store import DIRECTORY, FileSink, StoreWriter
from idc.trace.tracer import Tracer


class _Owning(RingSink):
    """A ring whose region was opened for it."""

    def __init__(self, address: str, *, lossless: bool, timeout: float | None) -> None:
        self._region, name = open_place(address)
        try:
            channel = ByteChannel.attach(self._region, name, timeout=timeout)
            try:
                super().__init__(channel, lossless=lossless)
            except BaseException:
                channel.close()
                raise
        except BaseException:
            self._region.close()
            raise

    def close(self, tracer: Tracer) -> None:
        """See there."""
        super().close(tracer)
        self._region.close()


def open_tracer(address: str, *, lossless: bool | None = None, timeout: float | None = None,
                shift: int = 0) -> Tracer:
    """A tracer into the channel at `address` (see `idc.trace.place`), or the trace device at unix:PATH, once somebody
    records there.

    Args:
        address: where.
        lossless: wait while the ring is full, instead of dropping and counting. Of a device its options say it.
        timeout: seconds to wait for who records; None: for ever.
        shift: see `Tracer`.

    Raises:
        MisuseError: no such address, its ring is too small, or `lossless` is not for the caller to say, or is and was
            not said.
        TimedOutError: nobody came in time.
        OSError, IdcError: the region or channel cannot be opened.
    """
    scheme, _, path = address.partition(":")
    if (scheme == "unix") != (lossless is None):
        raise MisuseError(f"{address}: " + ("whether it is lossless is an option of the device" if scheme == "unix"
                                            else "lossless=True or False is wanted"))
    if lossless is None:
        return Tracer(Outlet(Path(path), timeout), shift=shift)
    return Tracer(_Owning(address, lossless=lossless, timeout=timeout), shift=shift)


def file_tracer(domain: str, directory: Path | str = DIRECTORY, *, shift: int = 0) -> Tracer:
    """A tracer into a new file of this very domain. Raises as `StoreWriter`."""
    return Tracer(FileSink(StoreWriter(Path(directory), domain, domain)), shift=shift)
