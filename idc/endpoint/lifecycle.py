"""The state machine of an endpoint: one table, no I/O. Drawn in docs/idc.md. Depends on nothing.

`step(state, event)` says the next state and what to do, in order. What the table does not list changes nothing: a
second APPEARED, a LOST that was known, anything after DESTROYED.
"""

from __future__ import annotations

import enum
from typing import Final


class State(enum.Enum):
    """Where an endpoint is. DISCONNECTING, VANISHING and DESTROYING wait for the client's `done`."""

    ABSENT = "absent"
    PRESENT = "present"
    CONNECTED = "connected"
    DISCONNECTING = "disconnecting"
    VANISHING = "vanishing"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"


class Event(enum.Enum):
    """What happens to it: seen by the transport (first four), or done by the client."""

    APPEARED = "appeared"
    CONNECTED = "connected"
    LOST = "lost"
    DISAPPEARED = "disappeared"
    DONE = "done"
    DESTROY = "destroy"


class Action(enum.Enum):
    """What the endpoint does about it: TELL_* call the client, FAIL_ALL completes what is outstanding."""

    FAIL_ALL = "fail all"
    TELL_APPEAR = "appear"
    TELL_CONNECT = "connect"
    TELL_DISCONNECT = "disconnect"
    TELL_DISAPPEAR = "disappear"
    TELL_DESTROYED = "destroyed"


_S, _E, _A = State, Event, Action
_LOSE = (_A.FAIL_ALL, _A.TELL_DISCONNECT)

TABLE: Final[dict[tuple[State, Event], tuple[State, tuple[Action, ...]]]] = {
    (_S.ABSENT, _E.APPEARED): (_S.PRESENT, (_A.TELL_APPEAR,)),
    (_S.ABSENT, _E.DESTROY): (_S.DESTROYED, (_A.TELL_DESTROYED,)),
    (_S.PRESENT, _E.CONNECTED): (_S.CONNECTED, (_A.TELL_CONNECT,)),
    (_S.PRESENT, _E.DISAPPEARED): (_S.ABSENT, (_A.TELL_DISAPPEAR,)),
    (_S.PRESENT, _E.DESTROY): (_S.DESTROYED, (_A.TELL_DISAPPEAR, _A.TELL_DESTROYED)),
    (_S.CONNECTED, _E.LOST): (_S.DISCONNECTING, _LOSE),
    (_S.CONNECTED, _E.DISAPPEARED): (_S.VANISHING, _LOSE),
    (_S.CONNECTED, _E.DESTROY): (_S.DESTROYING, _LOSE),
    (_S.DISCONNECTING, _E.DONE): (_S.PRESENT, ()),
    (_S.DISCONNECTING, _E.DISAPPEARED): (_S.VANISHING, ()),
    (_S.DISCONNECTING, _E.DESTROY): (_S.DESTROYING, ()),
    (_S.VANISHING, _E.DONE): (_S.ABSENT, (_A.TELL_DISAPPEAR,)),
    (_S.VANISHING, _E.APPEARED): (_S.DISCONNECTING, ()),
    (_S.VANISHING, _E.DESTROY): (_S.DESTROYING, ()),
    (_S.DESTROYING, _E.DONE): (_S.DESTROYED, (_A.TELL_DISAPPEAR, _A.TELL_DESTROYED)),
}


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The next state, and what to do on the way there."""
    return TABLE.get((state, event), (state, ()))
