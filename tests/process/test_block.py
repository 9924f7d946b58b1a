"""Block devices between process domains: the test is the front end's kernel. What stock tools say is in tests/vm."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from block_support import DISC, FLUSH, READ, TRIM, WRITE, FakeNbd, KnownDisk
from device_support import Bench, bench, until

from host.devices import DeviceError
from idc.device.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.device.keys import Name

SIZE = 4 << 20
CONNECTED = (State.CONNECTED, State.CONNECTED)


@dataclass
class Rig:
    """A device and its kernel."""

    here: Bench
    nbd: FakeNbd
    image: Path
    name: Name | None = None

    def attach(self, wait: float | None = 30.0, number: str = "0", **options: Any) -> None:
        """While the kernel answers."""
        options = {"image": str(self.image), "kernel": str(self.nbd.path),
                   "runtime": str(self.here.directory / "run"), **options}
        seen = self.here.controller.attach("fakeblock", "front", "back", options, wait=None, number=number)
        self.name = seen.name
        if wait is not None:
            self.nbd.until(lambda: self.here.controller.see(seen.name).states == CONNECTED, wait)

    def tally(self, role: str) -> Path:
        """Where that end leaves its counters."""
        peer = {"front": "back", "back": "front"}[role]
        return self.here.domains[role].sockets / f"fakeblock-0.{role}.{peer}.json"

    def counters(self, role: str) -> list[dict[str, Any]]:
        """Of each queue, once there are any."""
        self.nbd.until(lambda: self.tally(role).exists() and bool(json.loads(self.tally(role).read_text())["queues"]))
        found: list[dict[str, Any]] = json.loads(self.tally(role).read_text())["queues"]
        return found

    def why(self, role: str) -> str:
        assert self.name is not None
        steps = getattr(self.here.controller.see(self.name), role)
        return " | ".join(f"{step.state.value}: {step.why}" for step in steps)

    def until_said(self, role: str, what: str) -> None:
        self.nbd.until(lambda: what in self.why(role))

    def detach(self) -> None:
        assert self.name is not None
        name, self.name = self.name, None

        def detached() -> bool:
            try:
                self.here.controller.detach(name, wait=0)
            except DeviceError:  # it does not close yet: it waits for this thread, which is the kernel
                return False
            return True

        self.nbd.until(detached)


@contextmanager
def rig(size: int = SIZE) -> Iterator[Rig]:
    with bench("front", "back") as here:
        image = here.directory / "image"
        image.write_bytes(os.urandom(size))
        nbd = FakeNbd(here.directory / "kernel")
        made = Rig(here, nbd, image)
        try:
            yield made
            if made.name is not None:
                made.detach()
        finally:
            nbd.close()


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """All its threads are, meanwhile."""
    os.kill(process, signal.SIGSTOP)
    try:
        until(lambda: all(task.read_text().rpartition(")")[2].split()[0] == "T"
                          for task in Path(f"/proc/{process}/task").glob("*/stat")))
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize(("connections", "poll"), [(1, 0), (3, 0), (1, 3000)])
def test_what_is_written_is_read_and_lies_in_the_image(connections: int, poll: int) -> None:
    with rig() as r:
        r.attach(connections=connections, poll=poll)
        assert len(r.nbd.connections) == connections
        assert r.nbd.disk["size"] == SIZE
        assert (r.nbd.disk["timeout"] == 0) is (connections == 1)
        disk = KnownDisk(r.nbd, r.image.read_bytes(), seed=connections)
        disk.run(400)
        disk.verify()
        assert not disk.errors
        assert r.image.read_bytes() == disk.content
        for end, told in (("front", "requests"), ("back", "frames")):
            assert [queue["poll"] for queue in r.counters(end)] == [poll / 1e6] * connections
            while not all(queue[told] for queue in r.counters(end)):
                r.nbd.pump(0.05)
        r.detach()
        assert r.nbd.log == ["identifier", "connect", "disconnect"]
        assert not any(r.tally(end).exists() for end in ("front", "back"))


def test_a_long_request_and_one_that_is_too_long() -> None:
    with rig() as r:
        r.attach()
        data = os.urandom(1 << 20)
        assert r.nbd.one(WRITE, 512, len(data), data) == (0, b"")
        assert r.nbd.one(READ, 512, len(data)) == (0, data)
        assert r.nbd.one(WRITE, 0, 3 << 20, bytes(3 << 20))[0] == errno.EINVAL
        assert r.nbd.one(READ, 0, 3 << 20)[0] == errno.EINVAL
        assert r.nbd.one(READ, SIZE - 512, 1024)[0] == errno.EINVAL
        assert r.nbd.one(9, 0, 512)[0] == errno.EINVAL
        assert r.nbd.one(READ, 512, len(data)) == (0, data)


def test_the_back_end_killed_again_and_again_under_load() -> None:
    shake("back", 8, over=False)


def test_the_back_end_of_an_overlay_killed_again_and_again_under_load() -> None:
    shake("back", 5, over=True)


def test_the_front_end_killed_again_and_again_under_load() -> None:
    shake("front", 5, over=False)


@pytest.mark.soak
@pytest.mark.parametrize("end", ["front", "back"])
@pytest.mark.parametrize("over", [False, True])
def test_either_end_killed_under_load_for_long(end: str, over: bool) -> None:
    shake(end, 200, over=over)


def shake(end: str, kills: int, *, over: bool) -> None:
    """Nobody sees an error, and every byte is what it must be."""
    with rig() as r:
        base = r.image.read_bytes()
        if over:
            r.attach(connections=2, image=str(r.here.directory / "over"), base=str(r.image))
        else:
            r.attach(connections=2)
        disk = KnownDisk(r.nbd, base, seed=kills)
        for _ in range(kills):
            disk.run(40)
            worker = r.here.domains[end].worker
            disk.submit(16)
            r.nbd.pump()
            os.kill(worker, signal.SIGKILL)
            disk.run(40)
        disk.verify()
        assert not disk.errors
        assert r.image.read_bytes() == (base if over else disk.content)


def test_requests_fail_after_the_timeout_and_go_through_when_the_back_end_is_there_again() -> None:
    with rig() as r:
        r.attach(timeout=1.0)
        data = os.urandom(512)
        r.here.domains["back"].stop()
        assert r.nbd.one(WRITE, 0, 512, data)[0] == errno.EIO
        assert r.nbd.one(READ, 0, 512)[0] == errno.EIO
        r.here.domains["back"].start()
        r.nbd.until(lambda: r.nbd.one(WRITE, 0, 512, data)[0] == 0)
        assert r.nbd.one(READ, 0, 512) == (0, data)


def test_a_back_end_that_hangs_is_given_up_and_what_it_still_does_harms_nothing() -> None:
    with rig() as r:
        r.attach(timeout=1.0)
        old, new = os.urandom(512), os.urandom(512)
        worker = r.here.domains["back"].worker
        with stopped(worker):
            assert r.nbd.one(WRITE, 0, 512, old)[0] == errno.EIO
        r.nbd.until(lambda: r.nbd.one(WRITE, 0, 512, new)[0] == 0)
        assert r.nbd.one(READ, 0, 512) == (0, new)
        assert r.here.domains["back"].worker == worker


def test_the_kernel_closes_a_socket_and_sends_nonsense_by_another() -> None:
    with rig() as r:
        r.attach(connections=2)
        disk = KnownDisk(r.nbd, r.image.read_bytes(), seed=3)
        disk.run(50)
        disk.finish()
        r.nbd._end(r.nbd.connections[0])
        disk.run(50)
        disk.finish()
        r.nbd.connections[1].out += b"nonsense" * 8
        disk.run(50)
        disk.verify()
        assert r.nbd.log.count("reconfigure") >= 2


def test_a_device_that_another_program_disconnects_says_so() -> None:
    with rig() as r:
        r.attach()
        r.nbd.ask(DISC, 0, 0, b"", 0, lambda *_: None)
        r.nbd.disk = {}
        r.until_said("front", "was disconnected by another program")
        r.nbd.connections.clear()
        r.nbd.until(lambda: bool(r.nbd.connections))


@pytest.mark.parametrize(("options", "role", "error"), [
    ({"image": "/nowhere/disk.img"}, "back", "image /nowhere/disk.img: No such file or directory"),
    ({"image": "disk.img"}, "back", "image 'disk.img' is no absolute path"),
    ({"image": "/dev/null"}, "back", "image /dev/null is neither a file nor a block device"),
])
def test_an_image_that_is_none(options: dict[str, str], role: str, error: str) -> None:
    with rig() as r:
        r.attach(wait=None, **options)
        r.until_said(role, error)


def test_an_image_of_odd_size() -> None:
    with rig(100_001) as r:
        r.attach(wait=None)
        r.until_said("front", "the image has 100001 bytes, no multiple of 512")


def test_an_empty_image() -> None:
    with rig(0) as r:
        r.attach(wait=None)
        r.until_said("back", "is empty: make it as large as the disk shall be")


def test_two_devices_on_one_image() -> None:
    with rig() as r:
        r.attach()
        first = r.name
        r.attach(wait=None, number="1")
        r.until_said("back", "is locked by device fakeblock-0 of front (process")
        r.detach()
        r.name = first


def test_two_devices_share_an_image_if_both_say_so() -> None:
    with rig() as r:
        other = FakeNbd(r.here.directory / "other")
        try:
            r.attach(shared=True)
            first, nbd = r.name, r.nbd
            r.nbd = other
            r.attach(number="1", shared=True)
            data = os.urandom(4096)
            assert nbd.one(WRITE, 8192, 4096, data)[0] == 0
            assert other.one(READ, 8192, 4096) == (0, data)
            r.detach()
            r.name, r.nbd = first, nbd
        finally:
            other.close()


def test_read_only() -> None:
    with rig() as r:
        before = r.image.read_bytes()
        r.attach(read_only=True)
        assert r.nbd.disk["flags"] & 2
        assert r.nbd.one(READ, 0, 4096) == (0, before[:4096])
        for kind in (WRITE, TRIM):
            assert r.nbd.one(kind, 0, 512, b"x" * 512 if kind == WRITE else b"")[0] == errno.EROFS
        assert r.image.read_bytes() == before


def test_an_image_that_shrinks_under_use() -> None:
    with rig() as r:
        r.attach()
        os.truncate(r.image, SIZE // 2)
        assert r.nbd.one(READ, 0, 4096)[0] == 0
        assert r.nbd.one(READ, SIZE - 4096, 4096)[0] == errno.EIO
        assert r.nbd.one(WRITE, SIZE - 4096, 4096, bytes(4096))[0] == errno.EIO
        assert r.nbd.one(FLUSH)[0] == errno.EIO
        assert r.image.stat().st_size == SIZE // 2
        until(lambda: "has shrunk under use" in r.here.domains["back"].log.read_text())
        os.truncate(r.image, SIZE)  # by hand, so that it is whole again
        worker = r.here.domains["back"].worker
        os.kill(worker, signal.SIGKILL)
        r.nbd.until(lambda: r.nbd.one(FLUSH)[0] == 0)


def test_an_image_that_was_replaced_by_a_smaller_one_while_the_back_end_was_away() -> None:
    with rig() as r:
        r.attach()
        r.here.domains["back"].stop()
        os.truncate(r.image, SIZE // 2)
        r.here.domains["back"].start()
        r.until_said("front", f"is another one than before, or of another size ({SIZE // 2} bytes now)")
