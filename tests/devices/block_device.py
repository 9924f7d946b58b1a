"""The device class `block` for processes: the test is the kernel, and gets commands and sockets by a Unix socket."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from idc.block.back import BlockBack
from idc.block.device import Block
from idc.block.front import BlockFront
from idc.block.netlink import Disk, Kernel, NbdError
from idc.device import BackDriver, Option

if TYPE_CHECKING:
    from collections.abc import Sequence


class FakeKernel(Kernel):
    def __init__(self, path: str) -> None:
        self._path = path

    def connect(self, disk: Disk, sockets: Sequence[int]) -> None:
        self._say({"command": "connect", **asdict(disk)}, sockets)

    def reconfigure(self, disk: Disk, sockets: Sequence[int]) -> None:
        self._say({"command": "reconfigure", **asdict(disk)}, sockets)

    def disconnect(self, index: int) -> None:
        self._say({"command": "disconnect"})

    def identifier(self, index: int) -> str | None:  # type: ignore[override]
        found = self._say({"command": "identifier"})["identifier"]
        return None if found is None else str(found)

    def close(self) -> None:
        pass

    def _say(self, what: dict[str, Any], sockets: Sequence[int] = ()) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dial:
            dial.connect(self._path)
            socket.send_fds(dial, [json.dumps(what).encode()], list(sockets))
            answer: dict[str, Any] = json.loads(dial.recv(4096))
        if answer["error"]:
            raise NbdError(os.strerror(answer["error"]), answer["error"])
        return answer


class FakeFront(BlockFront):
    def kernel(self) -> Kernel:
        return FakeKernel(str(self.device.options["kernel"]))

    def settle(self) -> None:
        pass


class FakeBack(BlockBack):
    def __init__(self, *args: Any) -> None:
        type(self).runtime = Path(str(args[0].options["runtime"]))
        super().__init__(*args)


class FakeBlock(Block):
    name = "fakeblock"
    options: ClassVar = {**Block.options, "kernel": Option("", "socket"), "runtime": Option("", "directory")}
    front = FakeFront
    back: ClassVar[type[BackDriver]] = FakeBack
