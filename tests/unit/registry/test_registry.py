"""The registry and a domain's side of it, over queues: what each call does and says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from registry_support import bench

from host.registry import tree
from host.registry.desk import Desk
from host.registry.tree import Limits
from idc.errors import ConflictError, DeniedError, MisuseError, NoSuchKeyError, QuotaError, RegistryError
from idc.registry import Event, Permissions, Permit, Registry, Transaction, frames
from idc.registry.frames import Op, Request

if TYPE_CHECKING:
    from collections.abc import Callable


def test_values_are_written_read_listed_and_removed() -> None:
    with bench() as here:
        front = here.join("front")
        assert front.home == "/domain/front"
        front.write("/domain/front/a/b", "text")
        front.mkdir("/domain/front/a/c")
        assert front.read("/domain/front/a/b") == b"text"
        assert front.list("/domain/front/a") == ["b", "c"]
        assert front.read("/domain/front/a") == b""
        front.rm("/domain/front/a")
        assert front.get("/domain/front/a/b") is None
        with pytest.raises(NoSuchKeyError, match="read /domain/front/a/b: there is no node /domain/front/a"):
            front.read("/domain/front/a/b")


def test_a_domain_reads_and_writes_only_what_it_may() -> None:
    with bench() as here:
        front, back, host = here.join("front"), here.join("back"), here.join("host")
        front.write("/domain/front/secret", "x")
        for call in (lambda: back.read("/domain/front/secret"), lambda: back.read("/domain/front/nothing"),
                     lambda: back.write("/domain/front/secret", "y"), lambda: back.rm("/domain/front/secret"),
                     lambda: back.list("/domain/front"), lambda: back.write("/domain/front/new", "y"),
                     lambda: back.write("/elsewhere", "y"), lambda: back.permissions("/domain/front"),
                     lambda: front.rm("/domain/front"), lambda: back.rm("/")):
            with pytest.raises(DeniedError):
                call()
        assert host.read("/domain/front/secret") == b"x"
        front.set_permissions("/domain/front/secret", Permissions("front", named=(("back", Permit.READ),)))
        assert back.read("/domain/front/secret") == b"x"
        with pytest.raises(DeniedError, match="back may not write this"):
            back.write("/domain/front/secret", "y")
        with pytest.raises(DeniedError, match="only its owner"):
            back.set_permissions("/domain/front/secret", Permissions("front", Permit.BOTH))
        with pytest.raises(DeniedError, match="another owner"):
            front.set_permissions("/domain/front/secret", Permissions("back"))


def test_what_another_makes_in_a_home_is_its_own_and_its_home_keeps_it() -> None:
    with bench(Limits(nodes=5)) as here:
        front, back, host = here.join("front"), here.join("back"), here.join("host")
        host.write("/domain/front/device", "")
        front.set_permissions("/domain/front/device", Permissions("front", named=(("back", Permit.BOTH),)))
        back.write("/domain/front/device/state", "up")
        assert host.permissions("/domain/front/device/state") == Permissions("back", named=(("front", Permit.BOTH),))
        for index in range(4):
            back.write(f"/domain/front/device/{index}", "")
        with pytest.raises(QuotaError, match="back would have 6 nodes, 5 is its quota"):
            back.write("/domain/front/device/4", "")
        front.rm("/domain/front/device")
        back.write("/domain/back/again", "")


def test_a_watch_tells_first_at_once_then_of_changes_at_or_below() -> None:
    with bench() as here:
        front, back = here.join("front"), here.join("back")
        events: list[Event] = []
        watch = front.watch("/domain/front/a", events.append)
        here.settle()
        front.write("/domain/front/a/b/c", "1")
        front.write("/domain/front/other", "1")
        back.write("/domain/back/x", "1")
        here.settle()
        assert events == [Event("/domain/front/a", 0), Event("/domain/front/a", 3)]
        front.rm("/domain/front/a/b/c")
        here.settle()
        assert events[2:] == [Event("/domain/front/a/b/c", 1)]
        watch.close()
        front.rm("/domain/front/a")
        here.settle()
        assert len(events) == 3


def test_a_watch_tells_nothing_of_what_its_domain_may_not_read() -> None:
    with bench() as here:
        front, back = here.join("front"), here.join("back")
        events: list[Event] = []
        back.watch("/domain", events.append)
        here.settle()
        front.write("/domain/front/secret", "1")
        front.rm("/domain/front/secret")
        here.settle()
        assert events == [Event("/domain", 0)]
        front.write("/domain/front/open", "1")
        front.set_permissions("/domain/front/open", Permissions("front", Permit.READ))
        here.settle()
        assert events[1:] == [Event("/domain/front/open", 1)]


def test_a_callback_may_call_the_registry_and_is_told_the_rest_in_one_event() -> None:
    with bench() as here:
        front, back = here.join("front"), here.join("back")
        seen: list[tuple[bytes | None, int]] = []
        front.write("/domain/front/n", "0")
        front.set_permissions("/domain/front/n", Permissions("front", Permit.BOTH))

        def changed(event: Event) -> None:
            if not event.changes:
                for value in range(1, 10):
                    back.write(event.path, str(value))
            seen.append((front.get(event.path), event.changes))

        front.watch("/domain/front/n", changed)
        here.settle()
        assert seen == [(b"9", 0), (b"9", 9)]


def test_a_callback_that_fails_is_logged_and_told_again(caplog: pytest.LogCaptureFixture) -> None:
    with bench() as here:
        front = here.join("front")
        events: list[Event] = []

        def failing(event: Event) -> None:
            events.append(event)
            raise RuntimeError("mine")

        front.watch("/domain/front", failing)
        front.write("/domain/front/n", "1")
        here.settle()
        assert sum(event.changes for event in events) == 1
        assert "the callback of a watch of /domain/front failed" in caplog.text
        assert front.read("/domain/front/n") == b"1"


def test_a_transaction_is_done_whole_or_not_at_all() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        front.write("/domain/front/n", "1")
        with front.transaction() as t:
            t.write("/domain/front/n", "2")
            t.write("/domain/front/m", "2")
            assert (t.read("/domain/front/n"), front.read("/domain/front/n")) == (b"2", b"1")
        assert front.read("/domain/front/m") == b"2"

        def fail(t: Transaction) -> None:
            t.write("/domain/front/n", "3")
            raise ValueError("mine")

        def overtaken(t: Transaction) -> None:
            t.write("/domain/front/copy", t.read("/domain/front/n"))
            host.write("/domain/front/n", "4")
            assert t.read("/domain/front/n") == b"2"

        with pytest.raises(ValueError, match="mine"):
            front.transact(fail)
        with pytest.raises(ConflictError, match="/domain/front/n was changed"):
            front.transact(overtaken, tries=1)
        assert front.get("/domain/front/copy") is None

        def count() -> None:
            front.transact(lambda t: t.write("/domain/front/n", str(int(t.read("/domain/front/n")) + 1)))

        count()
        assert front.read("/domain/front/n") == b"5"


def test_a_denied_read_in_a_transaction_tells_nothing_at_its_end_either() -> None:
    with bench() as here:
        front, back = here.join("front"), here.join("back")
        front.write("/domain/front/secret", "1")
        with back.transaction() as t:
            with pytest.raises(DeniedError):
                t.read("/domain/front/secret")
            front.write("/domain/front/secret", "2")
            t.write("/domain/back/x", "")

        def opened(t: Transaction) -> None:
            with pytest.raises(DeniedError):
                t.read("/domain/front/secret")
            front.set_permissions("/domain/front/secret", Permissions("front", Permit.READ))
            t.write("/domain/back/y", "")

        with pytest.raises(ConflictError, match="was opened"):
            back.transact(opened, tries=1)


def test_an_old_transaction_is_given_up() -> None:
    with bench(Limits(history=3)) as here:
        front, host = here.join("front"), here.join("host")

        def dawdle(t: Transaction) -> None:
            for value in range(5):
                host.write("/elsewhere", str(value))
            t.exists("/domain/front")

        with pytest.raises(ConflictError, match="more than 3 changes"):
            front.transact(dawdle, tries=1)
        with front.transaction() as t:
            t.mkdir("/domain/front/x")


def test_quotas_hold() -> None:
    with bench(Limits(nodes=4, bytes=100, watches=2, transactions=1, steps=2)) as here:
        front = here.join("front")
        for name in "abcd":
            front.write(f"/domain/front/{name}", "")
        with pytest.raises(QuotaError, match="5 nodes, 4 is"):
            front.write("/domain/front/e", "")
        with pytest.raises(QuotaError, match="bytes of names"):
            front.write("/domain/front/a", bytes(97))
        for _ in range(2):
            front.watch("/", lambda _event: None)
        with pytest.raises(QuotaError, match="2 watches"):
            front.watch("/", lambda _event: None)
        with front.transaction() as t:
            with pytest.raises(QuotaError, match="1 transactions open"), front.transaction():
                pass
            assert t.exists("/domain/front")
            assert t.exists("/domain/front")
            with pytest.raises(QuotaError, match="more than 2 operations"):
                t.exists("/domain/front")


def test_ephemeral_nodes_end_with_their_link_and_have_none_below() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        front.write("/domain/front/up", "1", ephemeral=True)
        front.write("/domain/front/stays", "1")
        with pytest.raises(RegistryError, match="is ephemeral"):
            front.write("/domain/front/up/below", "")
        with pytest.raises(RegistryError, match="there are nodes below"):
            front.write("/domain/front", "", ephemeral=True)
        events: list[Event] = []
        host.watch("/domain/front/up", events.append)
        here.settle()
        front.close()
        here.settle()
        assert host.list("/domain/front") == ["stays"]
        assert events == [Event("/domain/front/up", 0), Event("/domain/front/up", 1)]


def test_after_a_lost_link_watches_and_ephemeral_nodes_are_there_again() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        front.write("/domain/front/up", "1", ephemeral=True)
        events: list[Event] = []
        front.watch("/domain/front/n", events.append)
        here.settle()
        here.links["front"].endpoint.disconnect("test")
        assert front.read("/domain/front/up") is not None
        here.settle()
        assert host.read("/domain/front/up") == b"1"
        host.write("/domain/front/n", "1")
        here.settle()
        assert events == [Event("/domain/front/n", 0), Event("/domain/front/n", 0), Event("/domain/front/n", 1)]


def test_what_cannot_be_written_has_not_happened() -> None:
    with bench() as here:
        front = here.join("front")
        front.write("/domain/front/n", "1")
        here.writable = False
        with pytest.raises(RegistryError, match="cannot write: no space left"):
            front.write("/domain/front/n", "2")
        assert front.read("/domain/front/n") == b"1"
        here.writable = True
        front.write("/domain/front/n", "3")
        assert front.read("/domain/front/n") == b"3"


@pytest.mark.parametrize(("path", "words"), [
    ("a", "does not begin with a slash"), ("/a//b", "is no name"), ("/a/", "is no name"), ("/ä", "is no name"),
    ("/" + "x" * 65, "is no name"), ("/a" * 17, "17 components"), ("/" + "/".join(["x" * 60] * 5), "305 bytes"),
])
def test_paths_that_are_none(path: str, words: str) -> None:
    with bench() as here:
        front = here.join("front")
        with pytest.raises(MisuseError, match=words):
            front.read(path)


def test_long_lists_come_in_pages() -> None:
    with bench() as here:
        front = here.join("front")
        names = [f"{index:03}{'x' * 60}" for index in range(200)]
        for name in names:
            front.write(f"/domain/front/{name}", "")
        assert front.list("/domain/front") == names


def test_a_tree_is_read_at_once_but_for_what_one_may_not_read() -> None:
    with bench() as here:
        front, back, host = here.join("front"), here.join("back"), here.join("host")
        with pytest.raises(NoSuchKeyError):
            front.tree("/domain/front/a")
        front.write("/domain/front/a/b/c", "1")
        front.write("/domain/front/a/b-c", "2")
        front.write("/domain/front/a/b/secret/below", "3")
        front.write("/domain/front/ab", "4")
        assert front.tree("/domain/front/a") == {"": b"", "b": b"", "b/c": b"1", "b/secret": b"",
                                                 "b/secret/below": b"3", "b-c": b"2"}
        with pytest.raises(DeniedError):
            back.tree("/domain/front/a")
        for path in ("a", "a/b", "a/b/c", "a/b-c", "a/b/secret/below"):
            front.set_permissions(f"/domain/front/{path}", Permissions("front", Permit.READ))
        assert back.tree("/domain/front/a") == {"": b"", "b": b"", "b/c": b"1", "b-c": b"2"}
        assert "front/a/b/c" in host.tree("/domain")
        assert "front/a/b/c" not in back.tree("/domain")


def test_a_tree_of_many_pages_has_every_node_once() -> None:
    with bench() as here:
        front = here.join("front")
        expected = {"": b""}
        for outer in range(5):
            expected[f"{outer}"] = b""
            for inner in range(10):
                path, value = f"{outer}/n-{inner}", f"{outer}{inner}".encode() * 400
                front.write(f"/domain/front/many/{path}", value)
                expected[path] = value
        assert front.tree("/domain/front/many") == expected
        front.write("/domain/front/long", bytes(2048))
        front.write(f"/domain/front/long/{'n' * 64}", bytes(2048))
        assert front.tree("/domain/front/long") == {"": bytes(2048), "n" * 64: bytes(2048)}


def test_a_transaction_that_read_a_tree_conflicts_with_a_change_deep_in_it() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        front.write("/domain/front/a/b/c", "1")
        with pytest.raises(ConflictError):
            read_deep_and_write(front, host)
        assert front.get("/domain/front/x") is None


def read_deep_and_write(front: Registry, host: Registry) -> None:
    with front.transaction() as t:
        assert t.tree("/domain/front/a")["b/c"] == b"1"
        host.write("/domain/front/a/b/d", "2")
        t.write("/domain/front/x", "3")


def write_together(registry: Registry, *paths: str) -> None:
    with registry.transaction(together=True) as t:
        for path in paths:
            t.write(path, "")


def test_changes_that_are_sent_together_are_all_done_or_none() -> None:
    with bench(Limits(nodes=30)) as here:
        front = here.join("front")
        with front.transaction(together=True) as t:
            for index in range(20):
                t.write(f"/domain/front/a/{index}", f"{index}")
            assert t.read("/domain/front/a/19") == b"19", "a question is asked after them"
        assert len(front.list("/domain/front/a")) == 20
        with pytest.raises(QuotaError):
            write_together(front, *(f"/domain/front/b/{index}" for index in range(20)))
        assert front.get("/domain/front/b/0") is None
        with pytest.raises(DeniedError):
            write_together(front, "/domain/front/c", "/domain/back/c")
        assert front.get("/domain/front/c") is None
        for _ in range(20):  # and none is left open
            with pytest.raises(NoSuchKeyError), front.transaction(together=True) as t:
                t.rm("/domain/front/c")
        front.write("/domain/front/c", "1")


def test_a_watch_of_others_is_not_told_of_ones_own_changes() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        told: list[Event] = []
        front.watch("/domain/front", told.append, others=True)
        while not told:
            front.pump(0.01)
        told.clear()
        front.write("/domain/front/a", "1")
        host.write("/domain/front/b", "2")
        while not told:
            front.pump(0.01)
        assert told == [Event("/domain/front/b", 1)]


def test_a_watch_that_waits_for_nothing_says_when_it_is_refused() -> None:
    with bench(Limits(watches=1)) as here:
        front, host = here.join("front"), here.join("host")
        told: list[Event] = []
        refused: list[Exception] = []
        front.watch("/domain/front/a", told.append, refused=refused.append)
        front.watch("/domain/front/b", told.append, refused=refused.append)
        while not (told and refused):
            front.pump(0.01)
        assert isinstance(refused[0], QuotaError)
        assert [event.path for event in told] == ["/domain/front/a"]
        host.write("/domain/front/a", "x")
        while len(told) < 2:
            front.pump(0.01)


def test_events_bring_what_is_there_as_far_as_the_domain_may_read_it() -> None:
    with bench() as here:
        front, host = here.join("front"), here.join("host")
        told: list[Event] = []
        front.watch("/domain/front/d", told.append, nodes=True)

        def next_event() -> Event:
            while not told:
                front.pump(0.01)
            return told.pop(0)

        assert next_event() == Event("/domain/front/d", 0, {})
        with host.transaction() as t:
            t.write("/domain/front/d", "1")
            t.write("/domain/front/d/a/b", b"\0")
            t.write("/domain/front/d/hidden", "x")
            t.set_permissions("/domain/front/d/hidden", Permissions("host"))
        assert next_event() == Event("/domain/front/d", 5, {"": b"1", "a": b"", "a/b": b"\0"})
        host.write("/domain/front/d/a/b", "2")
        assert next_event() == Event("/domain/front/d/a/b", 1, {"": b"2"})
        host.write("/domain/front/d/a", bytes(2000))
        assert next_event() == Event("/domain/front/d/a", 1, {"": bytes(2000), "b": b"2"})
        host.write("/domain/front/d/a/b", bytes(500))
        assert next_event() == Event("/domain/front/d/a/b", 1, {"": bytes(500)})
        with host.transaction() as t:
            t.write("/domain/front/d/a/b", bytes(501))
            t.write("/domain/front/d/a", bytes(2001))
        assert next_event() == Event("/domain/front/d/a", 2, None)  # no room
        host.rm("/domain/front/d")
        event = next_event()
        assert (event.path, event.nodes) == ("/domain/front/d", {})


def test_what_events_bring_is_charged_to_who_wants_it() -> None:
    """A clock that goes on by 4 ms with each look at it; a fifth of the time is the domain's."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.004
        return now

    told: list[tuple[bytes, Callable[[], None]]] = []

    class Outside:
        room = 2400

        def event(self, body: bytes, done: Callable[[], None]) -> bool:
            told.append((body, done))
            return True

    desk = Desk(tree.empty(), clock=clock)
    desk.admit("front", bytes(16))
    host, front = desk.arrive("host", Outside()), desk.arrive("front", Outside())

    def written() -> None:
        batch = desk.batch()
        if batch is not None:
            desk.written(batch)

    written()
    for number in range(64):
        desk.request(front, Request(Op.WATCH, "/domain/front", number=number, nodes=True).pack(), lambda *_: None)
    while len(front.watches) < 64:
        now += 1.0  # a fifth of it is the domain's
        desk.work()
        desk.tell()
    for _, done in told:
        done()
    told.clear()
    now += 10.0
    desk.request(host, Request(Op.WRITE, "/domain/front/x", rest=b"1").pack(), lambda *_: None)
    desk.work()
    written()
    desk.tell()
    parsed = [frames.parse_event(body) for body, _ in told]
    assert {number for number, *_ in parsed} == set(range(64)), "an event was lost"
    assert 10 < sum(nodes is not None for *_, nodes in parsed) < 64
