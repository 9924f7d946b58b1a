"""The loops that idc.measure.traced measures. Each variant has a copy of its own, and so of everything that Python
specialises for the classes it has seen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol, cast

from idc._core import ffi, lib
from idc.endpoint.blocking import Caller
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.engine import Engine
from idc.endpoint.frames import Quotas
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from idc.endpoint.session import IncomingMessage, IncomingTransaction
    from idc.region import Region
    from idc.trace import Tracer
    from idc.transport.base import Port

_QUOTAS: Final = Quotas(requests=64, messages=4, parameter_bytes=200, status_bytes=200)


class Near(Protocol):
    """The end that asks."""

    def block(self, count: int, body: bytes) -> list[int]:
        """So many transactions; ns of each, or of several together the mean."""

    def close(self) -> None:
        """End the connection, and let go of the region."""


class Far(Protocol):
    """The end that answers."""

    def block(self, count: int) -> None:
        """Answer so many, and send the last answer."""

    def close(self) -> None:
        """See `Near`."""


def port(region: Region, channel: str) -> SharedPort:
    """Of this variant's own kind. The region stays open: all channels are of it."""
    return SharedPort(region, channel, release=lambda: None)


class _Echo(Client):
    """Answers with what it was asked, and counts; messages too."""

    def __init__(self) -> None:
        self.count = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See there."""
        del endpoint
        self.count += 1
        transaction.complete(transaction.parameters)

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        """See there."""
        del endpoint
        self.count += 1
        message.complete()


class PythonNear:
    """One at a time, by `Caller.transact`."""

    def __init__(self, port: Port, tracer: Tracer | None, outstanding: int) -> None:
        assert outstanding == 1
        self._caller = Caller(port, Resources())
        if tracer is not None:
            self._caller.endpoint.trace = tracer.endpoint("echo")
        self._caller.connect(20)

    def block(self, count: int, body: bytes) -> list[int]:
        """See `Near`."""
        transact, now = self._caller.transact, time.perf_counter_ns
        samples = []
        before = now()
        for _ in range(count):
            transact(body)
            after = now()
            samples.append(after - before)
            before = after
        return samples

    def close(self) -> None:
        """See `Near`."""
        self._caller.endpoint.abandon()


class PythonFar:
    """A handler in Python."""

    def __init__(self, port: Port, tracer: Tracer | None) -> None:
        self._client = _Echo()
        self._endpoint = Endpoint(port, self._client, Resources())
        if tracer is not None:
            self._endpoint.trace = tracer.endpoint("echo")
        _connect(self._endpoint)

    def block(self, count: int) -> None:
        """See `Far`."""
        client, pump = self._client, self._endpoint.pump
        until = client.count + count
        while client.count < until:
            pump(1.0)
        self._endpoint.notify()

    def close(self) -> None:
        """See `Near`."""
        self._endpoint.abandon()


class CoreNear:
    """By an Engine; so many outstanding, of which one sample is the mean."""

    def __init__(self, port: Port, tracer: Tracer | None, outstanding: int) -> None:
        self._engine, self._endpoint = _engine(port, Client(), tracer)
        self._outstanding = outstanding

    def block(self, count: int, body: bytes) -> list[int]:
        """See `Near`. A message says that it was the last: the handler in C counts nothing."""
        submit, poll, now = self._engine.submit, self._engine.poll, time.perf_counter_ns
        together = range(self._outstanding)
        samples = []
        before = now()
        for _ in range(count // self._outstanding):
            for cookie in together:
                submit(body, cookie)
            left = self._outstanding
            while left:
                left -= len(poll(1.0))
            after = now()
            samples.append((after - before) // self._outstanding)
            before = after
        told: list[object] = []
        self._endpoint.submit_message(b"", told.append)
        while not told:
            poll(1.0)
        return samples

    def close(self) -> None:
        """See `Near`."""
        self._endpoint.abandon()


class CoreFar:
    """A handler in C."""

    def __init__(self, port: Port, tracer: Tracer | None) -> None:
        self._client = _Echo()
        self._engine, self._endpoint = _engine(port, self._client, tracer)

    def block(self, count: int) -> None:
        """See `Far`."""
        del count
        client, poll = self._client, self._engine.poll
        until = client.count + 1
        while client.count < until:
            poll(1.0)
        self._endpoint.notify()

    def close(self) -> None:
        """See `Near`."""
        self._endpoint.abandon()


def _engine(port: Port, client: Client, tracer: Tracer | None) -> tuple[Engine, Endpoint]:
    engine = Engine(64, _QUOTAS, handler=ffi.addressof(lib, "idc_handle_echo"), messages=4)
    endpoint = engine.endpoint(cast("SharedPort", port), client)
    if tracer is not None:
        endpoint.trace = tracer.endpoint("echo")
    _connect(endpoint)
    return engine, endpoint


def _connect(endpoint: Endpoint) -> None:
    while endpoint.state.value != "connected":
        endpoint.pump(0.1)
