"""Random operations of several domains against a model that is a plain dict: what is answered, kept, told."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from host.registry import tree
from host.registry.desk import Batch, Desk
from host.registry.tree import Limits
from idc.registry import frames
from idc.registry.frames import HOST, Fault, Op, Permissions, Permit, Request

if TYPE_CHECKING:
    from collections.abc import Callable

DOMAINS = ("a", "b", "c")
LIMITS = Limits(nodes=6, bytes=40, watches=3, transactions=2, steps=6, history=12)
who_ = st.sampled_from(DOMAINS)
paths = st.builds(lambda base, names: "/".join([base, *names]),
                  st.sampled_from([*(f"/domain/{name}" for name in DOMAINS), "/shared"]),
                  st.lists(st.sampled_from("xy"), max_size=2))
values = st.binary(max_size=12)
permits = st.sampled_from(list(Permit))
Nodes = dict[str, tuple[bytes, Permissions, str]]


class Fails(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


def above(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def below(path: str, other: str) -> bool:
    return path == "/" or other == path or other.startswith(path + "/")


class Model:
    """What docs/registry.md says, in few words."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def copy(self) -> Model:
        return Model(dict(self.nodes))

    def may(self, who: str, path: str, want: Permit) -> bool:
        while path not in self.nodes:
            path, want = above(path), Permit.READ
        return bool(self.nodes[path][1].of(who) & want)

    def get(self, who: str, path: str, want: Permit) -> tuple[bytes, Permissions, str]:
        if not self.may(who, path, want):
            raise Fails(Fault.DENIED)
        if path not in self.nodes:
            raise Fails(Fault.NOT_FOUND)
        return self.nodes[path]

    def names(self, path: str) -> list[str]:
        return sorted(other.rpartition("/")[2] for other in self.nodes if other != "/" and above(other) == path)

    def usage(self, who: str) -> tuple[int, int]:
        mine = [(path, value) for path, (value, _, payer) in self.nodes.items() if payer == who]
        return len(mine), sum(len(path.rpartition("/")[2]) + len(value) for path, value in mine)

    def do(self, who: str, request: Request) -> Any:
        path = request.path
        if request.op is Op.READ:
            return self.get(who, path, Permit.READ)[0]
        if request.op is Op.LIST:
            self.get(who, path, Permit.READ)
            return frames.pack_names(self.names(path), more=False)
        if request.op is Op.ACCESS:
            return frames.pack_permissions(self.get(who, path, Permit.READ)[1])
        before, nodes = self.usage(who), dict(self.nodes)
        if request.op is Op.RM:
            self.get(who, path, Permit.WRITE)
            gone = [other for other in nodes if below(path, other)]
            if above(path) in ("/", "/domain") and path != "/shared":
                raise Fails(Fault.DENIED)
            if not all(nodes[other][1].of(who) & Permit.WRITE for other in gone):
                raise Fails(Fault.DENIED)
            for other in gone:
                del nodes[other]
        elif request.op is Op.PERMIT:
            owner = self.get(who, path, Permit.READ)[1].owner
            permissions = frames.parse_permissions(request.rest)
            if who != owner or permissions.owner != owner:
                raise Fails(Fault.DENIED)
            nodes[path] = (nodes[path][0], permissions, nodes[path][2])
        else:
            parent = path
            while parent not in nodes:
                parent = above(parent)
            if not nodes[parent][1].of(who) & Permit.WRITE:
                raise Fails(Fault.DENIED)
            if parent == path:
                if request.op is Op.MKDIR:
                    return b""
                nodes[path] = (request.rest, nodes[path][1], who)
            while parent != path:
                permissions = nodes[parent][1]
                if permissions.owner != who:
                    named = [one for one in permissions.named if one[0] not in (who, permissions.owner)]
                    if permissions.owner != HOST:
                        named.append((permissions.owner, Permit.BOTH))
                    permissions = Permissions(who, permissions.default, tuple(named))
                parent = parent.rstrip("/") + "/" + path[len(parent.rstrip("/")) + 1:].partition("/")[0]
                nodes[parent] = (request.rest if parent == path else b"", permissions, who)
        after = Model(nodes).usage(who)
        if any(has > most and has > had for had, has, most in zip(before, after, (6, 40), strict=True)):
            raise Fails(Fault.QUOTA)
        self.nodes = nodes
        return b""

    def outcome(self, who: str, request: Request) -> tuple[int, bytes]:
        try:
            return 0, self.do(who, request)
        except Fails as fails:
            return fails.fault, b""


