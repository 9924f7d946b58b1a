"""Bytes of what goes between a domain and its registry, as parameters, status and messages of the endpoint. No I/O.

Little-endian. A request is a head of 16 bytes, the path in ASCII, and the rest:

    head: u8 operation, u8 flags, u16 bytes of the path, u32 transaction (0: none), u32 number, u32 zero

     1 HELLO   rest: 16 bytes, the session: random, and the same for as long as the process lives.
               Status: u8 1 if nodes of that session are still there, else 0; name of the domain
     2 READ    Status: the value
     3 WRITE   flags 1: ephemeral; rest: the value
     4 MKDIR
     5 RM
     6 LIST    rest: the name to go on after. Status: u8 1 if there are more, else 0; names, each ended by a NUL
     7 ACCESS  Status: permissions
     8 PERMIT  rest: permissions
     9 WATCH   flags 2: not of what is changed by this link; 4: events bring what is there. number: what events are told
               by
    10 UNWATCH number
    11 BEGIN   Status: u32 transaction
    12 COMMIT  transaction
    13 ABORT   transaction
    14 TREE    rest: the node to go on after: a slash, and its path below this one. Status: u8 1 if there are more, else
               0; of the node and of those below it, none below one that the domain may not read, in the order of their
               components: u16 bytes of the path below this one ("" of itself), u16 bytes of the value, path, value

    permissions: u8 default, u8 length of the owner's name, the name; for each further domain u8 access, u8 length, name
    EVENT, the only message, registry to domain: u32 number, u32 changes since the last one, path at or below which they
    were; the first event of a watch names the watch's path, with 0 changes. Of a watch with flag 4, if it finds room in
    the message: a NUL, and what TREE answers for that path; the NUL alone if there is nothing that the domain may read

The error code of an answer is a `Fault`, its status the reason in UTF-8. What is parsed here was written by someone who
may mean ill: `FrameError` says what is wrong with it. Depends on idc.endpoint.frames and
idc.errors.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc.endpoint.frames import Quotas, reason_bytes, reason_text
from idc.errors import ConflictError, DeniedError, MisuseError, NoSuchKeyError, QuotaError, RegistryError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Most bytes of a path, of a component and of a value; most components; most domains that permissions name.
PATH_BYTES: Final = 256
NAME_BYTES: Final = 64
VALUE_BYTES: Final = 2048
DEPTH: Final = 16
MOST_NAMED: Final = 16
SESSION_BYTES: Final = 16
#: Who asks by the registry's Unix socket.
HOST: Final = "host"

_HEAD: Final = struct.Struct("<BBHIII")
_EVENT: Final = struct.Struct("<II")
_NUMBER: Final = struct.Struct("<I")
_NODE: Final = struct.Struct("<HH")
_NAME: Final = re.compile(r"[A-Za-z0-9_.@:-]{1,64}", re.ASCII)
_EPHEMERAL, _OTHERS, _NODES = 1, 2, 4

#: What the registry accepts of a domain, and a domain of the registry.
REGISTRY_ACCEPTS: Final = Quotas(requests=16, messages=0, parameter_bytes=2400, status_bytes=0)
DOMAIN_ACCEPTS: Final = Quotas(requests=0, messages=32, parameter_bytes=2400, status_bytes=4000)


class Op(enum.IntEnum):
    """First byte of a request."""

    HELLO = 1
    READ = 2
    WRITE = 3
    MKDIR = 4
    RM = 5
    LIST = 6
    ACCESS = 7
    PERMIT = 8
    WATCH = 9
    UNWATCH = 10
    BEGIN = 11
    COMMIT = 12
    ABORT = 13
    TREE = 14


class Permit(enum.IntFlag):
    """What a domain may do with a node."""

    NOTHING = 0
    READ = 1
    WRITE = 2
    BOTH = 3


class Fault(enum.IntEnum):
    """Why a request was refused."""

    NOT_FOUND = 1
    DENIED = 2
    CONFLICT = 3
    QUOTA = 4
    MALFORMED = 5
    REFUSED = 6
    FAILED = 7


_ERRORS: Final[dict[int, type[RegistryError]]] = {
    Fault.NOT_FOUND: NoSuchKeyError, Fault.DENIED: DeniedError, Fault.CONFLICT: ConflictError, Fault.QUOTA: QuotaError,
}


class FrameError(ValueError):
    """Bytes that are none of the above; the text says why."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """Who may do what with a node.

    Attributes:
        owner: who may do everything, and change this; the host may too.
        default: what those may that are not named.
        named: what each of these domains may.
    """

    owner: str
    default: Permit = Permit.NOTHING
    named: tuple[tuple[str, Permit], ...] = ()

    def __post_init__(self) -> None:
        if len(self.named) > MOST_NAMED:
            raise MisuseError(f"permissions that name {len(self.named)} domains: {MOST_NAMED} at most")
        names = [name for name, _ in self.named]
        for name in (self.owner, *names):
            if not _NAME.fullmatch(name):
                raise MisuseError(f"permissions name {name!r}, which is no name of a domain")
        if len(set(names)) < len(names):
            raise MisuseError(f"permissions name a domain twice: {', '.join(names)}")

    def of(self, domain: str) -> Permit:
        """What a domain may."""
        if domain in (HOST, self.owner):
            return Permit.BOTH
        return next((access for name, access in self.named if name == domain), self.default)


@dataclass(frozen=True, slots=True)
class Request:
    """A request, either way. What its attributes mean depends on the operation, see above."""

    op: Op
    path: str = ""
    transaction: int = 0
    number: int = 0
    rest: bytes = b""
    ephemeral: bool = False
    others: bool = False
    nodes: bool = False

    def pack(self) -> bytes:
        """Its bytes. Raises MisuseError for a path or value that no registry takes."""
        if self.path:
            split(self.path)
        if self.op is Op.WRITE and len(self.rest) > VALUE_BYTES:
            raise MisuseError(f"a value of {len(self.rest)} bytes for {self.path}: {VALUE_BYTES} at most")
        flags = _EPHEMERAL * self.ephemeral + _OTHERS * self.others + _NODES * self.nodes
        head = _HEAD.pack(self.op, flags, len(self.path), self.transaction, self.number, 0)
        return head + self.path.encode("ascii") + self.rest


def parse(body: bytes) -> Request:
    """A request as a domain sent it; its path is sound. Raises FrameError."""
    if len(body) < _HEAD.size:
        raise FrameError(f"a request of {len(body)} bytes, the head alone has {_HEAD.size}")
    op, flags, length, transaction, number, zero = _HEAD.unpack_from(body)
    if op not in Op.__members__.values():
        raise FrameError(f"no request of kind {op}")
    if zero or flags & ~_FLAGS.get(op, 0):
        raise FrameError(f"a request with flags {flags:#x} and {zero:#x} in its head")
    end = _HEAD.size + length
    if end > len(body):
        raise FrameError(f"a path of {length} bytes in a request of {len(body)}")
    path, rest = body[_HEAD.size:end].decode("latin-1"), body[end:]
    if (op in _WITH_PATH) != bool(path):
        raise FrameError(f"{Op(op).name} {'without' if not path else 'with'} a path")
    try:
        if path:
            split(path)
    except MisuseError as error:
        raise FrameError(str(error)) from None
    if len(rest) > VALUE_BYTES or (rest and op not in (Op.HELLO, Op.WRITE, Op.LIST, Op.PERMIT, Op.TREE)):
        raise FrameError(f"{len(rest)} bytes behind the path of {Op(op).name}")
    if op == Op.HELLO and len(rest) != SESSION_BYTES:
        raise FrameError(f"a session of {len(rest)} bytes instead of {SESSION_BYTES}")
    return Request(Op(op), path, transaction, number, rest, bool(flags & _EPHEMERAL), bool(flags & _OTHERS),
                   bool(flags & _NODES))


_FLAGS: Final[dict[int, int]] = {Op.WRITE: _EPHEMERAL, Op.WATCH: _OTHERS | _NODES}
_WITH_PATH: Final = frozenset({Op.READ, Op.WRITE, Op.MKDIR, Op.RM, Op.LIST, Op.ACCESS, Op.PERMIT, Op.WATCH,
                             Op.TREE})


def split(path: str) -> tuple[str, ...]:
    """The components of a path; none of "/". Raises MisuseError."""
    if path == "/":
        return ()
    if not path.startswith("/"):
        raise MisuseError(f"path {path!r} does not begin with a slash")
    if len(path) > PATH_BYTES:
        raise MisuseError(f"a path of {len(path)} bytes: {PATH_BYTES} at most")
    parts = tuple(path[1:].split("/"))
    if len(parts) > DEPTH:
        raise MisuseError(f"path {path!r} has {len(parts)} components: {DEPTH} at most")
    for part in parts:
        if not _NAME.fullmatch(part):
            raise MisuseError(f"path {path!r}: {part!r} is no name of 1 to {NAME_BYTES} letters, digits and _.@:-")
    return parts


def home(domain: str) -> str:
    """The path of a domain's own nodes."""
    return f"/domain/{domain}"


