"""What a terminal has put out, as far as it is kept: bytes with positions, counted from its first. No I/O."""

from __future__ import annotations


class Output:
    """The newest bytes of a stream.

    Attributes:
        start: position of the first byte that is kept.
    """

    def __init__(self) -> None:
        self.start = 0
        self._kept = bytearray()

    @property
    def end(self) -> int:
        """Position after the last byte."""
        return self.start + len(self._kept)

    def append(self, data: bytes) -> None:
        """More of it."""
        self._kept += data

    def trim(self, position: int) -> None:
        """Keep nothing before that position."""
        gone = min(position, self.end) - self.start
        if gone > 0:
            del self._kept[:gone]  # moves nothing: a bytearray begins where it likes
            self.start += gone

    def read(self, position: int, most: int) -> tuple[int, bytes]:
        """Up to `most` bytes from a position on, and where they are: later, if that is not kept any more."""
        position = max(position, self.start)
        begin = position - self.start
        return position, bytes(self._kept[begin:begin + most])
