"""What is on disk after a crash, wherever it hits: all that was acknowledged, and nothing by halves."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from host.registry import tree
from host.registry.desk import Batch, Desk
from host.registry.store import FILE, MAGIC, Store, StoreError, Writer
from host.registry.tree import Edit, Limits, Node, State
from idc.registry.frames import HOST, Permissions, Permit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SESSION = b"s" * 16


class Killed(BaseException):
    """The process ends here."""


def same(one: State, other: State) -> bool:
    """Whether two trees hold the same; when it was changed is not kept."""

    def plain(node: Node) -> object:
        return (node.value, node.permissions, node.payer, node.session,
                {name: plain(below) for name, below in node.children.items()})

    return plain(one.root) == plain(other.root) and (one.usage, one.domains) == (other.usage, other.domains)


def batches(state: State) -> list[Batch]:
    """Of every kind of change, one after the other."""
    made: list[Batch] = []

    def change(who: str, *steps: Callable[[Edit], None]) -> None:
        nonlocal state
        edit = Edit(state, who, SESSION, len(made) + 2, Limits())
        for step in steps:
            step(edit)
        domains = dict(edit.state.domains) if edit.state.domains != state.domains else None
        state = edit.state
        made.append(Batch([edit.effects], domains, state, []))

    change(HOST, lambda e: e.admit("front", b"u" * 16))
    change("front", lambda e: e.write("/domain/front/a/b/c", b"\x00value\xff"))
    change("front", lambda e: e.write("/domain/front/up", b"1", ephemeral=True),
           lambda e: e.permit("/domain/front/a", Permissions("front", Permit.READ, (("back", Permit.BOTH),))))
    change("front", lambda e: e.write("/domain/front/a", b"x" * 300), lambda e: e.rm("/domain/front/a/b"))
    change(HOST, lambda e: e.admit("back", b"v" * 16), lambda e: e.write("/domain/back/k", b""))
    change(HOST, lambda e: e.dismiss("front"))
    return made


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    assert same(store.state, tree.empty())
    for batch in batches(store.state):
        store.write(batch)
        store.close()
        store = Store(tmp_path / "r")
        assert same(store.state, batch.state)
        assert store.cut == 0
    store.close()


def test_cut_off_at_any_byte_it_holds_all_that_was_acknowledged(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):  # nothing here depends on the disk
        monkeypatch.setattr(os, name, lambda fd: None)
    store = Store(tmp_path / "r")
    states = [(store.written, store.state)]
    for batch in batches(store.state):
        store.write(batch)
        states.append((store.written, batch.state))
    store.close()
    path = tmp_path / "r" / FILE
    data = path.read_bytes()
    for length in range(states[0][0], len(data) + 1):
        path.write_bytes(data[:length])
        again = Store(tmp_path / "r")
        end, expected = max((known for known in states if known[0] <= length), key=lambda known: known[0])
        assert same(again.state, expected), length
        assert again.cut == length - end
        more = replace(expected, domains={**expected.domains, "more": b"w" * 16})
        again.write(Batch([[]], dict(more.domains), more, []))  # and it goes on from there
        again.close()
        last = Store(tmp_path / "r")
        assert same(last.state, more)
        last.close()


@pytest.mark.parametrize("growth", [0, 1 << 20])
def test_killed_at_any_step_of_a_write_it_has_the_old_or_the_new(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: int) -> None:
    steps, limit = 0, 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            nonlocal steps
            steps += 1
            if steps == limit:
                if name == "write":
                    fd, data = args
                    real(fd, bytes(data)[:len(bytes(data)) // 2])  # type: ignore[call-overload]
                raise Killed
            return real(*args)

        monkeypatch.setattr(os, name, call)

    todo = batches(tree.empty())
    for name in ("write", "fdatasync", "fsync", "rename"):
        wrap(name)
    killed = 0
    for number in range(len(todo)):
        limit = 0
        while True:
            limit += 1
            steps = -1 << 30
            directory = tmp_path / f"{number}-{limit}"
            store = Store(directory, growth)
            for batch in todo[:number]:
                store.write(batch)
            steps = 0
            over = False
            try:
                store.write(todo[number])
                over = True
            except Killed:
                killed += 1
            steps = -1 << 30
            os.close(store._directory)  # as the kernel does
            again = Store(directory)
            before = todo[number - 1].state if number else tree.empty()
            assert same(again.state, todo[number].state) or (not over and same(again.state, before))
            again.close()
            if over:
                break
    assert killed >= 2 * len(todo)


def test_the_file_is_made_anew_when_it_has_grown(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", growth=2000)
    state = store.state
    for serial in range(2, 300):
        edit = Edit(state, HOST, b"", serial, Limits())
        edit.write("/k", bytes(200))
        state = edit.state
        store.write(Batch([edit.effects], None, state, []))
        assert (tmp_path / "r" / FILE).stat().st_size == store.written < 4000
    store.close()
    assert [path.name for path in (tmp_path / "r").iterdir()] == [FILE]
    again = Store(tmp_path / "r")
    assert same(again.state, state)
    again.close()


def test_a_failed_write_leaves_no_trace_and_the_next_one_makes_the_file_anew(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "r")
    first, second, third, *_ = batches(store.state)
    store.write(first)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="No space"):
            store.write(second)
        assert (tmp_path / "r" / FILE).stat().st_size == store.written
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.write(second)
    assert [path.name for path in (tmp_path / "r").iterdir()] == [FILE]
    store.write(second)
    store.write(third)
    store.close()
    again = Store(tmp_path / "r")
    assert same(again.state, third.state)
    again.close()


def test_damage_that_no_crash_makes_is_said_and_not_guessed_around(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    ends = [store.written]
    for batch in batches(store.state):
        store.write(batch)
        ends.append(store.written)
    store.close()
    path = tmp_path / "r" / FILE
    data = path.read_bytes()
    for at in (0, len(MAGIC) + 12, ends[0] - 1, ends[0] + 10, ends[1] + 20):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged at byte"):
            Store(tmp_path / "r")
        assert path.read_bytes() == damaged
    path.write_bytes(data[:ends[0] - 1])
    with pytest.raises(StoreError, match="is damaged at byte"):
        Store(tmp_path / "r")


def test_two_registries_do_not_use_one_directory(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    with pytest.raises(StoreError, match="another registry uses"):
        Store(tmp_path / "r")
    store.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Not a directory"):
        Store(tmp_path / "file" / "r")


def test_the_writer_tells_when_a_batch_is_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    desk = Desk(store.state, clock=lambda: 0.0)
    writer = Writer(store)
    desk.admit("front", b"u" * 16)
    batch = desk.batch()
    assert batch is not None
    assert desk.batch() is None
    writer.start(batch)
    while (done := writer.take()) is None:
        pass
    assert done == (batch, "")
    desk.written(batch)
    writer.close()
    again = Store(tmp_path / "r")
    assert same(again.state, desk.durable)
    again.close()
