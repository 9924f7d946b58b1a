"""Stops or kills this process at a named point of the ring protocol, so that a test hits a race every time.

Depends on idc._core and idc.errors. docs/faults.md shows how; docs/protocol.md gives the protocol. Armed by
`Fault.arm`, or before the program starts by the environment, which is read when idc.ring is imported:

    IDC_FAULT=published:3:stop python3 -m guest.transfer send FILE --region link

A stopped process goes on with SIGCONT. One fault for each process, and each fault comes once.
"""

from __future__ import annotations

import enum
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from idc._core import lib
from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT: Final = "IDC_FAULT"


class Point(enum.IntEnum):
    """Where a side can be stopped: what it did last, and what it has not done yet.

    The rings' points are numbered as in idc/core/idc_core.h: `enum idc_at` for the producer, one more for the consumer.
    """

    COPIED = 1
    """Producer: payload in place, slot word or `tail` not stored."""
    TAKEN = 2
    """Consumer: payload copied out, `head` not stored."""
    PUBLISHED = 3
    """Producer: slot word or `tail` stored, `data_event` not looked at."""
    RELEASED = 4
    """Consumer: `head` stored, `space_event` not looked at."""
    RINGING_DATA = 5
    """Producer: the consumer asked for a doorbell, which is not rung."""
    RINGING_SPACE = 6
    """Consumer: the producer asked for a doorbell, which is not rung."""
    ARMED_SPACE = 7
    """Producer: `space_event` stored, not looked again."""
    ARMED_DATA = 8
    """Consumer: `data_event` stored, not looked again."""
    ASLEEP_SPACE = 9
    """Producer: looked and found no room, not blocked yet."""
    ASLEEP_DATA = 10
    """Consumer: looked and found nothing, not blocked yet."""
    WOKEN_SPACE = 11
    """Producer: took the doorbell, not looked."""
    WOKEN_DATA = 12
    """Consumer: took the doorbell, not looked."""
    CLEARED = 13
    """Attaching: own `ack` and `state` cleared, `epoch` still that of the attachment before."""
    EPOCH = 14
    """Attaching: new `epoch` stored, ring words not reset."""
    RESET = 15
    """Attaching: ring words reset, `state` not open."""
    OPENED = 16
    """Attaching: `state` open, the peer not rung."""
    ACKED = 17
    """Attaching: the peer's `epoch` acknowledged, its own words not looked at."""
    CLOSED = 18
    """Closing: `state` closed, the peer not rung."""


class Action(enum.Enum):
    """What happens at the point; the value is the word in IDC_FAULT."""

    STOP = "stop"
    """SIGSTOP: all threads stand still until SIGCONT."""
    KILL = "kill"
    """SIGKILL: no clean-up of any kind."""

    @property
    def signal(self) -> signal.Signals:
        """The signal that does it."""
        return signal.SIGSTOP if self is Action.STOP else signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """The `nth` passing (from 1) of a point by this process, and what to do there.

    Raises:
        MisuseError: nth is below 1.
    """

    point: Point
    nth: int = 1
    action: Action = Action.STOP

    def __post_init__(self) -> None:
        if self.nth < 1:
            raise MisuseError(f"fault at {self.point.name.lower()}: passings count from 1, not {self.nth}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `point:nth:stop|kill`. Raises MisuseError that lists what there is."""
        name, _, rest = text.partition(":")
        nth, _, action = rest.partition(":")
        try:
            return cls(Point[name.upper()], int(nth), Action(action))
        except (KeyError, ValueError):
            points = ", ".join(point.name.lower() for point in Point)
            raise MisuseError(f"{ENVIRONMENT}={text!r} is not POINT:NTH:stop|kill with POINT one of {points}") from None

    def __str__(self) -> str:
        return f"{self.point.name.lower()}:{self.nth}:{self.action.value}"

    @property
    def env(self) -> dict[str, str]:
        """The environment that arms it in a program about to be started, here or in a guest."""
        return {ENVIRONMENT: str(self)}

    def arm(self) -> None:
        """Arm it in this process, in place of any other. Not while another thread uses a ring."""
        lib.idc_fault_set(self.point, self.nth, self.action.signal)


def disarm() -> None:
    """Take the fault back."""
    lib.idc_fault_set(0, 1, signal.SIGSTOP)


def passing(point: Point) -> None:
    """Pass one of the points that lie in Python: attaching and closing."""
    lib.idc_fault_pass(point)


def arm_from(environment: Mapping[str, str] = os.environ) -> None:
    """Arm what IDC_FAULT asks for, if it is set. Raises MisuseError when it makes no sense."""
    text = environment.get(ENVIRONMENT)
    if text:
        Fault.parse(text).arm()
