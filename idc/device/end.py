"""One end of a device in the domain where it is: the state machine put on a driver. Depends on idc.device.

Nothing here waits but `Driver.open`, and nothing here talks to the registry: `idc.device.drivers` does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc.device import options as options_of
from idc.device.classes import CHANNEL
from idc.device.driver import Device
from idc.device.states import Action, Machine, Role, State
from idc.errors import IdcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from idc.device.classes import DeviceClass
    from idc.device.driver import Driver
    from idc.device.keys import Name

#: Pause after a driver or region that could not be had, seconds: doubles from the first to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
#: After an end was connected, the next pause is the first again.
log = logging.getLogger("idc.device")
#: States that lead on by themselves, and how long one of them lasts before it is told, seconds: each telling is a write
#: to the disk at the registry, and the next one waits for it. That an end is closed, or has met the other, is told at
#: once, and with it the steps that led there.
PASSED: Final = frozenset({State.INITIALISING, State.INIT_WAIT, State.INITIALISED})
PASSING: Final = 0.05
_NO_ADDRESS: Final = "the host has not said where the ends meet"


@dataclass(frozen=True, slots=True)
class Told:
    """What the host wrote for one end.

    Attributes:
        id: changes when the device is attached anew.
        peer: domain at the other end.
        address: where it meets the other end, as an address of this domain.
        options: texts.
        close: why it is to be detached; None if it is not.
    """

    id: bytes
    peer: str
    address: str
    options: Mapping[str, str]
    close: str | None = None


class End:
    """One end.

    Args:
        name: of the device.
        role: which end.
        here: this domain.
        told: by the host.
        find: a device class by its name; raises MisuseError.
        sockets: see `Device`.
        now: seconds: since 1970, and of a clock that never goes back.

    Attributes:
        machine: its state.
        dirty: the state has changed since it was last set to False.
    """

    def __init__(self, name: Name, role: Role, here: str, told: Told, find: Callable[[str], type[DeviceClass]],
                 sockets: Path, now: tuple[float, float]) -> None:
        self.name = name
        self.role = role
        self.told = told
        self.machine = Machine(role, now[0])
        self.driver: Driver | None = None
        self.dirty = True
        self._here = here
        self._find = find
        self._sockets = sockets
        self._pause = FIRST_PAUSE
        self._retry_at = 0.0
        self._now = now[1]
        self._moved = now[1]
        self._gone = False

    @property
    def state(self) -> State:
        """Where it is."""
        return self.machine.state

    @property
    def over(self) -> bool:
        """Whether it is not wanted, and closed."""
        return not self.machine.facts.wanted and self.state is State.CLOSED

    def unwant(self, why: str, *, gone: bool = True) -> None:
        """From now on it is to be closed: the device is detached (`gone`), or only unloaded."""
        facts = self.machine.facts
        if facts.wanted:
            facts.wanted, facts.reason = False, why
            self._gone = gone

    def peer(self, state: State | None) -> None:
        """What the other end says of itself."""
        self.machine.facts.peer = state

    @property
    def curious(self) -> bool:
        """Whether it is in a state in which something follows from what the other end says: that of a back end that
        waits. Usually the endpoints meet before there is time to look.
        """
        return self.machine.facts.wanted and self.state is State.INIT_WAIT

    @property
    def passing(self) -> float:
        """Until when its state is not worth to be told, because it is about to change; 0 if it is now."""
        return self._moved + PASSING if self.state in PASSED else 0.0

    @property
    def due(self) -> float | None:
        """When to try again, by the clock that never goes back; None if nothing is to be tried."""
        return self._retry_at if self.machine.facts.trouble else None

    def work(self, now: tuple[float, float]) -> bool:
        """Drive the driver, and let the state follow. Never raises for what a driver does."""
        self._now = now[1]
        facts, busy = self.machine.facts, False
        if facts.trouble and self._now >= self._retry_at:
            facts.trouble = ""
        if self.driver is not None:
            busy = self._guard(self._pump)
        moved = again = self.machine.look(now[0], self._act)
        while again and self.driver is not None:
            self._guard(self._pump)  # what was opened begins at once, before anybody is told
            again = self.machine.look(now[0], self._act)
        if moved:
            self._moved = self._now
        if self.state is State.CONNECTED:
            self._pause = FIRST_PAUSE
        self.dirty |= moved
        return busy or moved

    def kill(self) -> None:
        """End at once."""
        if self.driver is not None:
            driver, self.driver = self.driver, None
            try:
                driver.drop()
            except Exception:
                log.exception("%s: its driver could not be dropped", self.name)

    # -- within

    def _pump(self) -> bool:
        driver, facts = self.driver, self.machine.facts
        assert driver is not None
        busy = driver.work()
        for endpoint in driver.endpoints():
            busy |= endpoint.pump(0.0)
        facts.open, facts.connected = driver.opened, driver.connected
        if facts.wanted and not facts.connected:
            facts.reason = driver.reason
        return busy

    def _guard(self, call: Callable[[], bool]) -> bool:
        try:
            return call()
        except Exception as error:
            # A driver is somebody else's code: whatever it raises ends this end, and no other.
            if not isinstance(error, (IdcError, OSError)):
                log.exception("%s: its driver failed", self.name)
            self._trouble(f"{type(error).__name__}: {error}")
            return True

    def _trouble(self, why: str) -> None:
        """Begin anew, after a pause."""
        log.warning("%s, %s end: %s; again in %g s", self.name, self.role.value, why, self._pause)
        self.kill()
        facts = self.machine.facts
        facts.made = facts.open = facts.connected = False
        facts.trouble = why
        self._retry_at = self._now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _act(self, action: Action) -> None:
        if action is Action.MAKE:
            self._guard(self._make)
        elif action is Action.OPEN:
            self._guard(self._open)
        elif action is Action.CLOSE:
            self._guard(self._close)
        elif action is Action.DROP:
            self.kill()
            facts = self.machine.facts
            facts.made = facts.open = facts.connected = False

    def _make(self) -> bool:
        kind = self._find(self.name.kind)
        values = options_of.parse(kind.options, self.told.options, f"device class {kind.name}")
        device = Device(kind.name, self.name.number, self.role, self._here, self.told.peer, values, kind.service,
                        CHANNEL, self._sockets, kind.queues(values))
        self.driver = (kind.front if self.role is Role.FRONT else kind.back)(device)
        self.machine.facts.made = True
        return True

    def _open(self) -> bool:
        assert self.driver is not None
        if not self.told.address:
            raise ValueError(_NO_ADDRESS)
        self.driver.open(self.told.address)
        self.machine.facts.open = True
        return True

    def _close(self) -> bool:
        if self.driver is not None:
            self.driver.gone = self._gone
            self.driver.close()
            self.machine.facts.open = self.driver.opened
            self.machine.facts.connected = False
        return True
