"""Takes an ivshmem-doorbell device out of a running QEMU so that QEMU survives it.

`ivshmem_exit` (QEMU's hw/misc/ivshmem.c; read in 7.2, and without irqfd, so under TCG) closes the device's eventfds
and frees its vectors, but leaves `ivshmem_vector_notify` registered for the eventfds' numbers. Two things follow:

- A doorbell that arrives while the guest's CPU has QEMU at `ivshmem_exit` has woken the main loop already, which then
  calls the handler with what was freed: SIGSEGV. So whoever could ring is kept still till the device is gone.
- The handler stays for good, and is called when the next file that QEMU opens under one of these numbers becomes
  readable: the next link's eventfd, say. So each number is given to a socket, which becomes a network back end and is
  removed again: QEMU then forgets the number's handler, whoever registered it.

Depends on errors and on the QMP verbs of a VM.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from itertools import count
from typing import TYPE_CHECKING, Final

from testbed.errors import QmpFailed, VmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from testbed.vm import Vm

#: The longest time, in seconds, for which others are kept still: the guest lets go in a fifth of a second here, and one
#: that does not must not hold up its peers.
STILL_SECONDS: Final = 2.0
#: Numbers that are free in QEMU below the highest one of a device: more than that is no QEMU of ours.
_MOST_GAPS: Final = 1024
_EVENTFD: Final = "anon_inode:[eventfd]"
_serial = count()


def unplug_doorbell(vm: Vm, device: str, peers: Iterable[Vm], timeout: float) -> None:
    """Unplug an ivshmem-doorbell; `timeout` in seconds for the guest to let go of it.

    `peers` are the VMs that could ring it: their CPUs stand still meanwhile, for two seconds at most. One that rings
    after that, while this guest at last lets go, may end this QEMU.

    Raises:
        QmpFailed: the guest does not let go; or QEMU does not do what is needed to survive it, and nothing was begun.
        VmError: what ended the VM.
    """
    with vm.ports.exclusive:
        sweep(vm, ())  # so that a QEMU which cannot do it is found out before
        vm.ports.leaving[device] = _eventfds(vm)
        with _still(peers):
            vm.qmp("query-status")  # once round its main loop: what was rung before has been taken
            vm.unplug(device, timeout=timeout)
        _forget(vm, device)


def settle(vm: Vm) -> list[str]:
    """Take away the handlers of devices that their guest let go of late. To be done before anything is plugged in.

    Returns the devices. Raises as `sweep`.
    """
    with vm.ports.exclusive:
        late = [name for name in vm.ports.leaving if name not in vm.devices]
        for device in late:
            _forget(vm, device)
        return late


def _forget(vm: Vm, device: str) -> None:
    there = {number for number, _ in _files(vm)}
    sweep(vm, vm.ports.leaving[device] - there)
    del vm.ports.leaving[device]


def sweep(vm: Vm, numbers: Iterable[int]) -> None:
    """Make QEMU forget its handlers for descriptors of these numbers, which are closed; none: only see that it can.

    Raises QmpFailed, or what ended the VM.
    """
    wanted = set(numbers)
    mine, theirs = socket.socketpair()
    names: list[str] = []
    added: list[str] = []
    with mine, theirs:
        link = f"socket:[{os.fstat(theirs.fileno()).st_ino}]"
        try:
            while not names or not wanted <= {number for number, name in _files(vm) if name == link}:
                if len(names) > _MOST_GAPS:
                    raise vm.error(QmpFailed, f"QEMU does not give out the descriptors {sorted(wanted)}")
                names.append(f"sweep-{next(_serial)}")
                vm.send_fd(names[-1], theirs.fileno())  # it gets the lowest number that is free
            for name in names:
                vm.qmp("netdev_add", {"type": "socket", "id": name, "fd": name})
                added.append(name)
        finally:
            # What goes wrong here went wrong above, which is what the caller is told; or the VM is gone.
            with contextlib.suppress(VmError):
                for name in added:
                    vm.qmp("netdev_del", {"id": name})
                for name in names[len(added):]:
                    vm.qmp("closefd", {"fdname": name})


@contextlib.contextmanager
def _still(vms: Iterable[Vm]) -> Iterator[None]:
    """Stop the CPUs of those VMs that run, for `STILL_SECONDS` at most."""
    stopped: list[Vm] = []
    going = threading.Lock()

    def go_on() -> None:
        with going:
            while stopped:
                # One that has died meanwhile rings nobody, and its user is told by the next call.
                with contextlib.suppress(VmError):
                    stopped.pop().resume()

    timer = threading.Timer(STILL_SECONDS, go_on)
    timer.daemon = True
    try:
        for vm in vms:
            if vm.state == "running":
                with contextlib.suppress(VmError):
                    vm.pause()
                    stopped.append(vm)
        timer.start()
        yield
    finally:
        timer.cancel()
        go_on()


def _eventfds(vm: Vm) -> frozenset[int]:
    """QEMU's descriptors that are eventfds."""
    return frozenset(number for number, name in _files(vm) if name == _EVENTFD)


def _files(vm: Vm) -> Iterator[tuple[int, str]]:
    """QEMU's descriptors, and what the kernel calls the file behind each."""
    directory = f"/proc/{vm.pid}/fd"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for number in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                yield int(number), os.readlink(f"{directory}/{number}")
