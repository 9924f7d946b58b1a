"""The life cycle's table: every row can be reached, and both ends converge whatever the order of events."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.device.states import STEPS, TABLE, WHY, Action, Machine, Role, State, Step, hopeless, pack, parse

ROLES = (Role.FRONT, Role.BACK)


@dataclass
class Side:
    """One end with a driver that does what it is told; `down` is a domain whose drivers do not run."""

    role: Role
    machine: Machine = field(init=False)
    down: bool = True
    published: State | None = None
    broken: bool = False
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start()
        self.stop()

    def start(self) -> None:
        if self.down:
            self.machine = Machine(self.role, 0.0)
            self.down = False

    def stop(self) -> None:
        """As kill -9: nothing is done in order, and what was published vanishes."""
        self.down, self.published = True, None
        self.machine = Machine(self.role, 0.0)

    def act(self, action: Action) -> None:
        self.actions.append(action)
        facts = self.machine.facts
        if action is Action.MAKE:
            facts.made = not self.broken
            facts.trouble = "broken" if self.broken else ""
        elif action is Action.OPEN:
            assert facts.made, "opened without a driver"
            facts.open = not self.broken
            facts.trouble = "broken" if self.broken else ""
            facts.made = not self.broken
        elif action in (Action.CLOSE, Action.DROP):
            facts.open = facts.connected = False
            facts.made &= action is not Action.DROP

    def look(self) -> bool:
        if self.down:
            return False
        return self.machine.look(0.0, self.act)


class Pair:
    def __init__(self) -> None:
        self.sides = {role: Side(role) for role in ROLES}
        self.wanted = True

    def meet(self) -> None:
        """What the endpoints see: they have met exactly while the region is open at both ends."""
        both = all(not side.down and side.machine.facts.open for side in self.sides.values())
        for side in self.sides.values():
            side.machine.facts.connected = both

    def hear(self, role: Role) -> None:
        """One end learns of the other's state, and of what the host wants."""
        side, other = self.sides[role], self.sides[role.other]
        if not side.down:
            side.machine.facts.peer = other.published
            side.machine.facts.wanted = self.wanted

    def publish(self, role: Role) -> None:
        side = self.sides[role]
        side.published = None if side.down else side.machine.state

    def repair(self, role: Role) -> None:
        self.sides[role].broken = False
        self.sides[role].machine.facts.trouble = ""

    def settle(self) -> None:
        for _ in range(20):
            for role in ROLES:
                self.hear(role)
                self.sides[role].look()
                self.publish(role)
                self.meet()

    def states(self) -> set[State]:
        return {side.machine.state for side in self.sides.values()}


EVENTS = ("start", "stop", "look", "hear", "publish", "break", "repair", "meet", "part", "detach", "attach")


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(ROLES)), max_size=60), st.booleans())
def test_both_ends_converge_whatever_happened_before(events: list[tuple[str, Role]], wanted: bool) -> None:
    pair = Pair()
    for event, role in events:
        side = pair.sides[role]
        if event in ("start", "stop", "look"):
            getattr(side, event)()
        elif event in ("hear", "publish", "repair"):
            getattr(pair, event)(role)
        elif event == "break":
            side.broken = True
        elif event == "meet":
            pair.meet()
        elif event == "part":
            side.machine.facts.connected = False
        else:
            pair.wanted = event == "attach"
    for role in ROLES:
        pair.sides[role].start()
        pair.repair(role)
    pair.wanted = wanted
    pair.settle()
    assert pair.states() == {State.CONNECTED if wanted else State.CLOSED}
    before = [len(side.actions) for side in pair.sides.values()]
    pair.settle()
    assert [len(side.actions) for side in pair.sides.values()] == before, "it does not come to rest"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(ROLES)), max_size=60))
def test_only_a_driver_that_is_there_opens_and_every_step_has_a_reason(events: list[tuple[str, Role]]) -> None:
    pair = Pair()
    for event, role in events:
        side = pair.sides[role]
        if event in ("start", "stop"):
            getattr(side, event)()
        elif event == "break":
            side.broken = True
        elif event == "detach":
            pair.wanted = False
        pair.hear(role)
        side.look()
        pair.publish(role)
        pair.meet()
        assert all(step.why for step in side.machine.steps)
        if side.machine.state in (State.INITIALISED, State.CONNECTED):
            assert side.machine.facts.made