def reason(text: str) -> bytes:
    """Status of a refusal."""
    return reason_bytes(text)


def error_of(code: int, status: bytes, what: str) -> RegistryError:
    """The exception for a refusal; `what` was asked."""
    kind = _ERRORS.get(code, RegistryError)
    return kind(code, f"{what}: {reason_text(status) or f'refused with code {code}'}")


def pack_permissions(permissions: Permissions) -> bytes:
    """Status of ACCESS, and rest of PERMIT."""
    out = bytearray()
    for name, access in ((permissions.owner, permissions.default), *permissions.named):
        out += bytes([access, len(name)]) + name.encode("ascii")
    return bytes(out)


def parse_permissions(data: bytes) -> Permissions:
    """Raises FrameError."""
    found, at = [], 0
    while at < len(data):
        access, length = data[at], data[at + 1] if at + 1 < len(data) else 0
        name = data[at + 2:at + 2 + length]
        if not length or len(name) != length or access > Permit.BOTH:
            raise FrameError(f"permissions of {len(data)} bytes break off, or are none, at byte {at}")
        found.append((name.decode("latin-1"), Permit(access)))
        at += 2 + length
    if not found:
        raise FrameError("permissions without an owner")
    (owner, default), *named = found
    try:
        return Permissions(owner, default, tuple(named))
    except MisuseError as error:
        raise FrameError(str(error)) from None


