"""Drivers with queues: opened with the region, each driven by a thread of its own (idc/pump/queue.py).

    class Mine(Queued, FrontDriver):
        def shapes(self, places):
            return [Tap(fd, place) for fd, place in zip(self.fds_of_mine, places)]

        def changed(self):
            ...                              # self.queues: some are connected now, or are not any more

Depends on idc.device and idc.pump.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, ClassVar, Final

from idc.device.classes import queue_channel
from idc.device.driver import Driver
from idc.device.options import Option
from idc.errors import MisuseError
from idc.pump import Queue, places
from idc.transport.address import open_port
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.device.driver import Device
    from idc.pump import Place, Shape


#: Longest that a queue may be told to poll, microseconds.
MOST_POLL: Final = 1_000_000
#: The option "poll" of a class with queues.
POLL: Final = Option(0, "microseconds that a queue polls after it last had something to do: latency for a CPU; 0: as "
                     "long as that has paid of late", least=0, most=MOST_POLL, unit="microseconds")


def poll_seconds(device: Device) -> float:
    """What `Queue` is told of the option; 0.0 for a class that has none."""
    microseconds = device.options.get("poll", POLL.default)
    assert isinstance(microseconds, int)
    return microseconds / 1e6


class Queued(Driver):
    """A driver whose class has queues; a FrontDriver or BackDriver besides.

    Attributes:
        queues: while the region is open.
        spin: seconds that a queue polls before it sleeps, as long as that pays; 0: it sleeps at once.
    """

    spin: ClassVar[float] = 50e-6

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.queues: list[Queue] = []
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def shapes(self, places: Sequence[Place]) -> Sequence[Shape]:
        """One for each queue, with these buffers, which it closes."""
        raise NotImplementedError

    def changed(self) -> None:
        """A queue was connected or lost, or `tell` was called. In the drivers' thread; what it raises ends this end."""

    def tell(self) -> None:
        """Have `changed` called soon. From any thread."""
        os.eventfd_write(self._news, 1)

    def open(self, address: str) -> None:
        """See `Driver`."""
        super().open(address)
        declared = self.device.queues
        if declared is None:
            raise MisuseError(f"device class {self.device.kind} has no queues")
        region = address.rpartition("/")[0]
        ports: list[SharedPort] = []
        try:
            for index in range(declared.count):
                port = open_port(f"{region}/{queue_channel(index)}")
                assert isinstance(port, SharedPort), "a queue's channel is one of a region"
                port.spin = self.spin
                ports.append(port)
            for index, shape in enumerate(self.shapes(places(ports[0].region, declared.count))):
                self.queues.append(Queue(queue_channel(index), shape, depth=declared.requests, accepts=declared.quotas,
                                         told=self.tell, poll=poll_seconds(self.device)))
            for queue in self.queues:
                queue.start(ports[0])
                del ports[0]  # from now on it is the queue's
        finally:
            for port in ports:
                port.close()

    def close(self) -> None:
        """See `Driver`."""
        self._stop()
        super().close()

    def drop(self) -> None:
        """See `Driver`."""
        self._stop()
        super().drop()
        if self._news >= 0:
            os.close(self._news)
            self._news = -1

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        return (*super().fds(), self._news)

    def work(self) -> bool:
        """See `Driver`. Raises what ended a queue's thread."""
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            return super().work()
        for queue in self.queues:
            if queue.error is not None:
                raise queue.error
        self.changed()
        return True

    def _stop(self) -> None:
        queues, self.queues = self.queues, []
        with contextlib.ExitStack() as held:
            for queue in queues:
                held.callback(queue.stop)
