"""A domain's link to its registry: calls that wait, calls that are told, and watches.

    registry = Registry.here()
    registry.write(f"{registry.home}/state", "up", ephemeral=True)
    registry.watch("/domain/back", lambda event: print(event.path))
    with registry.transaction() as t:
        t.write(f"{registry.home}/count", str(int(t.read(f"{registry.home}/count")) + 1))
    while True:
        registry.pump(1.0)

Its endpoint is driven like any other: `registry.endpoint` may stand among those of `idc.endpoint.together.drive`.
Whoever waits in a call drives it too, but callbacks of watches run after that call, never in the middle of it. When
the link comes back after it was lost, watches are set again, each with a first event, and ephemeral nodes are written
again. Belongs to one thread at a time. Depends on idc.endpoint, idc.registry and idc.transport.address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, Resources, Result, State
from idc.endpoint.blocking import NAP, value_of
from idc.errors import (
    ClosedError,
    ConflictError,
    IdcError,
    MisuseError,
    OutcomeUnknownError,
    RegistryError,
    TimedOutError,
    TransactionError,
)
from idc.registry import frames
from idc.registry.frames import FrameError, Op, Request
from idc.registry.operations import Operations
from idc.registry.transaction import Transaction
from idc.transport.address import REGISTRY_VARIABLE, open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from idc.transport.base import Port

    Done = Callable[[Completion], None]

#: Where a domain finds the address of its link to the registry.
VARIABLE: Final = REGISTRY_VARIABLE
#: Times that `Registry.transact` runs its function, at most.
TRIES: Final = 64
#: What can be asked again when it is not known whether it was done.
_REPEATABLE: Final = frozenset({Op.READ, Op.LIST, Op.TREE, Op.ACCESS, Op.BEGIN})

T = TypeVar("T")
log = logging.getLogger("idc.registry")


class Event(NamedTuple):
    """Something changed.

    Attributes:
        path: it was this node, or nodes below it.
        changes: so many since the watch's last event, at least; 0 of the first event, after `watch` or a lost link.
        nodes: values of the node and of those below it as this domain could read them, as `Operations.tree` has them,
            and at that moment or later; none if there is no such node. None: it does not say, ask.
    """

    path: str
    changes: int
    nodes: Mapping[str, bytes] | None = None


class Watch:
    """What `Registry.watch` returns: `close` ends it."""

    def __init__(self, registry: Registry, number: int, path: str, callback: Callable[[Event], object], *,
                 others: bool, nodes: bool) -> None:
        self.path = path
        self.number = number
        self.callback = callback
        self.request = Request(Op.WATCH, path, number=number, others=others, nodes=nodes)
        self.answered: Done = _log_refusal
        self._registry = registry

    def close(self) -> None:
        """No event is told from now on. Idempotent."""
        self._registry.unwatch(self)


class Registry(Operations):
    """A link to the registry.

    Args:
        port: where the registry is met; closed with this object.
        timeout: seconds that each call that waits has, connecting included.

    Attributes:
        timeout: see above; may be changed.
        endpoint: to be driven.
    """

    def __init__(self, port: Port, *, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._session = secrets.token_bytes(frames.SESSION_BYTES)
        self._domain = ""
        self._watches: dict[int, Watch] = {}
        self._numbers = 0
        self._ephemeral: dict[str, bytes] = {}
        self._again: deque[tuple[Request, Done]] = deque()
        self._sent_again = 0
        self._greeted = False
        self._events: deque[tuple[Watch, Event, IncomingMessage]] = deque()
        self._waiting = 0
        self._telling = False
        resources = Resources(frames.DOMAIN_ACCEPTS, requests=frames.REGISTRY_ACCEPTS.requests, messages=0)
        self.endpoint = Endpoint(port, _Told(self), resources, "the registry")

    @classmethod
    def here(cls, *, timeout: float = 10.0) -> Self:
        """As the environment says: IDC_REGISTRY. Raises MisuseError if it says nothing, OSError, IdcError."""
        address = os.environ.get(VARIABLE, "")
        if not address:
            raise MisuseError(f"{VARIABLE} is not set: this domain has no link to a registry")
        return cls(open_port(address), timeout=timeout)

    @property
    def domain(self) -> str:
        """This domain's name, as the registry knows it; waits for the first connection. Raises TimedOutError."""
        if not self._domain:
            with self._wait():
                self._ready(time.monotonic() + self.timeout)
        return self._domain

    @property
    def home(self) -> str:
        """The path of this domain's own nodes. As `domain`."""
        return frames.home(self.domain)

    # -- transactions and watches

    def transaction(self, *, together: bool = False) -> Transaction:
        """To be used in a with statement, as often as wanted. `together`: see `Transaction`."""
        return Transaction(self._ask, self._wrote, lambda: self.endpoint.connections,
                           self._ask_all if together else None)

    def transact(self, function: Callable[[Transaction], T], tries: int = TRIES, *, together: bool = False) -> T:
        """Run `function` within a transaction, again whenever others came in between. Raises ConflictError at last."""
        for left in reversed(range(tries)):
            try:
                with self.transaction(together=together) as transaction:
                    return function(transaction)
            except ConflictError:
                if not left:
                    raise
        raise MisuseError(f"{tries} tries: at least one is wanted")

    def watch(self, path: str, callback: Callable[[Event], object], *,
              others: bool = False, nodes: bool = False,
              refused: Callable[[IdcError], object] | None = None) -> Watch:
        """Call `callback` soon, and after every change at or below the path of nodes that this domain may read.

        Changes that come before the callback has returned are told in one event. There need be no such node.

        Args:
            path: of the nodes.
            callback: see above.
            others: not after changes by this link.
            nodes: events say what is there, where that is short: see `Event`.
            refused: the call waits for nothing if it is given, and it is called, from within `pump`, if there will be
                no events: the watch is closed then.

        Raises:
            QuotaError: too many watches.
            MisuseError, TimedOutError: see `Operations`.
        """
        self._numbers += 1
        watch = Watch(self, self._numbers, path, callback, others=others, nodes=nodes)
        self._watches[watch.number] = watch  # first: its first event may overtake the answer
        if refused is not None:
            def answered(completion: Completion) -> None:
                try:
                    result_of(completion)
                except OutcomeUnknownError:
                    pass  # as below
                except IdcError as error:
                    self._watches.pop(watch.number, None)
                    refused(error)

            watch.answered = answered
            self._send_again(watch.request, answered)
            return watch
        try:
            self._ask(watch.request)
        except OutcomeUnknownError:
            pass  # it is set again on the next connection
        except BaseException:
            self.unwatch(watch)  # it may have been set all the same
            raise
        return watch

    def unwatch(self, watch: Watch) -> None:
        """See `Watch.close`."""
        if self._watches.pop(watch.number, None) is not None:
            self._send_again(Request(Op.UNWATCH, number=watch.number), _ignore)

    def forget(self, path: str) -> None:
        """Do not write ephemeral nodes at or below a path again after a lost link: others have removed them."""
        self._wrote(path, None)

    # -- driving it

    def pump(self, timeout: float = 0.0) -> bool:
        """Do what is due, and wait up to `timeout` seconds for something. Whether anything happened."""
        return self.endpoint.pump(timeout)

    def submit(self, request: Request, done: Done) -> Result:
        """Ask without waiting: `done` is called from within `pump`; `result_of` makes a value or an exception of what
        it is given. OK, BACK_PRESSURED, NOT_CONNECTED or CLOSED; nothing was sent unless OK. Raises MisuseError.
        """

        if not self._greeted and self.endpoint.state is State.CONNECTED:
            return Result.NOT_CONNECTED

        def completed(completion: Completion) -> None:
            if completion.result is Result.OK and not completion.error:
                self._note(request)
            done(completion)
            self._flush_again()

        return self.endpoint.submit_transaction(request.pack(), completed)

    def close(self) -> None:
        """End the link: ephemeral nodes vanish. Idempotent."""
        self.endpoint.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- within

    def _ask(self, request: Request) -> bytes:
        body, deadline = request.pack(), time.monotonic() + self.timeout
        with self._wait():
            while True:
                completion = self._complete(body, deadline)
                try:
                    return value_of(completion)
                except TransactionError as error:
                    what = f"{request.op.name.lower()} {request.path}".strip()
                    raise frames.error_of(error.code, error.status, what) from None
                except OutcomeUnknownError:
                    if request.transaction or request.op not in _REPEATABLE:
                        raise

    def _ask_all(self, requests: Sequence[Request]) -> list[RegistryError | None]:
        """Of one transaction: all are sent before the first answer is waited for. Of each why it was refused, or None.
        """
        deadline, told = time.monotonic() + self.timeout, dict[int, Completion]()
        with self._wait():
            self._ready(deadline)
            for number, request in enumerate(requests):
                def done(completion: Completion, number: int = number) -> None:
                    told[number] = completion

                while (result := self.endpoint.submit_transaction(request.pack(), done, notify=False)) is not Result.OK:
                    if result is not Result.BACK_PRESSURED:
                        raise OutcomeUnknownError("the link to the registry was lost meanwhile")
                    self._drive(deadline)
            while len(told) < len(requests):
                self._drive(deadline)
        refusals: list[RegistryError | None] = []
        for number, request in enumerate(requests):
            try:
                value_of(told[number])
            except TransactionError as error:
                refusals.append(frames.error_of(error.code, error.status, f"{request.op.name.lower()} {request.path}"))
            else:
                refusals.append(None)
        return refusals

    def _complete(self, body: bytes, deadline: float) -> Completion:
        told: list[Completion] = []
        while True:
            self._ready(deadline)
            result = self.endpoint.submit_transaction(body, told.append)
            if result is Result.OK:
                break
            if result is Result.BACK_PRESSURED:
                self._drive(deadline)
        while not told:
            self._drive(deadline)
        return told[0]

    def _drive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if self.endpoint.state is State.DESTROYED:
            raise ClosedError("the link to the registry is closed")
        if left <= 0:
            why = self.endpoint.reason or "does it run?"
            raise TimedOutError(f"the registry does not answer within {self.timeout:g} s: {why}")
        self.endpoint.pump(min(left, NAP))

    def _ready(self, deadline: float) -> None:
        """Wait until the registry has greeted, and what was lost with the last link is there again."""
        self.endpoint.pump(0.0)  # a link that is lost already is better noticed before something is sent by it
        while not self._greeted or self._again or self._sent_again:
            self._drive(deadline)

    @contextlib.contextmanager
    def _wait(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._tell()

    def _tell(self) -> None:
        """Call the callbacks of events that have come; not while a call waits, nor within a callback."""
        if self._waiting or self._telling:
            return
        self._telling = True
        try:
            while self._events:
                watch, event, message = self._events.popleft()
                try:
                    if self._watches.get(watch.number) is watch:
                        watch.callback(event)
                except Exception:  # the call that happens to run it has nothing to do with it
                    log.exception("the callback of a watch of %s failed", watch.path)
                finally:
                    message.complete()
        finally:
            self._telling = False

    def _note(self, request: Request) -> None:
        if not request.transaction and request.op in (Op.WRITE, Op.RM):
            self._wrote(request.path, request.rest if request.ephemeral else None)

    def _wrote(self, path: str, value: bytes | None) -> None:
        if value is not None:
            self._ephemeral[path] = value
        else:
            below = path.rstrip("/") + "/"
            for known in [known for known in self._ephemeral if known == path or known.startswith(below)]:
                del self._ephemeral[known]

    def _send_again(self, request: Request, done: Done) -> None:
        self._again.append((request, done))
        self._flush_again()

    def _flush_again(self) -> None:
        while self._again:
            request, done = self._again[0]

            def completed(completion: Completion, done: Done = done) -> None:
                self._sent_again -= 1
                done(completion)
                self._flush_again()

            if self.endpoint.submit_transaction(request.pack(), completed) is not Result.OK:
                return  # when a slot is free, or not at all: a new connection begins anew
            self._sent_again += 1
            self._again.popleft()

    # -- what the endpoint tells

    def connected(self) -> None:
        """Greet, and set watches again."""
        self._again.clear()
        self._sent_again = 0
        self._send_again(Request(Op.HELLO, rest=self._session), self._welcome)
        for watch in self._watches.values():
            self._again.append((watch.request, watch.answered))
        self._flush_again()

    def _welcome(self, completion: Completion) -> None:
        try:
            self._domain, kept = frames.parse_hello(result_of(completion))
        except (IdcError, FrameError) as error:
            log.warning("the registry's greeting: %s", error)
            return
        self._greeted = True
        if not kept:
            for path, value in self._ephemeral.items():
                self._again.append((Request(Op.WRITE, path, rest=value, ephemeral=True), _log_refusal))

    def disconnected(self) -> None:
        """What waits to be told is void: each watch begins anew."""
        self._greeted = False
        self._again.clear()
        while self._events:
            self._events.popleft()[2].complete()

    def came(self, message: IncomingMessage) -> None:
        """EVENT."""
        try:
            number, changes, path, nodes = frames.parse_event(message.body)
        except FrameError as error:
            log.warning("the registry sent %s", error)
            message.complete()
            return
        watch = self._watches.get(number)
        if watch is None:
            message.complete()  # it was ended as the event was under way
            return
        self._events.append((watch, Event(path, changes, nodes), message))
        self._tell()


class _Told(Client):
    """What the endpoint tells, passed on: `Registry.transaction` is another thing than `Client.transaction`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def connect(self, endpoint: Endpoint) -> None:
        self._registry.connected()

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self._registry.disconnected()
        done()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self._registry.came(message)


def result_of(completion: Completion) -> bytes:
    """The status of a completed request; see `idc.registry.frames` for what it holds.

    Raises:
        RegistryError: refused.
        OutcomeUnknownError: the link was lost meanwhile.
    """
    try:
        return value_of(completion)
    except TransactionError as error:
        raise frames.error_of(error.code, error.status, "the registry refuses") from None


def _ignore(_: Completion) -> None:
    """Nobody wants to know."""


def _log_refusal(completion: Completion) -> None:
    try:
        result_of(completion)
    except IdcError as error:
        log.warning("what was to be set again after the link was lost: %s", error)
