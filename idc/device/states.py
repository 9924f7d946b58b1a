"""The life cycle of one end of a device: one table, no I/O. Drawn in docs/devices.md. Depends on nothing.

The states are those of Xen's xenbus. Neither end waits for the other's word to open the region, which is theirs alone
and in which their endpoints find each other in whatever order they come:

    front end                                          back end
    initialising  driver being made                    initialising  driver being made
    initialised   region open, waits for the other     init-wait     region open, waits for the front end
                                                       initialised   waits for the endpoints to meet
    connected     the two endpoints have met           connected

That the endpoints have met tells an end as much as the other's word in the registry, and usually sooner.

The table looks at what is the case (`Facts`), not at what has just happened, so that the order in which news comes
makes no difference, and news that is lost none either. `Machine.look` goes as far as the facts lead.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Steps of which state, time and reason are kept.
STEPS: Final = 8
#: Longest reason that is kept, characters.
WHY: Final = 160


class State(enum.Enum):
    """Where an end is; `closed` is also what an end is that is not there."""

    INITIALISING = "initialising"
    INIT_WAIT = "init-wait"
    INITIALISED = "initialised"
    CONNECTED = "connected"
    CLOSING = "closing"
    CLOSED = "closed"


class Role(enum.Enum):
    """Which end."""

    FRONT = "front"
    BACK = "back"

    @property
    def other(self) -> Role:
        """The end at the other side."""
        return Role.BACK if self is Role.FRONT else Role.FRONT


class Action(enum.Enum):
    """What whoever runs the machine does on the way into a state."""

    MAKE = "make"
    OPEN = "open"
    CLOSE = "close"
    DROP = "drop"
    NOTHING = "nothing"


@dataclass(slots=True)
class Facts:
    """What is the case at one end.

    Attributes:
        wanted: the device is attached, and its driver is to run.
        made: its driver is there.
        peer: state of the other end, as that publishes it; None if it publishes none.
        open: the region is open here: ring and event channel are in hand.
        connected: the endpoints have met.
        trouble: why driver or region cannot be had now; the end is closed until this is empty again.
        reason: why the endpoints were parted, or why the device is not wanted any more.
    """

    wanted: bool = True
    made: bool = False
    peer: State | None = None
    open: bool = False
    connected: bool = False
    trouble: str = ""
    reason: str = ""


class Row(NamedTuple):
    """One line of the table: from a state, when that is so, to the next."""

    role: Role | None
    state: State
    when: Callable[[Facts], bool]
    then: State
    action: Action
    why: Callable[[Facts], str]


class Step(NamedTuple):
    """One change of state: `since` in seconds since 1970, by the domain's own clock."""

    state: State
    since: float
    why: str


#: States of a front end that has opened the region.
ASKED: Final = frozenset({State.INITIALISED, State.CONNECTED})

_F, _B, _S, _A = Role.FRONT, Role.BACK, State, Action


def _unwanted(facts: Facts) -> bool:
    return not facts.wanted


def _ended(facts: Facts) -> str:
    return facts.reason or "detached"


def _said(text: str) -> Callable[[Facts], str]:
    return lambda _: text


def _troubled(facts: Facts) -> bool:
    return bool(facts.trouble)


def _trouble(facts: Facts) -> str:
    return facts.trouble