def pack_names(names: list[str], *, more: bool) -> bytes:
    """Status of LIST."""
    return bytes([more]) + b"".join(name.encode("ascii") + b"\0" for name in names)


def parse_names(status: bytes) -> tuple[list[str], bool]:
    """(names, whether there are more). Raises FrameError."""
    if not status or status[0] > 1 or (len(status) > 1 and status[-1]):
        raise FrameError(f"a list of {len(status)} bytes that is none")
    return [name.decode("latin-1") for name in status[1:].split(b"\0")[:-1]], bool(status[0])


def pack_nodes(nodes: Iterable[tuple[str, bytes]], room: int) -> bytes:
    """Status of TREE: as many as find room, which is that of one at least."""
    out = bytearray(1)
    for path, value in nodes:
        if len(out) + _NODE.size + len(path) + len(value) > room:
            out[0] = 1
            break
        out += _NODE.pack(len(path), len(value)) + path.encode("ascii") + value
    return bytes(out)


def parse_nodes(status: bytes) -> tuple[dict[str, bytes], bool]:
    """(values by the path below, whether there are more). Raises FrameError."""
    found, at = {}, 1
    if not status or status[0] > 1:
        raise FrameError(f"nodes of {len(status)} bytes that are none")
    while at < len(status):
        if len(status) - at < _NODE.size:
            raise FrameError(f"nodes of {len(status)} bytes that break off at byte {at}")
        path, value = _NODE.unpack_from(status, at)
        at += _NODE.size
        if len(status) - at < path + value:
            raise FrameError(f"nodes of {len(status)} bytes that break off at byte {at}")
        found[status[at:at + path].decode("latin-1")] = status[at + path:at + path + value]
        at += path + value
    return found, bool(status[0])


def pack_hello(domain: str, *, kept: bool) -> bytes:
    """Status of HELLO."""
    return bytes([kept]) + domain.encode("ascii")


def parse_hello(status: bytes) -> tuple[str, bool]:
    """(name of the domain, whether nodes of the session are still there). Raises FrameError."""
    if len(status) < 2 or status[0] > 1 or not _NAME.fullmatch(name := status[1:].decode("latin-1")):
        raise FrameError(f"a greeting of {len(status)} bytes that is none")
    return name, bool(status[0])


def pack_number(number: int) -> bytes:
    """Status of BEGIN."""
    return _NUMBER.pack(number)


def parse_number(status: bytes) -> int:
    """Raises FrameError."""
    if len(status) != _NUMBER.size:
        raise FrameError(f"a transaction's number of {len(status)} bytes")
    return int(_NUMBER.unpack(status)[0])


def pack_event(number: int, changes: int, path: str, nodes: bytes | None = None) -> bytes:
    """EVENT. `nodes`: as TREE answers, empty if there are none; None: it does not say."""
    body = _EVENT.pack(number, min(changes, 0xFFFFFFFF)) + path.encode("ascii")
    return body if nodes is None else b"\0".join((body, nodes))


def parse_event(body: bytes) -> tuple[int, int, str, dict[str, bytes] | None]:
    """(number, changes, path, values by the path below that, or None if it does not say). Raises FrameError."""
    if len(body) < _EVENT.size:
        raise FrameError(f"an event of {len(body)} bytes")
    number, changes = _EVENT.unpack_from(body)
    text, says, rest = body[_EVENT.size:].partition(b"\0")
    path, nodes = text.decode("latin-1"), None
    try:
        split(path)
    except MisuseError as error:
        raise FrameError(f"an event of {error}") from None
    if says:
        nodes, more = parse_nodes(rest) if rest else ({}, False)
        if more:
            raise FrameError("an event with a part of what is there")
    return number, changes, path, nodes
