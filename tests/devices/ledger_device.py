"""A device class for tests: the back end notes each number that it executes in a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from idc.device import BackDriver, Device, DeviceClass, Option

if TYPE_CHECKING:
    from idc.endpoint import Endpoint, IncomingTransaction


class LedgerBack(BackDriver):
    def __init__(self, device: Device) -> None:
        super().__init__(device)
        if device.options["broken"]:
            raise OSError("this driver is broken, as it was told to be")
        self._file = os.open(str(device.options["path"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        os.write(self._file, transaction.parameters + b"\n")
        transaction.complete(transaction.parameters + b" noted")
        if self.device.options["flap"]:
            endpoint.disconnect("as it was told to")

    def drop(self) -> None:
        super().drop()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Ledger(DeviceClass):
    name = "ledger"
    options: ClassVar = {"path": Option("/dev/null", "where numbers are noted"),
                         "broken": Option(False, "fail"),
                         "flap": Option(False, "end the connection after each answer")}
    back = LedgerBack
