"""The kernel's nbd driver, by generic netlink: connect a device to sockets, give it new ones, disconnect it.

Numbers are those of <linux/nbd-netlink.h> and <linux/genetlink.h>. The messages are five attributes deep at most and
are made here: pyroute2 would cost a guest 1.7 MB, and its import the time in which a device waits for its driver.
Linux only; needs CAP_SYS_ADMIN. Depends on idc.errors.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc.errors import IdcError

if TYPE_CHECKING:
    from collections.abc import Sequence

NETLINK_GENERIC: Final = 16
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR: Final = 2
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
NESTED: Final = 1 << 15
_HEADER: Final = struct.Struct("=IHHIIBBH")  # nlmsghdr and genlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")


class Command(enum.IntEnum):
    """What the driver is asked."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3


class Attribute(enum.IntEnum):
    """Of a command."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    BACKEND_IDENTIFIER = 10


class Flag(enum.IntFlag):
    """Of a device; those of the NBD protocol."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    CAN_MULTI_CONN = 256


class NbdError(IdcError):
    """The kernel refuses; the text says what was asked, and why not.

    Attributes:
        number: its errno.
    """

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number


@dataclass(frozen=True, slots=True)
class Disk:
    """What the kernel is to show.

    Attributes:
        index: N of /dev/nbdN.
        identifier: whose it is: a device with another is not given new sockets.
        size: bytes.
        block: bytes of its logical block.
        flags: what it can do.
        timeout: seconds until the kernel gives a connection up that does not answer, and sends its requests again by
            another; 0: never, which it grants to a device with one connection only.
        dead_timeout: seconds that requests wait for new sockets when there is no live one; then they fail.
        most: bytes of a request at most.
    """

    index: int
    identifier: str
    size: int
    block: int
    flags: Flag
    timeout: int
    dead_timeout: int
    most: int

    @property
    def path(self) -> str:
        """Of the device node."""
        return f"/dev/nbd{self.index}"


class Kernel:
    """The nbd driver of this machine. Raises NbdError if it has none."""

    def __init__(self) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
        try:
            self._socket.bind((0, 0))
            self._socket.settimeout(10.0)
            if not Path("/sys/module/nbd").exists():
                with contextlib.suppress(OSError):
                    subprocess.run(["modprobe", "nbd"], check=False, capture_output=True)  # what is wrong shows below
            try:
                self._family = self._find()
            except OSError as error:
                raise NbdError(f"the kernel of this machine has no nbd driver ({error.strerror}): load the module nbd"
                               ) from None
        except BaseException:
            self._socket.close()
            raise

    def connect(self, disk: Disk, sockets: Sequence[int]) -> None:
        """Begin to use the sockets: a fresh device. Raises NbdError."""
        self._ask(Command.CONNECT, disk, b"".join((
            _number(Attribute.SIZE_BYTES, disk.size), _number(Attribute.BLOCK_SIZE_BYTES, disk.block),
            _number(Attribute.SERVER_FLAGS, disk.flags), self._limits(disk), _sockets(sockets))))
        self._tune(disk)

    def reconfigure(self, disk: Disk, sockets: Sequence[int]) -> None:
        """Give it these in place of dead ones; raises NbdError, also if there are fewer dead ones."""
        self._ask(Command.RECONFIGURE, disk, self._limits(disk) + _sockets(sockets))

    def disconnect(self, index: int) -> None:
        """End the device: what is under way fails. Raises NbdError; not if there is none."""
        try:
            self._call(self._family, Command.DISCONNECT, _attribute(Attribute.INDEX, struct.pack("=I", index)))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENODEV, errno.ENOENT):
                raise NbdError(f"/dev/nbd{index} cannot be disconnected: {error.strerror}") from error

    def close(self) -> None:
        """Let go of it; devices stay."""
        self._socket.close()

    @staticmethod
    def identifier(index: int) -> str | None:
        """Whose a connected device is; None if it is not connected."""
        place = Path(f"/sys/block/nbd{index}")
        if not (place / "pid").exists():
            return None
        with contextlib.suppress(OSError):
            return (place / "backend").read_text().strip()
        return ""

    @staticmethod
    def _tune(disk: Disk) -> None:
        queue = Path(f"/sys/block/nbd{disk.index}/queue")
        (queue / "max_sectors_kb").write_text(str(disk.most >> 10))
        # A scheduler would have each request sent by a thread of the kernel's in place of whoever makes it, and has
        # nothing to put in order: the disk of the image, if it is one, has its own at the other end.
        (queue / "scheduler").write_text("none")
        if not disk.timeout:
            # How often the kernel looks whether a request's socket was replaced, and sends it again then.
            (queue / "io_timeout").write_text("2000")

    @staticmethod
    def _limits(disk: Disk) -> bytes:
        return b"".join((_number(Attribute.TIMEOUT, disk.timeout),
                         _number(Attribute.DEAD_CONN_TIMEOUT, disk.dead_timeout),
                         _attribute(Attribute.BACKEND_IDENTIFIER, disk.identifier.encode() + b"\0")))

    def _ask(self, command: Command, disk: Disk, attributes: bytes) -> None:
        try:
            self._call(self._family, command, _attribute(Attribute.INDEX, struct.pack("=I", disk.index)) + attributes)
        except OSError as error:
            why = "it is in use by another program" if error.errno == errno.EBUSY else error.strerror
            what = "connected" if command is Command.CONNECT else "given new sockets"
            raise NbdError(f"{disk.path} cannot be {what}: {why}", error.errno or 0) from error

    def _find(self) -> int:
        answer = self._call(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, _attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
        at = 0
        while at + _ATTRIBUTE.size <= len(answer):
            length, kind = _ATTRIBUTE.unpack_from(answer, at)
            if kind == CTRL_ATTR_FAMILY_ID:
                return int(struct.unpack_from("=H", answer, at + _ATTRIBUTE.size)[0])
            at += max(_aligned(length), _ATTRIBUTE.size)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _call(self, family: int, command: int, attributes: bytes) -> bytes:
        """Attributes of the answer, if there is one beside the acknowledgement. Raises OSError as the kernel says."""
        self._sequence += 1
        length, flags = _HEADER.size + len(attributes), NLM_F_REQUEST | NLM_F_ACK
        self._socket.send(_HEADER.pack(length, family, flags, self._sequence, 0, command, 1, 0) + attributes)
        answer = b""
        while True:
            received, at = self._socket.recv(65536), 0
            while at + 16 <= len(received):
                length, kind, _, sequence = struct.unpack_from("=IHHI", received, at)
                body = received[at + 16:at + length]
                at += max(_aligned(length), 16)
                if sequence != self._sequence:
                    continue  # of a call that timed out
                if kind != NLMSG_ERROR:
                    answer = body[4:]
                    continue
                (code,) = struct.unpack_from("=i", body)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return answer


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def _attribute(kind: int, value: bytes) -> bytes:
    return (_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value).ljust(_aligned(4 + len(value)), b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=Q", value))


def _sockets(sockets: Sequence[int]) -> bytes:
    """A list of items that have a descriptor each."""
    items = b"".join(_attribute(1 | NESTED, _attribute(1, struct.pack("=I", fd))) for fd in sockets)
    return _attribute(Attribute.SOCKETS | NESTED, items)