TABLE: Final[tuple[Row, ...]] = (
    Row(None, _S.CLOSED, lambda f: f.wanted and not f.trouble, _S.INITIALISING, _A.MAKE, _said("attached")),
    Row(None, _S.INITIALISING, _unwanted, _S.CLOSING, _A.CLOSE, _ended),
    Row(None, _S.INITIALISING, _troubled, _S.CLOSED, _A.DROP, _trouble),
    Row(_F, _S.INITIALISING, lambda f: f.made, _S.INITIALISED, _A.OPEN, _said("waits for the back end")),
    Row(_B, _S.INITIALISING, lambda f: f.made, _S.INIT_WAIT, _A.OPEN, _said("the driver is there")),
    Row(None, _S.INIT_WAIT, _unwanted, _S.CLOSING, _A.CLOSE, _ended),
    Row(None, _S.INIT_WAIT, _troubled, _S.CLOSED, _A.DROP, _trouble),
    # That the endpoints have met says it too, and sooner than the registry.
    Row(_B, _S.INIT_WAIT, lambda f: f.peer in ASKED or f.connected, _S.INITIALISED, _A.NOTHING,
        _said("the front end has opened the region")),
    Row(None, _S.INITIALISED, _unwanted, _S.CLOSING, _A.CLOSE, _ended),
    Row(None, _S.INITIALISED, _troubled, _S.CLOSED, _A.DROP, _trouble),
    Row(None, _S.INITIALISED, lambda f: f.connected, _S.CONNECTED, _A.NOTHING, _said("the endpoints have met")),
    Row(None, _S.CONNECTED, _unwanted, _S.CLOSING, _A.CLOSE, _ended),
    Row(None, _S.CONNECTED, _troubled, _S.CLOSED, _A.DROP, _trouble),
    Row(None, _S.CONNECTED, lambda f: not f.connected, _S.INITIALISED, _A.NOTHING,
        lambda f: f.reason or "the other end is gone"),
    Row(None, _S.CLOSING, lambda f: not f.open, _S.CLOSED, _A.DROP, _ended),
)
#: Those that can count at an end of that role in that state.
_ROWS: Final = {(role, state): tuple(row for row in TABLE if row.state is state and row.role in (None, role))
                for role in Role for state in State}


class Machine:
    """One end's state.

    Args:
        role: which end.
        now: seconds since 1970.

    Attributes:
        facts: to be changed by whoever runs it, who then calls `look`.
        steps: the last ones, the newest last.
    """

    def __init__(self, role: Role, now: float, why: str = "not attached") -> None:
        self.role = role
        self.facts = Facts()
        self.steps: deque[Step] = deque([Step(State.CLOSED, now, why)], maxlen=STEPS)

    @property
    def state(self) -> State:
        """Where it is."""
        return self.steps[-1].state

    def look(self, now: float, act: Callable[[Action], None] = lambda _: None) -> bool:
        """Go as far as the facts lead. Whether the state has changed.

        `act` does what an action says and brings the facts up to date; it is called after the step is noted.
        """
        moved = False
        while (row := self._row()) is not None:
            self.steps.append(Step(row.then, now, row.why(self.facts)[:WHY]))
            moved = True
            act(row.action)
        return moved

    def _row(self) -> Row | None:
        for row in _ROWS[self.role, self.steps[-1].state]:
            if row.when(self.facts):
                return row
        return None


def pack(steps: deque[Step]) -> bytes:
    """What an end publishes: a line for each step, the newest first: state, since, why."""
    lines = [f"{step.state.value} {step.since:.3f} {' '.join(step.why.split())}" for step in reversed(steps)]
    return "\n".join(lines).encode("utf-8", "replace")[:2048]


def parse(value: bytes) -> list[Step]:
    """Steps as the other side published them, the newest first; lines that are none are left out. Trusts nothing."""
    found = []
    for line in value.decode("utf-8", "replace").splitlines()[:STEPS]:
        word, _, rest = line.partition(" ")
        since, _, why = rest.partition(" ")
        try:
            step = Step(State(word), float(since), "".join(c if c.isprintable() else "?" for c in why)[:WHY])
        except ValueError:
            continue
        if 0 <= step.since < 1e11:
            found.append(step)
    return found


def hopeless(steps: Sequence[Step], seconds: float) -> bool:
    """Whether an end has tried, and closed for the same reason, for so long. `steps` as `parse` gives them."""
    closed = [step for step in steps if step.state is State.CLOSED]
    same = [step.since for step in closed if step.why == closed[0].why]
    return len(same) > 1 and steps[0].state is not State.CONNECTED and same[0] - same[-1] >= seconds
