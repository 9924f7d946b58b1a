"""Requests about terminals, each the parameters of a transaction, and their answers. No I/O. Depends on idc.errors.

    request   u8 op, u64 session, what follows by op; sessions are random numbers that whoever attaches chooses
    answer    error 0 and what is asked for, else a `Fault` and its text

Every request may be repeated, which is what an attachment does after a lost connection: bytes both ways have positions,
counted from the terminal's first byte of output, and from the session's first byte of input.
"""

from __future__ import annotations

import enum
import json
import re
import struct
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from idc.errors import IdcError, ProtocolError

#: Most bytes of output in one answer, of input in one request.
OUTPUT_BYTES: Final = 16 << 10
INPUT_BYTES: Final = 4096
#: Longest name of a terminal, and of a terminal type (TERM), bytes.
NAME_BYTES: Final = 32
#: Most rows, and columns, of a window.
MOST_CELLS: Final = 4096
#: Most terminals of a device.
MOST_TERMINALS: Final = 32

_HEAD: Final = struct.Struct("<BQ")
_SIZE: Final = struct.Struct("<HH")
_AT: Final = struct.Struct("<Q")
_OPENED: Final = struct.Struct("<HQQ")
_CODE: Final = struct.Struct("<i")
#: Longest parameters and longest status of a transaction.
PARAMETER_BYTES: Final = _HEAD.size + _AT.size + INPUT_BYTES
STATUS_BYTES: Final = _AT.size + OUTPUT_BYTES
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_TYPE: Final = re.compile(r"[A-Za-z0-9_.+-]+", re.ASCII)


class Op(enum.IntEnum):
    """What is asked."""

    LIST = 1
    OPEN = 2
    ATTACH = 3
    READ = 4
    WRITE = 5
    RESIZE = 6
    DETACH = 7
    CLOSE = 8
    PART = 9


class Fault(enum.IntEnum):
    """Why a request is refused. ENDED is no fault of anybody's: the program's exit code is in the answer."""

    BAD_REQUEST = 1
    NO_SUCH = 2
    TAKEN = 3
    TOO_MANY = 4
    BAD_SIZE = 5
    GONE = 6
    ENDED = 7
    AGAIN = 8


class ConsoleError(IdcError):
    """A request about a terminal was refused.

    Attributes:
        fault: why.
    """

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Size(NamedTuple):
    """Of a window, in characters."""

    rows: int = 24
    columns: int = 80

    def check(self) -> None:
        """Raise ConsoleError if no window has that size."""
        if not (1 <= self.rows <= MOST_CELLS and 1 <= self.columns <= MOST_CELLS):
            raise ConsoleError(Fault.BAD_SIZE, f"a window of {self.rows} rows and {self.columns} columns: "
                                               f"1 to {MOST_CELLS} of each")


