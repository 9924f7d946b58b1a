"""A VM that is not booted but woken from a template: ready in a fraction of a second. Otherwise a `Vm` like any other.

Depends on `testbed.vm`, `testbed.template` and `testbed.qemu_args`.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import uuid
from typing import TYPE_CHECKING

from testbed.calls import AgentFault
from testbed.errors import BootFailed, VmError
from testbed.qemu_args import clone_args, clone_nic
from testbed.times import BootTimes
from testbed.vm import BOOT_SECONDS, Vm

if TYPE_CHECKING:
    from testbed.calls import AgentInfo
    from testbed.qemu_args import VmSpec, Wiring
    from testbed.run import Run
    from testbed.template import Template

ENTROPY_BYTES = 64
_LOAD_SECONDS = 30.0


def identify(vm: Vm, name: str, timeout: float = BOOT_SECONDS) -> AgentInfo:
    """Make the guest a machine of its own: randomness, clock, host name, ids, ssh keys. Raises BootFailed."""
    try:
        return vm.agent.identify(name=name, entropy=secrets.token_bytes(ENTROPY_BYTES), boot_id=str(uuid.uuid4()),
                                 machine_id=secrets.token_hex(16), timeout=timeout)  # fmt: skip
    except AgentFault as fault:
        raise vm.error(BootFailed, f"could not be given an identity of its own: the guest says: {fault}") from fault
    except TimeoutError:
        raise vm.error(BootFailed, f"did not take its identity in {timeout:.0f} s") from None


class Clone(Vm):
    """A clone of `template`. `start()` returns at once; `wait_ready()` when it is itself: see guest/identity.py."""

    # They come for translated code and for tables of which a clone touches little: measured, 3.5 MB of the 31 that an
    # idle clone had of its own. Its RAM, a file's, gets none in any case, and programs run no slower.
    _huge_pages = False

    def __init__(self, template: Template, spec: VmSpec, run: Run) -> None:
        super().__init__(spec, run)
        self._template = template
        self._state = -1
        self._waking: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start QEMU and begin to wake it. Raises TemplateError if the template does not fit any more, SpecError."""
        self._template.verify()
        self._state = self._template.open_state()
        # Its console says nothing of a boot: nobody is to take an empty log for a lost one.
        template = self._template.directory.name
        self.log.write_text(f"idc-testbed: {self.name} is a clone of template {template}, which booted before\n")
        try:
            super().start()
        finally:
            os.close(self._state)
        self._waking = threading.Thread(target=self._wake, name=f"wake {self.name}", daemon=True)
        self._waking.start()

    def _command(self, wiring: Wiring) -> list[str]:
        return clone_args(self._template.machine, self.spec, wiring)

    def _descriptors(self) -> list[int]:
        return [*super()._descriptors(), self._template.fds[0], self._state]

    def _wake(self) -> None:
        try:
            capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
            self.qmp("migrate-set-capabilities", {"capabilities": capabilities})
            self.migrate("migrate-incoming", f"fd:{self._state}", _LOAD_SECONDS)
            for index, nic in enumerate(self.spec.nics):
                self.qmp("device_add", clone_nic(index, nic))
            self.resume()
            self._agent.wait_ready(BOOT_SECONDS)
            info = identify(self, self.name)
            self.boot_times = BootTimes(
                qmp=self._qmp.connected_at - self._began if self._qmp.connected_at else float("nan"),
                console=None, ready=time.monotonic() - self._began, guest=info.uptime,
            )  # fmt: skip
            self._address()
        except BaseException as error:  # raised again by wait_ready
            self._failure = error

    def _on_ready(self, info: AgentInfo) -> None:
        """Nothing: it is the template that speaks, until it has its identity."""

    def _address(self) -> None:
        """Give the network cards their addresses. The guest sees them some time after it was woken."""
        if self.spec.ip and self.spec.nics:
            address = f"{self.spec.ip},{self.spec.nics[0].mac}"
            self.succeed(["/usr/lib/idc-testbed/address", address], timeout=BOOT_SECONDS)

    def wait_ready(self, timeout: float = BOOT_SECONDS) -> AgentInfo:
        """Wait until it answers as itself. Raises BootFailed, QemuFailed."""
        assert self._waking is not None, "not started"
        self._waking.join(timeout)
        if self._waking.is_alive():
            raise self.error(BootFailed, f"did not wake in {timeout:.0f} s (QEMU: {self._run_state()})")
        if isinstance(self._failure, VmError):
            raise self.error(BootFailed, f"did not wake from template {self._template.directory.name}: "
                             f"{self._failure.message}", hint=self._failure.hint) from self._failure  # fmt: skip
        if self._failure is not None:
            raise self._failure
        return super().wait_ready(timeout)
