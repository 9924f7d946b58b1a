"""Each row of "what is misuse" in docs/idc.md: its error is where the page says, and nothing else is harmed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Quotas, Resources, Result
from idc.endpoint.lifecycle import State
from idc.errors import MisuseError, TooBigError
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
QUOTAS = Quotas(requests=4, messages=4, parameter_bytes=32, status_bytes=16)
LIFECYCLE = ("appear", "connect", "disconnect", "disappear")
ALL = (*LIFECYCLE, "message", "transaction", "answer", "delivered", "destroyed")


class Hooked(Client):
    """Does what a test wants in one callback, once; holds what comes in unless told to answer."""

    def __init__(self, where: str = "", what: Callable[[Endpoint], None] | None = None) -> None:
        self.where = where
        self.what = what
        self.told: list[str] = []
        self.held: list[IncomingMessage | IncomingTransaction] = []
        self.dones: list[Callable[[], None]] = []

    def hook(self, name: str, endpoint: Endpoint) -> None:
        self.told.append(name)
        if self.where == name and self.what is not None:
            what, self.what = self.what, None
            what(endpoint)

    def appear(self, endpoint: Endpoint) -> None:
        self.hook("appear", endpoint)

    def connect(self, endpoint: Endpoint) -> None:
        self.hook("connect", endpoint)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self.dones.append(done)
        self.hook("disconnect", endpoint)
        done()

    def disappear(self, endpoint: Endpoint) -> None:
        self.hook("disappear", endpoint)

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.held.append(message)
        self.hook("message", endpoint)

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.held.append(transaction)
        self.hook("transaction", endpoint)

    def release(self) -> None:
        while self.held:
            if not (item := self.held.pop(0)).completed:  # the endpoint completes what a handler failed at
                item.complete()


class Pair:
    """Two endpoints of this process. `mine` is the one whose client misbehaves."""

    def __init__(self, client: Hooked) -> None:
        self.client, self.other = client, Hooked()
        ports = meeting()
        self.resources = Resources(QUOTAS, requests=4, messages=4)
        self.mine = Endpoint(ports[0], client, self.resources)
        self.theirs = Endpoint(ports[1], self.other, Resources(QUOTAS, requests=4, messages=4))

    def turn(self, times: int = 20) -> list[Exception]:
        """Drive both; what left a pump of `mine`."""
        raised: list[Exception] = []
        for _ in range(times):
            try:
                self.mine.pump(0.0)
            except RuntimeError as error:
                raised.append(error)
            self.theirs.pump(0.0)
        return raised

    def connected(self) -> Pair:
        self.turn()
        assert self.mine.state is self.theirs.state is State.CONNECTED
        return self

    def all_callbacks(self) -> list[Exception]:
        """Have every kind of callback of `mine` come, if it lives so long; what left its calls."""
        answers: list[Completion] = []

        def done(name: str) -> Callable[[Completion], None]:
            def done(completion: Completion) -> None:
                answers.append(completion)
                self.client.hook(name, self.mine)
            return done

        raised = self.turn()
        submit, answer = self.mine.submit_transaction, done("answer")
        submitted = [submit(b"a", answer), submit(b"b", answer), self.mine.submit_message(b"c", done("delivered"))]
        self.theirs.submit_message(b"d")
        self.theirs.submit_transaction(b"e")
        raised += self.turn()
        self.other.release()
        raised += self.turn()
        self.client.release()
        raised += self.turn()
        self.theirs.destroy()
        raised += self.turn()
        try:
            self.mine.destroy(lambda: self.client.hook("destroyed", self.mine))
        except RuntimeError as error:
            raised.append(error)
        assert len(answers) == submitted.count(Result.OK), "one was never completed"
        return raised


@pytest.mark.parametrize("where", ALL)
def test_what_a_callback_raises_is_the_only_thing_that_goes_wrong(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(endpoint: Endpoint) -> None:
        raise RuntimeError(f"as asked in {where}")

    pair = Pair(Hooked(where, fail))
    raised = pair.all_callbacks()
    if where in ("message", "transaction"):  # the submitter's to know; the traceback is in this side's log
        assert raised == []
        assert f"RuntimeError: as asked in {where}" in caplog.text
    else:
        assert [str(error) for error in raised] == [f"as asked in {where}"]
    if where == "disconnect":  # it never said that it is done
        assert pair.mine.state is State.DESTROYING
        pair.client.dones[-1]()
    assert pair.mine.state is State.DESTROYED
    assert pair.resources.user is None
    assert pair.client.told.count("disappear") == 1


def test_a_completion_that_raises_as_the_connection_is_lost_takes_no_other_with_it() -> None:
    pair = Pair(Hooked()).connected()
    told: list[int] = []

    def done(n: int) -> Callable[[Completion], None]:
        def done(completion: Completion) -> None:
            told.append(n)
            raise RuntimeError(str(n))
        return done

    for n in range(3):
        assert pair.mine.submit_transaction(b"", done(n), ordered=n == 1) is Result.OK
    with pytest.raises(RuntimeError):
        pair.mine.disconnect()
    assert sorted(told) == [0, 1, 2]
    assert pair.client.told[-1] == "disconnect"
    assert pair.mine.state is State.PRESENT
    assert pair.mine.outstanding == 0


@pytest.mark.parametrize("where", ALL)
def test_an_endpoint_can_be_destroyed_from_any_callback_of_its_own(where: str) -> None:
    freed: list[bool] = []

    def destroy(endpoint: Endpoint) -> None:
        endpoint.destroy(lambda: freed.append(pair.resources.user is None))

    pair = Pair(Hooked(where, destroy))
    assert pair.all_callbacks() == []
    pair.client.release()
    assert pair.mine.state is State.DESTROYED
    assert freed == [True], "told before the resources were free, or not once"
    assert pair.client.told.count("disappear") <= 1
    assert pair.mine.submit_message(b"") is Result.CLOSED
    Endpoint(meeting()[0], Client(), pair.resources).destroy()


@pytest.mark.parametrize("where", ALL)
def test_an_endpoint_can_be_disconnected_from_any_callback_of_its_own(where: str) -> None:
    pair = Pair(Hooked(where, lambda endpoint: endpoint.disconnect("from a callback")))
    assert pair.all_callbacks() == []
    pair.client.release()
    assert pair.mine.state is State.DESTROYED


def test_a_destroy_within_the_last_disappear_is_told_when_the_resources_are_free() -> None:
    freed: list[bool] = []
    client = Hooked("disappear", lambda endpoint: endpoint.destroy(lambda: freed.append(pair.resources.user is None)))
    pair = Pair(client)
    pair.connected().mine.destroy()
    assert freed == [True]


def test_a_port_that_cannot_close_keeps_neither_resources_nor_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region of which somebody still holds a view."""
    pair, told = Pair(Hooked()).connected(), list[int]()

    def close() -> None:
        raise MisuseError("closed while a view is open")

    with monkeypatch.context() as patched:
        patched.setattr(pair.mine._port, "close", close)
        with pytest.raises(MisuseError, match="view is open"):
            pair.mine.destroy(lambda: told.append(1))
    assert told == [1]
    assert pair.resources.user is None
    pair.mine._port.close()


