"""The blocking face of an endpoint: calls that return when it is done, with no thread behind them.

Whoever waits in a call drives the endpoint, so handlers of what comes in meanwhile run inside that call. Of several
threads that wait, one does it for all (the leader), and hands over when it has its own answer.

    with Caller(port, Resources()) as caller:
        answer = caller.transact(b"question", timeout=5)

Depends on idc.endpoint and idc.errors; whoever has remote buffers has loaded idc.remote.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Final, Self

from idc._core import ffi, lib
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.lifecycle import State
from idc.endpoint.party import PATIENCE
from idc.endpoint.results import Completion, Result
from idc.endpoint.together import drive
from idc.errors import (
    BackPressuredError,
    ClosedError,
    HandlerFailedError,
    MisuseError,
    OutcomeUnknownError,
    RefusedError,
    TimedOutError,
    TransactionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done
    from idc.remote.borrow import Borrowed, Got
    from idc.remote.buffer import RemoteBuffer
    from idc.remote.reference import Access
    from idc.remote.registration import Registration
    from idc.remote.routes import Route
    from idc.transport.base import Port

#: Longest sleep in one piece, seconds: between two of them signals are handled and deadlines looked at.
NAP: Final = 1.0
#: The same, for a thread that has been the only one so far: a second one waits that long once, at most.
NAP_ALONE: Final = 0.1
#: Seconds for which a leader waits in the core, which polls first, before it lets the others submit and sleeps.
HOLD: Final = 50e-6
_unpack, _transact, _WENT, _BUSY = ffi.unpack, lib.idc_line_transact, lib.IDC_WENT, lib.IDC_BUSY
_NOTHING_DONE: Final = lib.IDC_DUE
_OTHERS: Final = "a handler in another thread's call did not end in time"
#: Seconds between two looks whether the first thread has come out of the core, once there is a second.
LOOK: Final = 1e-3
_OK, _BACK_PRESSURED = Result.OK, Result.BACK_PRESSURED  # an Enum's members are looked up by a call of Python code


def value_of(completion: Completion) -> bytes:
    """The status of a completed transaction.

    Raises:
        TransactionError: the other side answered with an error code.
        HandlerFailedError: its handler raised.
        OutcomeUnknownError: the connection was lost meanwhile.
    """
    if completion.result is _OK:
        if completion.error:
            raise TransactionError(completion.error, completion.status)
        return completion.status
    if completion.result is Result.ERROR:
        raise HandlerFailedError(completion.reason)
    raise OutcomeUnknownError(completion.reason)


def check_operation(completion: Completion) -> None:
    """Return if an operation on a remote buffer ended well.

    Raises:
        MisuseError: a route or strategy is forced that cannot do it.
        RefusedError: the owner, or who is between, refused; `code` is the Refusal.
        BackPressuredError: a broker takes no request now.
        OutcomeUnknownError: the connection was lost meanwhile.
    """
    if completion.result is Result.OK:
        return
    if completion.result is Result.ERROR:
        from idc.remote.resolution import Refusal  # loaded with the remote buffer that this is about

        if completion.error == Refusal.FORCED:
            raise MisuseError(completion.reason)
        raise RefusedError(completion.error, completion.reason)
    if completion.result is Result.BACK_PRESSURED:
        raise BackPressuredError(completion.reason)
    raise OutcomeUnknownError(completion.reason)


class _Call:
    """One thread's wait: for the completion of what it submitted, or for anything that may change its luck."""

    __slots__ = ("completion", "waiting")

    def __init__(self) -> None:
        self.completion: Completion | None = None
        self.waiting: threading.Condition | None = None

    def done(self, completion: Completion) -> None:
        """Runs in whichever thread drives the endpoint."""
        self.completion = completion
        if self.waiting is not None:
            self.waiting.notify()

    def wake(self) -> None:
        """Look again. The caller's lock is held."""
        if self.waiting is not None:
            self.waiting.notify()


def _spare() -> tuple[_Call, Done]:
    call = _Call()
    return call, call.done


