"""The endpoint's table: complete, drawn as it is in the docs, and never out of the order that clients are promised."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from idc.endpoint.lifecycle import TABLE, Action, Event, State, step

TOLD = {Action.TELL_APPEAR, Action.TELL_CONNECT, Action.TELL_DISCONNECT, Action.TELL_DISAPPEAR, Action.TELL_DESTROYED}
#: What may follow what, as a client sees it.
AFTER = {
    None: {Action.TELL_APPEAR, Action.TELL_DESTROYED},
    Action.TELL_APPEAR: {Action.TELL_CONNECT, Action.TELL_DISAPPEAR},
    Action.TELL_CONNECT: {Action.TELL_DISCONNECT},
    Action.TELL_DISCONNECT: {Action.TELL_CONNECT, Action.TELL_DISAPPEAR},
    Action.TELL_DISAPPEAR: {Action.TELL_APPEAR, Action.TELL_DESTROYED},
    Action.TELL_DESTROYED: set(),
}


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_a_client_is_told_in_order(events: list[Event]) -> None:
    state, last, owed = State.ABSENT, None, False
    for event in events:
        if event is Event.DONE and not owed:
            continue  # the endpoint refuses it
        state, actions = step(state, event)
        if event is Event.DONE:
            owed = False
        for action in actions:
            if action in TOLD:
                assert action in AFTER[last], (last, action)
                last = action
            owed = owed or action is Action.TELL_DISCONNECT
        assert owed == (state in (State.DISCONNECTING, State.VANISHING, State.DESTROYING))


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_destroy_always_completes(events: list[Event]) -> None:
    state = State.ABSENT
    for event in events:
        state, _ = step(state, event)
    for event in (Event.DESTROY, Event.DONE):
        state, _ = step(state, event)
    assert state is State.DESTROYED


def test_outstanding_ones_fail_before_the_client_is_told() -> None:
    for _, actions in TABLE.values():
        if Action.TELL_DISCONNECT in actions:
            assert actions.index(Action.FAIL_ALL) < actions.index(Action.TELL_DISCONNECT)


def test_nothing_happens_to_what_is_destroyed() -> None:
    assert all(step(State.DESTROYED, event) == (State.DESTROYED, ()) for event in Event)