def test_each_destroy_is_told() -> None:
    pair = Pair(Hooked()).connected()
    pair.client.where, pair.client.what = "disconnect", lambda endpoint: endpoint.destroy(lambda: told.append(2))
    told: list[int] = []
    pair.mine.destroy(lambda: told.append(1))
    pair.mine.destroy(lambda: told.append(3))
    assert told == [1, 2, 3]


def test_too_long_is_refused_to_the_one_who_does_it_and_nothing_is_sent() -> None:
    pair = Pair(Hooked()).connected()
    for call in (pair.mine.submit_transaction, pair.mine.submit_message):
        with pytest.raises(TooBigError, match="33 bytes"):
            call(bytes(33))
    assert pair.mine.outstanding == 0
    pair.theirs.submit_transaction(b"x")
    pair.turn()
    transaction = pair.client.held[0]
    assert isinstance(transaction, IncomingTransaction)
    with pytest.raises(TooBigError, match="17 bytes"):
        transaction.complete(bytes(17))
    assert pair.other.told == ["appear", "connect"]
    assert pair.theirs.outstanding == 1
    assert transaction.complete(bytes(16)) is Result.OK
    pair.turn()
    assert pair.theirs.outstanding == 0
    assert pair.mine.connections == 1


@pytest.mark.parametrize("end", ["lost", "destroyed"])
def test_completing_twice_is_misuse_and_completing_late_is_closed(end: str) -> None:
    pair = Pair(Hooked()).connected()
    for _ in range(2):
        pair.theirs.submit_transaction(b"x")
        pair.theirs.submit_message(b"x")
    pair.turn()
    early, late = pair.client.held[:2], pair.client.held[2:]
    for item in early:
        assert item.complete() is Result.OK
    if end == "lost":
        pair.theirs.disconnect()
        pair.turn()
    else:
        pair.mine.destroy()
    for item in late:
        assert item.complete() is Result.CLOSED
    for item in (*early, *late):
        with pytest.raises(MisuseError, match="has been completed before"):
            item.complete()
    assert pair.mine.state is (State.DESTROYED if end == "destroyed" else State.PRESENT)


def test_done_of_a_disconnect_counts_once() -> None:
    pair = Pair(Hooked()).connected()
    pair.mine.disconnect()
    with pytest.raises(MisuseError, match="called before"):
        pair.client.dones[0]()
    pair.turn()
    assert pair.mine.state is State.CONNECTED  # and takes nothing from the connection that came after
    with pytest.raises(MisuseError, match="called before"):
        pair.client.dones[0]()
    assert pair.mine.state.name == "CONNECTED"


def rows() -> list[tuple[str, str]]:
    """(what, tests) of the page's table."""
    table = (ROOT / "docs" / "idc.md").read_text().partition("## What is misuse")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [(row[0], row[2]) for row in cells[2:]]


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    found: dict[str, Any] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        found |= dict.fromkeys(re.findall(r"^def (test_\w+|\w+_front)\(", path.read_text(), re.MULTILINE))
    assert len(rows()) >= 8
    for what, tests in rows():
        names = re.findall(r"`(\w+)`", tests)
        assert names, f"no test for: {what}"
        assert [name for name in names if name not in found] == [], what
