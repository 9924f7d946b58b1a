"""The device class `net` and its drivers, the same at both ends.

The host's options say everything; what the ends tell each other over the device's endpoint is held against that, so
that two ends that were told different things do not connect. Data go by the queues alone. The interface has a carrier
while the ends agree and all queues are connected. Depends on idc.device and idc.pump.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import struct
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar, Final

from idc.device.classes import DeviceClass, Queues
from idc.device.driver import BackDriver, FrontDriver
from idc.device.options import Option
from idc.device.queued import POLL, Queued
from idc.device.states import Role
from idc.device.tally import Tally
from idc.domain import Service
from idc.endpoint import Completion, Endpoint, Quotas, Result
from idc.errors import MisuseError
from idc.net.addresses import Settings, set_up
from idc.net.interface import OFFLOADS, Interface
from idc.pump.tap import BUFFER_BYTES, DEPTH, QUOTAS, Tap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from idc.device.driver import Device
    from idc.device.options import Value
    from idc.endpoint import IncomingTransaction
    from idc.pump import Place

#: What each end says of itself: version, queues, MTU, offloads that it takes.
_TERMS: Final = struct.Struct("<HHII")
VERSION: Final = 1
#: Largest MTU of a TAP interface: an IP packet of 65535 bytes less an Ethernet header.
MOST_MTU: Final = 65521
#: Least MTU of an interface with IPv6 (RFC 8200).
_IPV6_MTU: Final = 1280
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MAC: Final = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


class _NetDriver(Queued):
    """Either end."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._settings = settings(device)
        self._agreed = False
        self._carrier = False
        self._trouble: OSError | None = None
        self._ready = False
        self._taps: list[Tap] = []
        self._tally = Tally(device.sockets / f"net-{name_of(device)}.json", self.counters)
        queues = device.options["queues"]
        assert isinstance(queues, int)
        try:
            self.interface = Interface(name_of(device), queues)
        except BaseException:
            super().drop()
            raise
        self._plumber = threading.Thread(target=self._plumb, name=self.interface.name, daemon=True)
        self._plumber.start()

    def _plumb(self) -> None:
        """In a thread: other drivers of this domain need not wait for a program to start."""
        try:
            set_up(self.interface.name, self._settings)
            self._ready = True
        except OSError as error:
            self._trouble = error
        self.tell()

    # -- as a driver

    def shapes(self, places: Sequence[Place]) -> Sequence[Tap]:
        """See `Queued`."""
        self._taps = [Tap(fd, place) for fd, place in zip(self.interface.fds, places, strict=True)]
        return self._taps

    @property
    def connected(self) -> bool:
        """See `Driver`: whether the interface has its carrier."""
        return super().connected and self._carrier

    @property
    def reason(self) -> str:
        """See `Driver`."""
        return next((queue.reason for queue in self.queues if queue.reason), super().reason)

    def changed(self) -> None:
        """See `Queued`."""
        if self._trouble is not None:
            raise self._trouble
        up = self._agreed and self._ready and bool(self.queues) and all(queue.connected for queue in self.queues)
        if up != self._carrier:
            self._carrier = up
            self.interface.carrier(up=up)

    def work(self) -> bool:
        """See `Driver`."""
        busy = super().work()
        self._tally.look()
        return busy

    def close(self) -> None:
        """See `Driver`."""
        self._part()
        super().close()

    def drop(self) -> None:
        """See `Driver`. The interface goes."""
        self._plumber.join()
        super().drop()
        self.interface.close()
        self._tally.remove()

    def _part(self) -> None:
        """No carrier from now on."""
        self._agreed = False
        if self._carrier:
            self._carrier = False
            self.interface.carrier(up=False)

    # -- as a client of the device's endpoint

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        self._part()
        done()

    @property
    def terms(self) -> bytes:
        """What this end says of itself."""
        return _TERMS.pack(VERSION, len(self.interface.fds), self._settings.mtu, OFFLOADS)

    def hold_against(self, endpoint: Endpoint, theirs: bytes) -> bool:
        """Whether the other end was told the same; if not, that connection ends."""
        if theirs == self.terms:
            self._agreed = True
            self.tell()
            return True
        if len(theirs) == _TERMS.size:
            version, queues, mtu, offloads = _TERMS.unpack(theirs)
            said = f"version {version}, {queues} queues, MTU {mtu}, offloads {offloads:#x}"
        else:
            said = f"{len(theirs)} bytes"
        endpoint.accuse(f"{self.device}: the other end has {said}; this one has version {VERSION}, "
                        f"{len(self.interface.fds)} queues, MTU {self._settings.mtu}, offloads {OFFLOADS:#x}")
        return False

    # -- counters

    def counters(self) -> dict[str, object]:
        """Of each queue: what it has moved and dropped, and how it slept."""
        queues = []
        for queue, tap in zip(self.queues, self._taps, strict=False):
            why = os.strerror(tap.refused_with) if tap.refused_with else ""
            queues.append({**asdict(tap.packets), "refused_with": why, **queue.told_of()})
        return {"carrier": self._carrier, "queues": queues}