@dataclass
class Watching:
    """A domain's end of its link: it takes events when it wants to. `there`: what it can read at a path and below."""

    there: Callable[[str], dict[str, bytes]] = lambda _: {}
    room: int = 80
    open: bool = True
    dirty: dict[int, set[str]] = field(default_factory=dict)
    first: set[int] = field(default_factory=set)
    wants: set[int] = field(default_factory=set)
    unfinished: list[Callable[[], None]] = field(default_factory=list)

    def event(self, body: bytes, done: Callable[[], None]) -> bool:
        if not self.open:
            return False
        number, changes, path, nodes = frames.parse_event(body)
        assert all(below(path, changed) for changed in self.dirty[number])
        assert self.dirty[number] or number in self.first, "told of nothing"
        assert changes >= len(self.dirty[number])
        assert nodes is None or (number in self.wants and nodes == self.there(path))
        assert nodes is not None or number not in self.wants or len(frames.pack_event(number, changes, path)) + sum(
            4 + len(name) + len(value) for name, value in self.there(path).items()) + 2 > self.room
        self.dirty[number].clear()
        self.first.discard(number)
        self.unfinished.append(done)
        return True


@dataclass
class Opened:
    number: int
    version: int
    done: list[tuple[Request, tuple[int, bytes]]] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        open_to_all = Permissions(HOST, Permit.READ)
        self.head = Model({"/": (b"", open_to_all, HOST), "/domain": (b"", open_to_all, HOST),
                           "/shared": (b"", Permissions(HOST, Permit.BOTH), HOST)}
                          | {f"/domain/{name}": (b"", Permissions(name), HOST) for name in DOMAINS})
        self.durable = self.pending = self.head
        self.version = self.numbers = 0
        self.batch: Batch | None = None
        self.unanswered: list[str] = []
        self.watching = {name: Watching(functools.partial(self.there, name)) for name in DOMAINS}
        self.opened: dict[str, list[Opened]] = {name: [] for name in DOMAINS}
        self.paths: dict[str, dict[int, str]] = {name: {} for name in DOMAINS}
        self.desk = Desk(tree.empty(), LIMITS, clock=lambda: 0.0)
        for name in DOMAINS:
            self.desk.admit(name, name.encode() * 16)
        host = Watching()
        self.seats = {HOST: self.desk.arrive(HOST, host)}
        self.seats |= {name: self.desk.arrive(name, self.watching[name]) for name in DOMAINS}
        self.ask(HOST, Request(Op.WRITE, "/shared"))
        self.ask(HOST, Request(Op.PERMIT, "/shared", rest=frames.pack_permissions(Permissions(HOST, Permit.BOTH))))
        self.flush()

    # -- what the tests do

    def ask(self, who: str, request: Request) -> tuple[int, bytes] | None:
        """The answer, or None if it comes when it is on disk."""
        answers: list[tuple[int, bytes]] = []
        late = False

        def answered(error: int, status: bytes) -> None:
            answers.append((error, b"" if error else status))
            if late:
                self.unanswered.remove(who)
                assert error == 0

        self.desk.request(self.seats[who], request.pack(), answered)
        while self.desk.work():
            pass
        if answers:
            return answers[0]
        late = True
        self.unanswered.append(who)
        return None

    def flush(self) -> None:
        """All that was taken is on disk."""
        self.end_write()
        self.begin_write()
        self.end_write()

    def begin_write(self) -> None:
        self.batch = self.desk.batch()
        self.pending = self.head.copy()

    def end_write(self) -> None:
        if self.batch is None:
            return
        batch, self.batch = self.batch, None
        before, self.durable = self.durable, self.pending
        self.notice(before, self.durable)
        self.desk.written(batch)

    def there(self, who: str, path: str) -> dict[str, bytes]:
        """What of durable nodes a domain can read at a path and below it, by the path below."""
        found, hidden = {}, "no path"
        for node in sorted(self.durable.nodes, key=lambda node: node.split("/")):
            value, permissions, _ = self.durable.nodes[node]
            if below(path, node) and not below(hidden, node):
                if permissions.of(who) & Permit.READ:
                    found[node.removeprefix(path).lstrip("/")] = value
                else:
                    hidden = node
        return found

    def notice(self, before: Model, after: Model) -> None:
        for who, watches in self.paths.items():
            for path in before.nodes.keys() | after.nodes.keys():
                states = before.nodes.get(path), after.nodes.get(path)
                if states[0] != states[1] and any(s is not None and s[1].of(who) & Permit.READ for s in states):
                    for number, watched in watches.items():
                        if below(watched, path):
                            self.watching[who].dirty[number].add(path)

    # -- rules

    @rule(who=who_, path=paths, op=st.sampled_from([Op.READ, Op.LIST, Op.ACCESS]))
    def show(self, who: str, path: str, op: Op) -> None:
        if who in self.unanswered:
            self.flush()
        assert self.ask(who, Request(op, path)) == self.durable.outcome(who, Request(op, path))

    def change(self, who: str, request: Request) -> None:
        model = self.head.copy()
        expected = model.outcome(who, request)
        got = self.ask(who, request)
        if got is None:
            assert expected[0] == 0, expected
            self.head = model
            self.version += 1
        else:
            assert got == expected
            assert expected[0] or request.op is Op.MKDIR

    @rule(who=who_, path=paths, value=values)
    def write_one(self, who: str, path: str, value: bytes) -> None:
        self.write(who, path, value)

    def write(self, who: str, path: str, value: bytes) -> None:
        self.change(who, Request(Op.WRITE, path, rest=value))

    @rule(who=who_, path=paths, op=st.sampled_from([Op.MKDIR, Op.RM]))
    def make_or_remove(self, who: str, path: str, op: Op) -> None:
        self.change(who, Request(op, path))

    @rule(who=who_, path=paths, owner=who_, default=permits, named=st.dictionaries(who_, permits))
    def permit(self, who: str, path: str, owner: str, default: Permit, named: dict[str, Permit]) -> None:
        permissions = Permissions(owner, default, tuple(named.items()))
        self.change(who, Request(Op.PERMIT, path, rest=frames.pack_permissions(permissions)))

    @rule(who=who_)
    def begin_one(self, who: str) -> None:
        self.begin(who)

    def begin(self, who: str) -> None:
        if who in self.unanswered:
            self.flush()
        answer = self.ask(who, Request(Op.BEGIN))
        assert answer is not None
        if len(self.opened[who]) == LIMITS.transactions:
            assert answer[0] == Fault.QUOTA
            return
        assert answer[0] == 0
        behind = 0 if self.durable.nodes == self.head.nodes else 1
        self.opened[who].append(Opened(frames.parse_number(answer[1]), self.version - behind))

    @precondition(lambda self: any(self.opened.values()))
    @rule(data=st.data(), path=paths, value=values, default=permits,
          op=st.sampled_from([Op.READ, Op.LIST, Op.ACCESS, Op.WRITE, Op.MKDIR, Op.RM, Op.PERMIT]))
    def step(self, data: Any, path: str, value: bytes, default: Permit, op: Op) -> None:
        who = data.draw(st.sampled_from([who for who in DOMAINS if self.opened[who]]))
        opened = data.draw(st.sampled_from(self.opened[who]))
        rest = {Op.WRITE: value, Op.PERMIT: frames.pack_permissions(Permissions(who, default))}.get(op, b"")
        self.within(who, opened, Request(op, path, opened.number, rest=rest))

    def within(self, who: str, opened: Opened, request: Request) -> None:
        answer = self.ask(who, request)
        assert answer is not None
        opened.done.append((dataclasses.replace(request, transaction=0), answer))

    @precondition(lambda self: any(self.opened.values()))
    @rule(data=st.data(), op=st.sampled_from([Op.COMMIT, Op.COMMIT, Op.ABORT]))
    def finish(self, data: Any, op: Op) -> None:
        who = data.draw(st.sampled_from([who for who in DOMAINS if self.opened[who]]))
        opened = data.draw(st.sampled_from(self.opened[who]))
        self.conclude(who, opened, op)

    def conclude(self, who: str, opened: Opened, op: Op) -> None:
        self.opened[who].remove(opened)
        answer = self.ask(who, Request(op, transaction=opened.number))
        if op is Op.ABORT:
            assert answer == (0, b"")
            return
        model, agrees, faults = self.head.copy(), True, set()
        for request, was in opened.done:
            if was[0] in (Fault.QUOTA, Fault.CONFLICT):
                continue  # not done, and says nothing of the tree
            is_now = model.outcome(who, request)
            agrees &= is_now == was
            faults.add(is_now[0])
        if answer is None or answer[0] == 0:
            assert agrees, "what it was told is not what it would be told alone, at its end"
            self.version += answer is None
            self.head = model
        elif answer[0] == Fault.CONFLICT:
            assert self.version > opened.version, "nobody came in between"
        else:
            assert answer[0] in faults

    @rule(who=who_, path=paths, nodes=st.booleans())
    def watch(self, who: str, path: str, nodes: bool) -> None:
        if who in self.unanswered:
            self.flush()
        self.numbers += 1
        answer = self.ask(who, Request(Op.WATCH, path, number=self.numbers, nodes=nodes))
        if len(self.paths[who]) == LIMITS.watches:
            assert answer is not None
            assert answer[0] == Fault.QUOTA
            return
        assert answer == (0, b"")
        self.paths[who][self.numbers] = path
        self.watching[who].dirty[self.numbers] = set()
        self.watching[who].first.add(self.numbers)
        if nodes:
            self.watching[who].wants.add(self.numbers)

    @rule(who=who_, taking=st.booleans())
    def take_events(self, who: str, taking: bool) -> None:
        watching = self.watching[who]
        watching.open = taking
        unfinished, watching.unfinished = watching.unfinished, []
        for done in unfinished:
            done()

    @rule()
    def disk_begins(self) -> None:
        if self.batch is None:
            self.begin_write()

    @rule()
    def disk_ends(self) -> None:
        self.end_write()

    @invariant()
    def events_go_out(self) -> None:
        while self.desk.tell():
            pass

    @invariant()
    def quotas_hold(self) -> None:
        for name, usage in self.desk.durable.usage.items():
            assert usage == self.durable.usage(name)
            assert usage.nodes <= LIMITS.nodes
            assert usage.bytes <= LIMITS.bytes

    def teardown(self) -> None:
        self.flush()
        assert not self.unanswered
        for watching in self.watching.values():
            watching.open = True
        while self.desk.tell() or any(watching.unfinished for watching in self.watching.values()):
            for watching in self.watching.values():
                unfinished, watching.unfinished = watching.unfinished, []
                for done in unfinished:
                    done()
        for watching in self.watching.values():
            assert not any(watching.dirty.values()), "a change was never told"
            assert not watching.first
        for path, node in tree.walk(self.desk.durable.root, "/"):
            assert self.durable.nodes[path] == (node.value, node.permissions, node.payer)
        assert len(list(tree.walk(self.desk.durable.root, "/"))) == len(self.durable.nodes)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRegistry = Machine.TestCase


turns = st.tuples(who_, st.sampled_from(["begin", "read", "list", "write", "rm", "commit", "commit", "alone"]),
                  st.sampled_from(["/shared", "/shared/x", "/shared/y", "/shared/x/y"]), st.binary(max_size=1))


@given(st.lists(turns, max_size=40))
@settings(max_examples=400, deadline=None)
def test_transactions_are_as_if_each_were_alone(turns: list[tuple[str, str, str, bytes]]) -> None:
    machine = Machine()
    ops = {"read": Op.READ, "list": Op.LIST, "write": Op.WRITE, "rm": Op.RM}
    for who, what, path, value in turns:
        opened = machine.opened[who]
        if what in ("begin", "alone"):
            if what == "alone":
                machine.write(who, path, value)
            elif len(opened) < LIMITS.transactions:
                machine.begin(who)
        elif opened and what == "commit":
            machine.conclude(who, opened[0], Op.COMMIT)
        elif opened:
            rest = value if what == "write" else b""
            machine.within(who, opened[-1], Request(ops[what], path, opened[-1].number, rest=rest))
    machine.teardown()
