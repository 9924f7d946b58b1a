"""The blocking face of an endpoint: calls that return when it is done, with no thread behind them.

Whoever waits in a call drives the endpoint, so handlers of what comes in meanwhile run inside that call.

    with Caller(port, Resources()) as caller:
        answer = caller.transact(b"question", timeout=5)

Depends on idc.endpoint, idc.remote and idc.errors.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Completion, Result
from idc.errors import (
    BackPressuredError,
    ClosedError,
    HandlerFailedError,
    MisuseError,
    NotConnectedError,
    OutcomeUnknownError,
    RefusedError,
    TimedOutError,
    TransactionError,
)
from idc.remote.registration import PATIENCE
from idc.remote.resolution import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done
    from idc.remote.borrow import Borrowed, Got
    from idc.remote.buffer import RemoteBuffer
    from idc.remote.registration import Registration
    from idc.transport.base import Port

#: Longest sleep in one piece, seconds: between two of them signals are handled and deadlines looked at.
NAP: Final = 1.0


def value_of(completion: Completion) -> bytes:
    """The status of a completed transaction.

    Raises:
        TransactionError: the other side answered with an error code.
        HandlerFailedError: its handler raised.
        OutcomeUnknownError: the connection was lost meanwhile.
    """
    if completion.result is Result.OK:
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
        if completion.error == Refusal.FORCED:
            raise MisuseError(completion.reason)
        raise RefusedError(completion.error, completion.reason)
    if completion.result is Result.BACK_PRESSURED:
        raise BackPressuredError(completion.reason)
    raise OutcomeUnknownError(completion.reason)


class Caller:
    """An endpoint for one thread that calls and waits.

    Args:
        port: where the peer is met; closed with this object.
        resources: made before, or default ones.
        client: who handles what comes in; by default transactions are refused and messages dropped.
        name: of the peer, for messages.

    Attributes:
        endpoint: what is under it; buffers are registered there, and remote ones made.
    """

    def __init__(self, port: Port, resources: Resources | None = None, client: Client | None = None,
                 name: str = "the peer") -> None:
        self.endpoint = Endpoint(port, client or Client(), resources or Resources(), name)

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
        return value_of(self._complete(self.endpoint.submit_transaction, parameters, timeout))

    def send(self, body: bytes, *, timeout: float | None = None) -> None:
        """Send a message and wait until the receiver has completed it. Raises as `transact`."""
        value_of(self._complete(self.endpoint.submit_message, body, timeout))

    def receive_from(self, remote: RemoteBuffer, into: LocalBuffer, *, offset: int = 0,
                     timeout: float | None = None) -> None:
        """Get bytes from a remote buffer: see `RemoteBuffer.receive_from`. Waits for a free slot.

        Raises:
            MisuseError, RefusedError, BackPressuredError, OutcomeUnknownError: see `check_operation`.
            TimedOutError: not in `timeout` seconds; it stays under way, so leave the local buffer alone.
            ClosedError: the remote buffer is closed, or its connection is over.
        """
        check_operation(self._operate(lambda done: remote.receive_from(into, done, offset=offset), timeout))

    def send_to(self, remote: RemoteBuffer, source: LocalBuffer, *, offset: int = 0, filled: bool = False,
                timeout: float | None = None) -> None:
        """Put bytes into a remote buffer: see `RemoteBuffer.send_to`. Raises as `receive_from`."""
        check_operation(self._operate(lambda done: remote.send_to(source, done, offset=offset, filled=filled), timeout))

    def filled(self, remote: RemoteBuffer, offset: int = 0, length: int | None = None, *,
               timeout: float | None = None) -> None:
        """Tell the owner that a range is filled. Raises as `receive_from`; RefusedError is what its callback raised."""
        check_operation(self._operate(lambda done: remote.filled(offset, length, done), timeout))

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
        told: list[Completion] = []
        registration.unregister(told.append, timeout)
        while not told:
            self.endpoint.pump(NAP)
        check_operation(told[0])

    def close(self) -> None:
        """Destroy the endpoint. Idempotent."""
        self.endpoint.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(self, submit: Callable[[bytes, Done], Result], body: bytes, timeout: float | None) -> Completion:
        answers: list[Completion] = []
        result = submit(body, answers.append)
        deadline = None if timeout is None else time.monotonic() + timeout
        while result is not Result.OK:
            if result is Result.CLOSED:
                raise ClosedError("the endpoint is destroyed")
            self._drive(deadline, NotConnectedError if result is Result.NOT_CONNECTED else None)
            result = submit(body, answers.append)
        while not answers:
            self._drive(deadline, None)
        return answers[0]

    def _operate(self, begin: Callable[[Done], Result], timeout: float | None) -> Completion:
        """Begin when there is a slot, and wait for the end."""
        told: list[Completion] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while (result := begin(told.append)) is Result.BACK_PRESSURED:
            self._drive(deadline, None)
        if result is not Result.OK:
            raise ClosedError("the remote buffer is closed, or its connection is over")
        while not told:
            self._drive(deadline, None)
        return told[0]

    def _borrow(self, begin: Callable[[Got], Result], timeout: float | None) -> Borrowed:
        got: list[Borrowed | None] = []

        def begin_with(done: Done) -> Result:
            def told(completion: Completion, borrowed: Borrowed | None) -> None:
                got.append(borrowed)
                done(completion)

            return begin(told)

        check_operation(self._operate(begin_with, timeout))
        assert got[0] is not None
        return got[0]

    def _until(self, condition: Callable[[], bool], timeout: float | None, what: str) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition():
            if self.endpoint.state is State.DESTROYED:
                raise ClosedError("the endpoint is destroyed")
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOutError(f"{what} within {timeout:g} s")
            self._drive(deadline, None)

    def _drive(self, deadline: float | None, missing: type[NotConnectedError] | None) -> None:
        nap = NAP
        if deadline is not None:
            nap = min(nap, deadline - time.monotonic())
            if nap <= 0:
                if missing is not None:
                    raise TimedOutError(f"not connected in time: {self.endpoint.reason or 'the peer did not come'}")
                raise TimedOutError("no answer in time")
        self.endpoint.pump(nap)
