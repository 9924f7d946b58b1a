"""The network between VMs: TAPs on a bridge in a network namespace without a name, or sockets where that is not
allowed.

Depends on pyroute2, `testbed.errors` and `testbed.qemu_args`. The TAP way is the strongest that QEMU offers between
VMs of one host: virtio-net headers and segmentation offload pass from guest to guest, and where this user may open
/dev/vhost-net the host's kernel moves them (vhost) and no thread of QEMU does. A short-lived child makes the
namespace, the bridge and the TAPs, sends the TAPs' descriptors back and ends. From then on the namespace lives by
those descriptors alone: when the last QEMU is gone, however it went, so is all of it. Nothing leaves the namespace.

    python3 -m testbed.network COUNT MTU     is that child; it sends to the socket that is its standard output
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from testbed.errors import NetworkError
from testbed.qemu_args import Nic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

Kind = Literal["tap", "stream", "user"]

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TUNSETVNETHDRSZ = 0x400454D8
_TUNGETDEVNETNS = 0x54E3
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_VNET_HEADER = 12  # struct virtio_net_hdr_mrg_rxbuf
_CHILD_SECONDS = 30.0
BRIDGE = "br0"
_TUN = "/dev/net/tun"
_VHOST = "/dev/vhost-net"
_PREFIX = "10.77"
TAP_MTU = 65521
"""65535 less what virtio-net and the TAP put in front, rounded; both ends of TCP then fill their largest segments."""


@dataclass(frozen=True)
class Member:
    """One VM's part of the network: its NIC, and its address with prefix for `VmSpec.ip`."""

    nic: Nic
    ip: str

    @property
    def address(self) -> str:
        """The address alone."""
        return self.ip.partition("/")[0]


class Network:
    """A network for VMs that are about to be started; `members` has one entry for each.

    Holds descriptors until `close()`, which is due once the VMs run: QEMU has its own copies then. `kind`, `options`,
    `reason` and `vhost` belong into every result measured over it. `vhost` is "on", or "off" and why.
    """

    def __init__(self, kind: Kind, members: list[Member], options: str, reason: str, fds: list[int], *,
                 vhost: str = "off: it is for TAPs only") -> None:  # fmt: skip
        self.kind = kind
        self.members = members
        self.options = options
        self.reason = reason
        self.vhost = vhost
        self._fds = fds

    @property
    def description(self) -> str:
        """One line: what it is, with which options, and why not something stronger."""
        return f"{self.kind} ({self.options})" + (f"; {self.reason}" if self.reason else "")

    def namespace(self) -> int:
        """A descriptor of the network namespace that the bridge is in; the caller closes it.

        Raises NetworkError: there is none, or this user may not look into it.
        """
        if self.kind != "tap":
            raise NetworkError(f"a network of kind {self.kind} has no bridge")
        try:
            return fcntl.ioctl(self._fds[0], _TUNGETDEVNETNS)
        except OSError as error:
            raise NetworkError(f"this user may not enter the network's name space: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the descriptors. Again: nothing."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make(count: int, *, wish: Literal["auto", "tap", "stream"] = "auto", mtu: int = TAP_MTU,
         subnet: int = 0) -> Network:
    """A network for `count` VMs, addresses 10.77.`subnet`.1/24 and on, so that one VM can be on several.

    "auto" takes TAPs where they can be had, else sockets, and says why in `reason`. Raises NetworkError if the wish
    cannot be fulfilled.
    """
    if not 1 <= count <= 250:
        raise NetworkError(f"a network for {count} VMs; it has room for 250")
    if wish == "stream":
        return _streams(count, "asked for", subnet)
    try:
        return _taps(count, mtu, subnet)
    except NetworkError as error:
        if wish == "tap":
            raise
        return _streams(count, error.message, subnet)


def over_tap(host: Mapping[str, object]) -> bool | None:
    """Whether the VMs of a result were joined by TAPs, from its facts (`Result.host`, whose "network" is a
    `Network.description`). Over QEMU's sockets TCP is no peer to judge by. None: no VMs were joined."""
    network = host.get("network")
    return None if not network else str(network).split(" ", 1)[0] == "tap"


def _member(subnet: int, index: int, netdev: str, fds: tuple[int, ...], mtu: int = 0) -> Member:
    # Locally administered, and the same numbers in both addresses.
    nic = Nic(netdev, mac=f"52:54:00:77:{subnet:02x}:{index + 1:02x}", mtu=mtu, fds=fds)
    return Member(nic, f"{_PREFIX}.{subnet}.{index + 1}/24")


# -- TAPs


def _taps(count: int, mtu: int, subnet: int) -> Network:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "testbed.network", str(count), str(mtu)],
            stdin=subprocess.DEVNULL, stdout=theirs.fileno(), stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        theirs.close()
        ours.settimeout(_CHILD_SECONDS)
        try:
            message, fds, _, _ = socket.recv_fds(ours, 65536, 253)
        except TimeoutError:
            child.kill()
            message, fds = b"", []
        _, stderr = child.communicate()
    if not message:
        raise NetworkError(f"the child that makes it ended with {child.returncode}: {stderr.decode()[-500:].strip()}")
    answer = json.loads(message)
    if "error" in answer:
        raise NetworkError(f"cannot make a TAP: {answer['error']}",
                           hint="it takes the right to open /dev/net/tun and to make a network namespace; a network "
                           'of kind "stream" joins two VMs without any')
    return _tap_network(fds, mtu, subnet)