_USUAL: Final = Size()


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        op: what is asked.
        session: of whom; 0 where that does not matter.
        size: OPEN, ATTACH, RESIZE.
        name: OPEN: of the new terminal, or empty; ATTACH, CLOSE: of one that is there, or its number.
        term: OPEN: type of the terminal that it is shown on.
        at: READ: where; WRITE: position of the data. What is before it has arrived.
        data: WRITE.
    """

    op: Op
    session: int = 0
    size: Size = _USUAL
    name: str = ""
    term: str = "dumb"
    at: int = 0
    data: bytes = b""

    def pack(self) -> bytes:
        """As parameters. Raises ConsoleError for a size or name that cannot be."""
        head = _HEAD.pack(self.op, self.session)
        if self.op in (Op.OPEN, Op.ATTACH, Op.RESIZE):
            self.size.check()
            head += _SIZE.pack(*self.size)
        if self.op is Op.OPEN:
            return head + check_name(self.name).encode() + b"\0" + self.term.encode()
        if self.op in (Op.ATTACH, Op.CLOSE):
            return head + self.name.encode("ascii", "replace")[:NAME_BYTES]
        if self.op in (Op.READ, Op.WRITE):
            return head + _AT.pack(self.at) + self.data
        return head


def parse(parameters: bytes) -> Request:
    """What a stranger sent. Raises ConsoleError."""
    try:
        code, session = _HEAD.unpack_from(parameters)
        op, rest = Op(code), parameters[_HEAD.size:]
        size = _USUAL
        if op in (Op.OPEN, Op.ATTACH, Op.RESIZE):
            size = Size(*_SIZE.unpack_from(rest))
            size.check()
            rest = rest[_SIZE.size:]
        if op is Op.OPEN:
            name, zero, term = rest.partition(b"\0")
            if not zero or len(term) > NAME_BYTES or not _TYPE.fullmatch(term.decode("ascii")):
                raise ConsoleError(Fault.BAD_REQUEST, "OPEN without a terminal type")
            return Request(op, session, size, check_name(name.decode("ascii")), term.decode("ascii"))
        if op in (Op.ATTACH, Op.CLOSE):
            if len(rest) > NAME_BYTES:
                raise ConsoleError(Fault.BAD_REQUEST, f"a name of {len(rest)} bytes, {NAME_BYTES} at most")
            return Request(op, session, size, rest.decode("ascii"))
        if op in (Op.READ, Op.WRITE):
            (at,) = _AT.unpack_from(rest)
            data = rest[_AT.size:]
            if bool(data) != (op is Op.WRITE) or len(data) > INPUT_BYTES:
                raise ConsoleError(Fault.BAD_REQUEST, f"{op.name} of {len(data)} bytes")
            return Request(op, session, at=at, data=data)
        if rest:
            raise ConsoleError(Fault.BAD_REQUEST, f"{op.name} with {len(rest)} bytes too many")
        return Request(op, session, size)
    except (struct.error, ValueError) as error:  # UnicodeDecodeError is a ValueError, and so is an Op that is none
        raise ConsoleError(Fault.BAD_REQUEST, f"{len(parameters)} bytes that are no request: {error}") from None


def check_name(name: str) -> str:
    """The name, if a new terminal may have it; none at all is as good. Raises ConsoleError."""
    if name and (len(name) > NAME_BYTES or not _NAME.fullmatch(name)):
        raise ConsoleError(Fault.BAD_REQUEST, f"{name!r} is no name of a terminal: up to {NAME_BYTES} letters, digits "
                                              "and _ . -, of which the first is a letter")
    return name


# -- answers

class Opened(NamedTuple):
    """Answer to OPEN and ATTACH: the terminal's number, and from where to where there is output."""

    number: int
    start: int
    end: int

    def pack(self) -> bytes:
        """As status."""
        return _OPENED.pack(*self)


def parse_opened(status: bytes) -> Opened:
    """Raises ProtocolError."""
    if len(status) != _OPENED.size:
        raise ProtocolError(f"{len(status)} bytes that do not say which terminal was opened")
    return Opened(*_OPENED.unpack(status))


def pack_output(at: int, data: bytes) -> bytes:
    """Answer to READ: output from that position on."""
    return _AT.pack(at) + data


def parse_output(status: bytes) -> tuple[int, bytes]:
    """Position and bytes. Raises ProtocolError."""
    if len(status) < _AT.size:
        raise ProtocolError(f"{len(status)} bytes that are no output of a terminal")
    return int(_AT.unpack_from(status)[0]), status[_AT.size:]


def pack_code(code: int) -> bytes:
    """With ENDED: exit code of the program, or less than 0 for a signal, as in subprocess."""
    return _CODE.pack(code)


def parse_code(status: bytes) -> int:
    """Raises ProtocolError."""
    if len(status) != _CODE.size:
        raise ProtocolError(f"{len(status)} bytes that are no exit code")
    return int(_CODE.unpack(status)[0])


def pack_list(terminals: list[dict[str, Any]]) -> bytes:
    """Answer to LIST."""
    return json.dumps(terminals, separators=(",", ":")).encode()


def parse_list(status: bytes) -> list[dict[str, Any]]:
    """Raises ProtocolError."""
    try:
        found = json.loads(status)
        return [{"number": int(each["number"]), "name": _shown(each["name"]), "command": _shown(each["command"]),
                 "rows": int(each["rows"]), "columns": int(each["columns"]), "attached": int(each["attached"]),
                 "code": None if each["code"] is None else int(each["code"])} for each in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"what should be a list of terminals is none: {error}") from None


def _shown(text: object) -> str:
    """A peer's text, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:64])


def fault(code: int, status: bytes) -> ConsoleError:
    """The error behind an answer."""
    text = _shown_long(status)
    try:
        return ConsoleError(Fault(code), text)
    except ValueError:
        return ConsoleError(Fault.BAD_REQUEST, f"{text} (fault {code}, which this version does not know)")


def _shown_long(status: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in status[:1024].decode("utf-8", "replace"))