def test_every_state_but_connected_leads_to_closed_when_it_is_not_wanted() -> None:
    for role in ROLES:
        for state in State:
            machine = Machine(role, 0.0)
            machine.steps.append(Step(state, 0.0, "put there"))
            machine.facts.wanted = False
            machine.look(1.0)
            assert machine.state is State.CLOSED


def test_a_driver_that_cannot_be_had_leaves_the_end_closed_with_the_reason() -> None:
    side = Side(Role.BACK, broken=True)
    side.start()
    side.look()
    assert side.machine.state is State.CLOSED
    assert [step.why for step in side.machine.steps] == ["not attached", "attached", "broken"]
    assert not side.look()


@pytest.mark.parametrize(("role", "fails"), [(Role.FRONT, Action.MAKE), (Role.BACK, Action.MAKE),
                                             (Role.FRONT, Action.OPEN), (Role.BACK, Action.OPEN)])  # fmt: skip
def test_the_same_failure_again_and_again_is_hopeless_after_some_seconds(role: Role, fails: Action) -> None:
    machine, now, pause = Machine(role, 0.0), 0.0, 0.05
    machine.facts.peer = State.INIT_WAIT

    def act(action: Action) -> None:
        machine.facts.made |= action is Action.MAKE
        if action is fails:
            machine.facts.trouble = "broken"
        elif action is Action.DROP:
            machine.facts.made = False

    while not hopeless(parse(pack(machine.steps)), 2.0):
        assert now < 4.0
        machine.look(now, act)
        now, pause = now + pause, 2 * pause
        machine.facts.trouble = ""
    assert machine.steps[-1].since >= 2.0


def test_what_changes_or_works_is_not_hopeless() -> None:
    def steps(*found: tuple[State, float, str]) -> list[Step]:
        return [Step(*each) for each in found]

    assert not hopeless([], 2.0)
    assert not hopeless(steps((State.CLOSED, 9.0, "broken")), 2.0)
    assert not hopeless(steps((State.CLOSED, 9.0, "no image"), (State.CLOSED, 1.0, "no region")), 2.0)
    assert not hopeless(steps((State.CLOSED, 9.0, "broken"), (State.CLOSED, 7.5, "broken")), 2.0)
    assert hopeless(steps((State.CLOSED, 9.0, "broken"), (State.CLOSED, 7.0, "broken")), 2.0)
    assert not hopeless(steps((State.CONNECTED, 9.5, "met"), (State.CLOSED, 9.0, "broken"),
                              (State.CLOSED, 1.0, "broken")), 2.0)


def test_steps_as_they_are_published() -> None:
    machine = Machine(Role.FRONT, 12.5)
    for number in range(20):
        machine.steps.append(Step(State.INITIALISED, 100.0 + number, f"step\n {number}" + "x" * WHY))
    value = pack(machine.steps)
    assert len(value) <= 2048
    steps = parse(value)
    assert len(steps) == STEPS
    assert steps[0][:2] == (State.INITIALISED, 119.0)
    assert steps[0].why.startswith("step 19")


@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"connected", b"connected now why", b"open 1 why",
                                   b"connected nan x", b"connected -1 x", b"connected 1e300 x"])
def test_what_is_no_step_is_none(value: bytes) -> None:
    assert parse(value) == []


@given(st.binary(max_size=2048))
def test_whatever_a_peer_publishes_is_read(value: bytes) -> None:
    for step in parse(value):
        assert step.why.isprintable()


def test_the_page_has_every_row() -> None:
    page = (Path(__file__).parents[3] / "docs/devices.md").read_text()
    rows = set(re.findall(r"^\| (\S+) \| ([\w-]+) \| [^|]+ \| ([\w-]+) \| (\w+) \|", page, re.MULTILINE))
    table = {(row.role.value if row.role else "both", row.state.value, row.then.value, row.action.value)
             for row in TABLE}
    assert rows - {("end", "state", "next", "action")} == table
