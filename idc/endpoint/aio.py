"""The asyncio face of an endpoint: the event loop drives it, callers await.

    async with AsyncCaller(port) as caller:
        answers = await asyncio.gather(*(caller.transact(n) for n in numbers))

What is awaited at the same time is submitted together and announced once. Depends on idc.endpoint and asyncio.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Self

from idc.endpoint.blocking import check_operation, value_of
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.lifecycle import State
from idc.endpoint.party import PATIENCE
from idc.endpoint.results import Completion, Result
from idc.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done
    from idc.remote.borrow import Borrowed, Got
    from idc.remote.buffer import RemoteBuffer
    from idc.remote.registration import Registration
    from idc.transport.base import Port


class AsyncCaller:
    """An endpoint on the running event loop. Arguments as `idc.endpoint.blocking.Caller`."""

    def __init__(self, port: Port, resources: Resources | None = None, client: Client | None = None,
                 name: str = "the peer", beside: Sequence[Endpoint] = ()) -> None:
        self.endpoint = Endpoint(port, client or Client(), resources or Resources(), name)
        self._driven = [self.endpoint, *beside]
        self._loop = asyncio.get_running_loop()
        self._changed: set[asyncio.Future[None]] = set()
        self._answers: set[asyncio.Future[Completion]] = set()
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._failed: BaseException | None = None
        # Numbers of this object's own: another one may drive the same endpoints, and a loop knows each number once.
        self._fds = [os.dup(endpoint.fileno()) for endpoint in self._driven]
        for fd in self._fds:
            self._loop.add_reader(fd, self._pump)
        self._soon()

    async def connected(self) -> None:
        """Return once connected. Raises ClosedError."""
        while self.endpoint.state is not State.CONNECTED:
            await self._change()

    async def transact(self, parameters: bytes, *, ordered: bool = False) -> bytes:
        """Send a transaction and await its status; waits for a connection and a free slot.

        Cancelling abandons the answer, not the transaction. Raises as `Caller.transact`, without TimedOutError: use
        `asyncio.timeout`.
        """

        def submit(body: bytes, done: Done) -> Result:
            return self.endpoint.submit_transaction(body, done, ordered=ordered, notify=False)

        return value_of(await self._complete(submit, parameters))

    async def send(self, body: bytes) -> None:
        """Send a message and await its completion by the receiver. Raises as `transact`."""

        def submit(body: bytes, done: Done) -> Result:
            return self.endpoint.submit_message(body, done, notify=False)

        value_of(await self._complete(submit, body))

    async def receive_from(self, remote: RemoteBuffer, into: LocalBuffer, *, offset: int = 0) -> None:
        """Get bytes from a remote buffer; waits for a free slot.

        Cancelling abandons the completion, not the transfer: leave the local buffer alone. Raises as
        `Caller.receive_from`, without TimedOutError.
        """
        check_operation(await self._operate(lambda done: remote.receive_from(into, done, offset=offset)))

    async def send_to(self, remote: RemoteBuffer, source: LocalBuffer, *, offset: int = 0,
                      filled: bool = False) -> None:
        """Put bytes into a remote buffer. As `receive_from`."""
        check_operation(await self._operate(lambda done: remote.send_to(source, done, offset=offset, filled=filled)))

    async def filled(self, remote: RemoteBuffer, offset: int = 0, length: int | None = None) -> None:
        """Tell the owner that a range is filled. As `receive_from`."""
        check_operation(await self._operate(lambda done: remote.filled(offset, length, done)))

    async def share(self, remote: RemoteBuffer) -> Borrowed:
        """See `Caller.share`. As `receive_from`; a cancelled one is released when it comes."""
        return await self._borrow(remote.share)

    async def move(self, remote: RemoteBuffer) -> Borrowed:
        """See `Caller.move`. As `share`."""
        return await self._borrow(remote.move)

    async def unregister(self, registration: Registration, timeout: float = PATIENCE) -> None:  # noqa: ASYNC109 - its own
        """Return when nobody can be using the buffer any more. Raises as `Caller.unregister`."""
        ended: asyncio.Future[Completion] = self._loop.create_future()
        registration.unregister(lambda completion: _settle(ended, completion), timeout)
        check_operation(await self._answer(ended))

    async def close(self) -> None:
        """Destroy the endpoint; returns when its client has completed the disconnect. Idempotent."""
        self.endpoint.destroy()
        while self.endpoint.state is not State.DESTROYED:
            await self._change()
        self._stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _complete(self, submit: Callable[[bytes, Done], Result], body: bytes) -> Completion:
        answer: asyncio.Future[Completion] = self._loop.create_future()
        while (result := submit(body, lambda completion: _settle(answer, completion))) is not Result.OK:
            if result is Result.CLOSED:
                raise ClosedError("the endpoint is destroyed")
            await self._change()
        return await self._answer(answer)

    async def _operate(self, begin: Callable[[Done], Result]) -> Completion:
        ended: asyncio.Future[Completion] = self._loop.create_future()
        while (result := begin(lambda completion: _settle(ended, completion))) is Result.BACK_PRESSURED:
            await self._change()
        if result is not Result.OK:
            raise ClosedError("the remote buffer is closed, or its connection is over")
        return await self._answer(ended)

    async def _borrow(self, begin: Callable[[Got], Result]) -> Borrowed:
        got: list[Borrowed] = []
        waiting = True

        def begin_with(done: Done) -> Result:
            def told(completion: Completion, borrowed: Borrowed | None) -> None:
                if borrowed is not None:
                    got.append(borrowed)
                    if not waiting:
                        borrowed.release()
                done(completion)

            return begin(told)

        try:
            check_operation(await self._operate(begin_with))
        except asyncio.CancelledError:
            waiting = False
            for borrowed in got:
                borrowed.release()
            raise
        return got[0]

    async def _answer(self, answer: asyncio.Future[Completion]) -> Completion:
        self._soon()
        self._answers.add(answer)
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    async def _change(self) -> None:
        """Until the next pump that did something."""
        if self._failed is not None:
            raise self._failed
        change: asyncio.Future[None] = self._loop.create_future()
        self._changed.add(change)
        try:
            await change
        finally:
            self._changed.discard(change)

    def _soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        endpoint = self.endpoint
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            for driven in self._driven:
                driven.notify()
                driven.pump(0.0)
            asleep = [driven.arm() for driven in self._driven]
        except BaseException as error:
            self._failed = error
            self._stop()
            self._wake(error)
            raise
        self._wake(None)
        if endpoint.state is State.DESTROYED:
            self._stop()
        elif not all(asleep):
            self._soon()
        elif naps := [driven.patience for driven in self._driven if driven.patience is not None]:
            self._timer = self._loop.call_later(min(naps), self._pump)

    def _wake(self, error: BaseException | None) -> None:
        for change in tuple(self._changed):
            if not change.done():
                if error is None:
                    change.set_result(None)
                else:
                    change.set_exception(error)
        if error is not None:
            for answer in tuple(self._answers):
                if not answer.done():
                    answer.set_exception(error)

    def _stop(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            self._loop.remove_reader(fd)
            os.close(fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _settle(answer: asyncio.Future[Completion], completion: Completion) -> None:
    if not answer.done():
        answer.set_result(completion)