class Caller:
    """An endpoint for threads that call and wait. Any number of them may share it, and none is made for it.

    Each thread's calls are executed in its order. A handler of what comes in may call, too; the other threads wait
    until that call has its answer. The endpoint itself belongs to this object: only handlers may use it beside.

    Args:
        port: where the peer is met; closed with this object.
        resources: made before, or default ones.
        client: who handles what comes in; by default transactions are refused and messages dropped.
        name: of the peer, for messages.
        beside: endpoints that are driven too whenever a call waits, such as the control link to a broker.

    Attributes:
        endpoint: what is under it; buffers are registered there, and remote ones made.
    """

    def __init__(self, port: Port, resources: Resources | None = None, client: Client | None = None,
                 name: str = "the peer", beside: Sequence[Endpoint] = ()) -> None:
        resources = resources or Resources()
        self.endpoint = Endpoint(port, client or Client(), resources, name)
        self._driven = [self.endpoint, *beside]
        self._lock = threading.RLock()  # held by whoever is inside the endpoint, and by nobody who sleeps
        self._slots = resources.requests
        self._first = self._only = 0  # a thread; and the same, until there is another
        self._calling = False  # it is inside the core, perhaps without the lock, and uses the spare call
        self._shared = False
        self._inside: set[int] = set()
        self._leader = False
        self._followers: deque[_Call] = deque()
        self._asleep = False
        self._closing = False
        self._spare = _spare()  # of the one thread that calls, which has been told what it needed it for
        self.endpoint.told = self._spare[1]
        self._left = threading.Condition(self._lock)
        self._kick = -1

    def connect(self, timeout: float | None = None) -> None:
        """Wait until connected. Raises TimedOutError after `timeout` seconds, ClosedError."""
        self._until(lambda: self.endpoint.state is State.CONNECTED, timeout, "nobody connected")

    def transact(self, parameters: bytes, *, timeout: float | None = None) -> bytes:
        """Send a transaction and wait for its status. Connects first, and waits for a free slot.

        Raises:
            TransactionError, HandlerFailedError, OutcomeUnknownError: see `value_of`.
            TimedOutError: no answer in `timeout` seconds; the transaction stays under way and its answer is dropped.
            TooBigError: longer than the peer accepts.
            ClosedError: the endpoint was destroyed.
        """
        if timeout is None and get_ident() == self._only and not self._calling:  # else a signal's handler calls
            answer: bytes | Result = _BACK_PRESSURED
            try:
                self._calling = True  # before the look whether another has come, who looks at this after he said so
                if self._only:
                    rc, slots, endpoint = _NOTHING_DONE, self._slots, self.endpoint
                    line = slots.line
                    if line is not None and slots.user is endpoint and type(parameters) is bytes:
                        _room, status = endpoint._carrier, slots.status  # the first holds the memory of the second
                        rc = _transact(line, parameters, len(parameters))
                        if rc >= 0:
                            found: bytes = _unpack(status, rc)
                            self._calling = False
                            return found
                    call = self._spare[0]
                    answer = self._transact(parameters, rc)
                self._calling = False
            except BaseException:
                try:
                    self.endpoint.interrupted()
                    self._renew()  # the other may be told of an answer yet
                finally:
                    self._calling = False
                raise
            if type(answer) is bytes:
                return answer
            if answer is _OK:
                return value_of(self._complete(lambda _: _OK, None, call))
        return value_of(self._complete(lambda done: self.endpoint.submit_transaction(parameters, done), timeout))

    def _transact(self, parameters: bytes, rc: int) -> bytes | Result:
        """As `Endpoint.call`, where the core has not done all of it. No other thread is inside, see `_arrive`."""
        answer: bytes | Result = _OK
        with self._lock:
            if rc < _WENT:
                self.endpoint.unanswered()
            elif rc == _BUSY:  # it is too long, or something has to be dealt with before
                self.endpoint.interrupted()
                answer = _BACK_PRESSURED
            else:
                answer = self.endpoint.call(parameters, self._spare[1], NAP_ALONE)
            if type(answer) is not bytes:
                self._renew()  # what the spare one is for has been said
        return answer

    def _renew(self) -> None:
        self._spare = spare = _spare()
        self.endpoint.told = spare[1]

    def send(self, body: bytes, *, timeout: float | None = None) -> None:
        """Send a message and wait until the receiver has completed it. Raises as `transact`."""
        value_of(self._complete(lambda done: self.endpoint.submit_message(body, done), timeout))

    def receive_from(self, remote: RemoteBuffer, into: LocalBuffer, *, offset: int = 0,
                     timeout: float | None = None) -> None:
        """Get bytes from a remote buffer: see `RemoteBuffer.receive_from`. Waits for a free slot.

        Raises:
            MisuseError, RefusedError, BackPressuredError, OutcomeUnknownError: see `check_operation`.
            TimedOutError: not in `timeout` seconds; it stays under way, so leave the local buffer alone.
            ClosedError: the remote buffer is closed, or its connection is over.
        """
        self._operate(lambda done: remote.receive_from(into, done, offset=offset), timeout)

    def send_to(self, remote: RemoteBuffer, source: LocalBuffer, *, offset: int = 0, filled: bool = False,
                timeout: float | None = None) -> None:
        """Put bytes into a remote buffer: see `RemoteBuffer.send_to`. Raises as `receive_from`."""
        self._operate(lambda done: remote.send_to(source, done, offset=offset, filled=filled), timeout)

    def filled(self, remote: RemoteBuffer, offset: int = 0, length: int | None = None, *,
               timeout: float | None = None) -> None:
        """Tell the owner that a range is filled. Raises as `receive_from`; RefusedError is what its callback raised."""
        self._operate(lambda done: remote.filled(offset, length, done), timeout)

    def share(self, remote: RemoteBuffer, *, timeout: float | None = None) -> Borrowed:
        """Its bytes to read and write, while the owner's stay: see `RemoteBuffer.share`. Raises as `receive_from`."""
        return self._borrow(remote.share, timeout)

    def move(self, remote: RemoteBuffer, *, timeout: float | None = None) -> Borrowed:
        """Its pages for this side alone, or a copy: see `RemoteBuffer.move`. Raises as `receive_from`."""
        return self._borrow(remote.move, timeout)

    def unregister(self, registration: Registration, timeout: float = PATIENCE) -> None:
        """Return when nobody can be using the buffer any more.

        Raises:
            RefusedError: not in `timeout` seconds; the text names the peers that hold it. It can be called again.
            MisuseError: it was unregistered before.
        """
        def submit(done: Done) -> Result:
            registration.unregister(done, timeout)
            self._wake_all()  # the leader's sleep has to end by that time-out
            return Result.OK

        check_operation(self._complete(submit, None))

    def register(self, buffer: LocalBuffer, access: Access, *, filled: Callable[[int, int], None] | None = None,
                 returned: Callable[[], None] | None = None, direct: bool = True,
                 outlives: bool = False) -> Registration:
        """See `Endpoint.register`."""
        with self.inside() as endpoint:
            return endpoint.register(buffer, access, filled=filled, returned=returned, direct=direct, outlives=outlives)

    def remote(self, reference: bytes, *, route: Route | None = None,
               revoked: Callable[[], None] | None = None) -> RemoteBuffer:
        """See `Endpoint.remote`. What is not a call of this object's, as `close` and `release`: use `inside`."""
        with self.inside() as endpoint:
            return endpoint.remote(reference, route=route, revoked=revoked)

    @contextlib.contextmanager
    def inside(self) -> Iterator[Endpoint]:
        """The endpoint itself, and what belongs to it, for this thread alone; it is so where no other one calls."""
        self._arrive(threading.get_ident())
        with self._lock:
            yield self.endpoint
            self._wake_all()

    def close(self) -> None:
        """Destroy the endpoint; other threads' calls end, as those of a destroyed one do. Idempotent."""
        self._arrive(threading.get_ident())
        with self._lock:
            self._closing = True
            while self._asleep:  # its descriptors must not be closed, and used by another, under a sleeping leader
                os.eventfd_write(self._kick, 1)
                self._left.wait(NAP_ALONE)
            self.endpoint.destroy()
            self._wake_all()
            if self._kick >= 0:
                os.close(self._kick)
                self._kick = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one call

    def _complete(self, submit: Callable[[Done], Result], timeout: float | None,
                  call: _Call | None = None) -> Completion:
        call, deadline = call or _Call(), None if timeout is None else time.monotonic() + timeout
        me, nested = self._enter(timeout)
        try:
            while (result := submit(call.done)) is not _OK:
                if result is Result.CLOSED:
                    raise ClosedError("the endpoint is destroyed")
                if result is Result.NOT_CONNECTED:
                    self._wake_all()  # others' calls may have ended with the connection, just now
                self._turn(call, deadline, result, nested=nested)
            if deadline is None and not self._shared:
                pump = self.endpoint.pump
                while call.completion is None and not self._shared:
                    pump(NAP_ALONE)
            while call.completion is None:
                self._turn(call, deadline, result, nested=nested)
        finally:
            self._leave(me, nested=nested)
        return call.completion

    def _operate(self, begin: Callable[[Done], Result], timeout: float | None) -> None:
        """An operation on a remote buffer, which belongs to one connection: there is no other to wait for."""

        def submit(done: Done) -> Result:
            result = begin(done)
            if result in (Result.CLOSED, Result.NOT_CONNECTED):
                raise ClosedError("the remote buffer is closed, or its connection is over")
            self._wake_all()  # it begins when the endpoint is driven, and a leader that sleeps does not
            return result

        check_operation(self._complete(submit, timeout))

    def _borrow(self, begin: Callable[[Got], Result], timeout: float | None) -> Borrowed:
        got: list[Borrowed | None] = []
        waiting = True

        def begin_with(done: Done) -> Result:
            def told(completion: Completion, borrowed: Borrowed | None) -> None:
                got.append(borrowed)
                if borrowed is not None and not waiting:
                    borrowed.release()
                done(completion)

            return begin(told)

        try:
            self._operate(begin_with, timeout)
        finally:
            waiting = False  # what comes after a time-out is given back
        assert got[0] is not None
        return got[0]

    def _until(self, condition: Callable[[], bool], timeout: float | None, what: str) -> None:
        call, deadline = _Call(), None if timeout is None else time.monotonic() + timeout
        me, nested = self._enter(timeout)
        try:
            while not condition():
                if self.endpoint.state is State.DESTROYED:
                    raise ClosedError("the endpoint is destroyed")
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimedOutError(f"{what} within {timeout:g} s")
                self._turn(call, deadline, Result.OK, nested=nested)
        finally:
            self._leave(me, nested=nested)

    def _enter(self, timeout: float | None) -> tuple[int, bool]:
        """Take the lock: this thread, and whether it is in a call already, whose handler calls now."""
        me = threading.get_ident()
        if me != self._first:
            self._arrive(me, timeout)
        if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            raise TimedOutError(_OTHERS)
        nested = me in self._inside
        self._inside.add(me)
        return me, nested

    def _arrive(self, me: int, timeout: float | None = None) -> None:
        """Note whether more than one thread uses this object: a leader looks at that when it wakes.

        Then wait until the first one has come out of the core, where it is without the lock. Raises TimedOutError.
        """
        self._shared = self._shared or self._first not in (0, me)
        self._first = self._first or me
        self._only = 0 if self._shared else me
        end = None if timeout is None else time.monotonic() + timeout
        while self._calling and me != self._first:  # at most NAP_ALONE, and once
            if end is not None and time.monotonic() >= end:
                raise TimedOutError(_OTHERS)
            time.sleep(LOOK)

    def _leave(self, me: int, *, nested: bool) -> None:
        """The end of a call: another may have to lead. Lets the lock go."""
        if not nested:
            self._inside.discard(me)
        if self._followers and not self._leader:
            self._followers[0].wake()
        self._lock.release()

    def _turn(self, call: _Call, deadline: float | None, result: Result, *, nested: bool) -> None:
        """Wait for something, as leader or follower; then the caller looks whether it was for it."""
        nap = NAP
        if deadline is not None:
            nap = min(nap, deadline - time.monotonic())
            if nap <= 0:
                if result is Result.NOT_CONNECTED:
                    raise TimedOutError(f"not connected in time: {self.endpoint.reason or 'the peer did not come'}")
                raise TimedOutError("no answer in time")
        if nested or not self._shared:
            drive(self._driven, min(nap, NAP_ALONE))
            if self._shared:
                self._wake_all()
        elif self._leader or self._closing:
            self._follow(call, nap)
        else:
            self._leader = True
            try:
                self._lead(nap)
            finally:
                self._leader = False

    def _follow(self, call: _Call, nap: float) -> None:
        call.waiting = threading.Condition(self._lock)
        self._followers.append(call)
        try:
            call.waiting.wait(nap)
        finally:
            self._followers.remove(call)
            call.waiting = None

    def _lead(self, nap: float) -> None:
        """Drive the endpoint for all; the lock is let go only for the sleep on its descriptor."""
        if drive(self._driven, min(nap, HOLD)):
            self._wake_all()
            return
        alive = [endpoint for endpoint in self._driven if endpoint.state is not State.DESTROYED]
        if self.endpoint not in alive or not all(endpoint.arm() for endpoint in alive):
            self._wake_all()
            return
        patience = min((p for endpoint in alive if (p := endpoint.patience) is not None), default=None)
        if self._kick < 0:
            self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        poller = select.poll()
        for endpoint in alive:
            poller.register(endpoint.fileno(), select.POLLIN)
        poller.register(self._kick, select.POLLIN)
        self._asleep = True
        self._lock.release()
        try:
            poller.poll(1000 * (nap if patience is None else min(nap, patience)))
        finally:
            self._lock.acquire()
            self._asleep = False
            self._left.notify_all()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._kick)

    def _wake_all(self) -> None:
        """Something happened: who waits for a slot or a connection looks again, too."""
        if self._asleep:
            os.eventfd_write(self._kick, 1)
        for follower in self._followers:
            follower.wake()
