"""What is plugged into a running VM: root ports, devices in them, character devices behind those.

Depends on qemu_args, errors and the QMP verbs of the VM that it is for.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from testbed.errors import QmpFailed, SpecError
from testbed.qemu_args import port_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.qmp import Event
    from testbed.vm import Vm


class Ports:
    """The root ports of one VM. Thread-safe.

    Attributes:
        exclusive: held while an ivshmem device comes or goes: both look at which descriptors QEMU has.
        leaving: devices that were told to go, and QEMU's eventfds before; see `testbed.unplug`.
    """

    def __init__(self, vm: Vm) -> None:
        self.exclusive = threading.RLock()
        self.leaving: dict[str, frozenset[int]] = {}
        self._vm = vm
        self._plugging = threading.Lock()
        self._ports: dict[str, str] = {}  # root port -> id of the device in it

    @property
    def devices(self) -> frozenset[str]:
        """Ids of what is plugged in now."""
        with self._plugging:
            return frozenset(self._ports.values())

    def deleted(self, device: str) -> None:
        """QEMU has said that the device is gone: its port is free."""
        with self._plugging:
            self._ports = {port: other for port, other in self._ports.items() if other != device}

    def plug(self, device: Mapping[str, object], timeout: float) -> str:
        """See `Vm.plug`."""
        arguments = dict(device)
        chosen = "" if "bus" in arguments else self._take(str(arguments["id"]))
        if chosen:
            arguments["bus"] = chosen
        try:
            self._vm.qmp("device_add", arguments, timeout=timeout)
        except QmpFailed as error:
            # Not answered: it may still come to be, so the port stays taken.
            if chosen and error.error_class:
                with self._plugging:
                    del self._ports[chosen]
            raise
        return str(arguments["bus"])

    def _take(self, device: str) -> str:
        count = self._vm.spec.region_ports
        with self._plugging:
            for index in range(count):
                if port_name(index) not in self._ports:
                    self._ports[port_name(index)] = device
                    return port_name(index)
        raise SpecError(f"VM {self._vm.name}: all {count} region ports are taken",
                        hint="raise region_ports in its spec")  # fmt: skip

    def unplug(self, device: str, timeout: float) -> None:
        """See `Vm.unplug`."""

        def settled(event: Event) -> bool:
            return event["event"] in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") and (
                event.get("data", {}).get("device") == device
            )

        try:
            event = self._vm.qmp_until("device_del", {"id": device}, settled, timeout)
        except QmpFailed as error:
            if not error.error_class:  # nothing was refused; the event did not come
                error.hint = "the guest must agree: is a program still using the device?"
            raise
        if event["event"] != "DEVICE_DELETED":
            raise self._vm.error(QmpFailed, f"the guest refused to let go of device {device}")
        self.deleted(device)  # whoever waits for the event may be faster than whoever is told of it


def add_chardev(vm: Vm, name: str, path: Path) -> None:
    """See `Vm.add_chardev`."""
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    vm.qmp("chardev-add", {"id": name, "backend": backend})


def remove_chardev(vm: Vm, name: str, timeout: float) -> None:
    """See `Vm.remove_chardev`.

    QEMU frees an unplugged device some time after it has said so, and no event tells when; till then the character
    device is busy. Hence the asking again.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            vm.qmp("chardev-remove", {"id": name})
        except QmpFailed as error:
            if "busy" not in error.message or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