def _tap_network(taps: list[int], mtu: int, subnet: int) -> Network:
    """Takes the TAPs' descriptors over; one of vhost for each, where it can be had for all."""
    options = f"bridge, vnet headers, offloads, MTU {mtu}"
    vhosts: list[int] = []
    try:
        for _ in taps:
            vhosts.append(os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401 - those before a failure must be closed
    except OSError as error:
        while vhosts:
            os.close(vhosts.pop())
        members = [_member(subnet, index, f"tap,fd={fd}", (fd,), mtu) for index, fd in enumerate(taps)]
        return Network("tap", members, options, "", taps, vhost=f"off: {_vhost_absent(error)}")
    # vhostforce: where it cannot be after all, QEMU must say so and end; else it goes on without and only warns.
    members = [_member(subnet, index, f"tap,fd={tap},vhost=on,vhostforce=on,vhostfd={vhost}", (tap, vhost), mtu)
               for index, (tap, vhost) in enumerate(zip(taps, vhosts, strict=True))]
    return Network("tap", members, f"{options}, vhost", "", [*taps, *vhosts], vhost="on")


def _vhost_absent(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"this machine has no {_VHOST} (kernel module vhost_net)"
    return f"{_VHOST} may not be opened by this user: {error.strerror}"


def _child(count: int, mtu: int) -> dict[str, object]:
    """In the child: make everything in new namespaces, and send the descriptors. Returns what it sent."""
    _new_namespaces()
    # Here, because it is slow to import, and the testbed's own process has no use for it.
    from pyroute2 import IPRoute

    fds: list[int] = []
    with IPRoute() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge", br_stp_state=0)
        bridge = ip.link_lookup(ifname=BRIDGE)[0]
        for index in range(count):
            name = f"tap{index}"
            fds.append(_open_tap(name))
            tap = ip.link_lookup(ifname=name)[0]
            ip.link("set", index=tap, mtu=mtu)
            ip.link("set", index=tap, master=bridge, state="up")
        ip.link("set", index=bridge, mtu=mtu, state="up")
    answer: dict[str, object] = {"taps": len(fds)}
    with socket.socket(fileno=os.dup(1)) as out:
        socket.send_fds(out, [json.dumps(answer).encode()], fds)
    return answer


def _new_namespaces() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return
    if ctypes.get_errno() != errno.EPERM:
        raise OSError(ctypes.get_errno(), f"new network namespace: {os.strerror(ctypes.get_errno())}")
    # No right of one's own: it comes with a user namespace, in which this user is root.
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"new user namespace: {os.strerror(ctypes.get_errno())}")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _open_tap(name: str) -> int:
    fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER))
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, os.strerror(error.errno or 0), _TUN) from error
    return fd


# -- sockets


def user(count: int, subnet: int = 0) -> Network:
    """QEMU's own network for `count` VMs, each alone on it: out through the host, nothing in, no rights needed.

    Addresses 10.78.`subnet`.15/24; the gateway is .2 and the resolver .3.
    """
    net = f"10.78.{subnet}"
    members = [Member(Nic(f"user,net={net}.0/24", mac=f"52:54:00:78:{subnet:02x}:{index + 1:02x}"), f"{net}.15/24")
               for index in range(count)]
    return Network("user", members, f"QEMU's own, {net}.0/24", "", [])


def _streams(count: int, reason: str, subnet: int) -> Network:
    """QEMU's own: a pair of connected sockets, which is for two VMs at most."""
    members: list[Member] = []
    if count > 2:
        raise NetworkError(f"{count} VMs need TAPs; {reason}", hint="give this user the right to open /dev/net/tun")
    pairs = [socket.socketpair() for _ in range(count - 1)]
    ends = [[left.detach() for left, _ in pairs], [right.detach() for _, right in pairs]]
    held = ends[0] + ends[1]
    for index in range(count):
        fds = tuple(ends[index]) if pairs else ()
        netdev = f"stream,server=off,addr.type=fd,addr.str={fds[0]}" if fds else "user,restrict=on"
        members.append(_member(subnet, index, netdev, fds))
    return Network("stream", members, "socket pair, no vnet headers, no offloads, MTU 1500", reason, held)


def main() -> None:
    """The child: see the top of the file."""
    count, mtu = int(sys.argv[1]), int(sys.argv[2])
    try:
        _child(count, mtu)
    except OSError as error:
        with socket.socket(fileno=os.dup(1)) as out, contextlib.suppress(BrokenPipeError):
            where = f" ({error.filename})" if error.filename else ""
            out.send(json.dumps({"error": f"{error.strerror or error}{where}"}).encode())


if __name__ == "__main__":
    main()
