"""The blocking face of an endpoint: calls that return when it is done, with no thread behind them.

Whoever waits in a call drives the endpoint, so handlers of what comes in meanwhile run inside that call.

    with Caller(port, Resources()) as caller:
        answer = caller.transact(b"question", timeout=5)

Depends on idc.endpoint and idc.errors.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Completion, Result
from idc.errors import (
    ClosedError,
    HandlerFailedError,
    NotConnectedError,
    OutcomeUnknownError,
    TimedOutError,
    TransactionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.session import Done
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


class Caller:
    """An endpoint for one thread that calls and waits.

    Args:
        port: where the peer is met; closed with this object.
        resources: made before, or default ones.
        client: who handles what comes in; by default transactions are refused and messages dropped.

    Attributes:
        endpoint: what is under it.
    """

    def __init__(self, port: Port, resources: Resources | None = None, client: Client | None = None) -> None:
        self.endpoint = Endpoint(port, client or Client(), resources or Resources())

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