class NetFront(_NetDriver, FrontDriver):
    """The end that says its terms first."""

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""

        def answered(completion: Completion) -> None:
            if completion.result is Result.OK:
                self.hold_against(endpoint, completion.status)

        endpoint.submit_transaction(self.terms, answered)


class NetBack(_NetDriver, BackDriver):
    """The end that answers."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`."""
        transaction.complete(self.terms)
        self.hold_against(endpoint, transaction.parameters)


class Net(DeviceClass):
    """A network interface in each of two domains."""

    name = "net"
    options: ClassVar[Mapping[str, Option]] = {
        "mtu": Option(1500, "bytes of an IP packet; TCP crosses in pieces of 64 KiB whatever it is", least=68,
                      most=MOST_MTU),
        "queues": Option(1, "of each interface, each with a thread of its own at both ends", least=1, most=8),
        "poll": POLL,
        "front_address": Option("", "addresses of the front end's interface: 10.0.0.1/24, or several with commas"),
        "back_address": Option("", "the same of the back end's"),
        "front_mac": Option("", "MAC address of the front end's interface; by default one made of the device's name"),
        "back_mac": Option("", "the same of the back end's"),
        "front_name": Option("", "of the front end's interface; by default idcN"),
        "back_name": Option("", "of the back end's interface; by default vifN.FRONT, cut to 15 bytes"),
    }
    service = Service("net", Quotas(4, 0, 64, 64), outstanding=4)
    front = NetFront
    back = NetBack
    modules = ("tun",)

    @classmethod
    def queues(cls, options: Mapping[str, Value]) -> Queues:
        """See `DeviceClass`."""
        count, mtu = options["queues"], options["mtu"]
        assert isinstance(count, int)
        assert isinstance(mtu, int)
        for role in Role:
            addresses = addresses_of(options, role)
            if mtu < _IPV6_MTU and any(address.version == 6 for address in addresses):
                raise MisuseError(f"device class net, option mtu: {mtu} is less than {_IPV6_MTU}, which IPv6 needs")
            name, mac = str(options[f"{role.value}_name"]), str(options[f"{role.value}_mac"]).lower()
            if name and not _NAME.fullmatch(name):
                raise MisuseError(f"device class net, option {role.value}_name: {name!r} is no name of an interface: 1 "
                                  "to 15 letters, digits, '_', '.', '-'")
            if mac and (not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00"):
                raise MisuseError(f"device class net, option {role.value}_mac: {mac!r} is no MAC address of one "
                                  "interface, such as 02:00:00:00:00:01")
        macs = [str(options[f"{role.value}_mac"]).lower() for role in Role]
        if macs[0] and macs[0] == macs[1]:
            raise MisuseError(f"device class net: both ends have the MAC address {macs[0]}")
        return Queues(count, QUOTAS, DEPTH, DEPTH * BUFFER_BYTES)


def addresses_of(options: Mapping[str, Value], role: Role) -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    """Those of one end. Raises MisuseError."""
    found = []
    for text in str(options[f"{role.value}_address"]).replace(",", " ").split():
        try:
            found.append(ipaddress.ip_interface(text))
        except ValueError:
            raise MisuseError(f"device class net, option {role.value}_address: {text!r} is no address with a prefix; "
                              "write 10.0.0.1/24 or fd00::1/64") from None
    return found


def name_of(device: Device) -> str:
    """Of the interface at this end."""
    given = str(device.options[f"{device.role.value}_name"])
    return given or (f"idc{device.number}" if device.role is Role.FRONT else f"vif{device.number}.{device.peer}"[:15])


def settings(device: Device) -> Settings:
    """Of the interface at this end."""
    mtu, role = device.options["mtu"], device.role
    assert isinstance(mtu, int)
    front, back = (device.here, device.peer) if role is Role.FRONT else (device.peer, device.here)
    made = hashlib.sha256(f"{front} {back} {device.number} {role.value}".encode()).digest()
    mac = str(device.options[f"{role.value}_mac"]).lower() or ":".join(f"{byte:02x}" for byte in (2, *made[:5]))
    return Settings(mtu, mac, addresses_of(device.options, role), f"idc {device}, the other end is in {device.peer}")
