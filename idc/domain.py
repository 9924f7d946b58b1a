"""A domain's own view: which services it offers and uses. Where they are is configuration, never the client's business.

    echo = Service("echo")                                  # declaration, shared by both sides

    domain = Domain.here()                                  # back end
    domain.serve(echo, lambda parameters: parameters)
    domain.run()

    echo_back = Domain.here().connect(echo)                 # front end
    echo_back.transact(b"hello")

`IDC_SERVICES` holds NAME=ADDRESS pairs, separated by blanks; see `idc.transport.address`. Depends on idc.endpoint and
idc.transport.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from idc.endpoint import Client, Endpoint, Quotas, Resources
from idc.endpoint.blocking import NAP, Caller
from idc.endpoint.stream import Stream
from idc.errors import MisuseError
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from idc.endpoint import IncomingTransaction
    from idc.remote import Remote

#: Where `Domain.here` looks.
VARIABLE: Final = "IDC_SERVICES"


@dataclass(frozen=True)
class Service:
    """What both sides of a connection agree on beforehand.

    Attributes:
        name: in the configuration of either domain.
        quotas: what each side accepts of the other.
        outstanding: own transactions, and own messages, at a time.
    """

    name: str
    quotas: Quotas = field(default_factory=Quotas)
    outstanding: int = 16

    def resources(self, remote: Remote | None = None) -> Resources:
        """For one endpoint of it; `remote` is what it needs for remote buffers, if it has any."""
        return Resources(self.quotas, requests=self.outstanding, messages=self.outstanding, remote=remote)


class _Server(Client):
    """Answers each transaction with what a function makes of its parameters."""

    def __init__(self, handler: Callable[[bytes], bytes]) -> None:
        self._handler = handler

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(self._handler(transaction.parameters))


class Domain:
    """This process or VM as one party of inter-domain communication.

    Args:
        places: address of each service by name.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._endpoints: list[Endpoint] = []
        self._stopped = False

    @classmethod
    def here(cls) -> Self:
        """As the environment says. Raises MisuseError for a variable that is no list of NAME=ADDRESS."""
        places = {}
        for pair in os.environ.get(VARIABLE, "").split():
            name, equals, address = pair.partition("=")
            if not equals or not name or not address:
                raise MisuseError(f"{VARIABLE}: {pair!r} is not NAME=ADDRESS")
            places[name] = address
        return cls(places)

    def endpoint(self, service: Service, client: Client, resources: Resources | None = None) -> Endpoint:
        """An endpoint of the service, which `run` drives.

        Raises:
            MisuseError: this domain's configuration has no such service.
            OSError, IdcError: what its address names cannot be opened.
        """
        endpoint = Endpoint(open_port(self.place(service)), client, resources or service.resources(), service.name)
        self._endpoints.append(endpoint)
        return endpoint

    def serve(self, service: Service, handler: Callable[[bytes], bytes]) -> Endpoint:
        """Answer the service's transactions with what `handler` returns; what it raises, the submitter is told."""
        return self.endpoint(service, _Server(handler))

    def connect(self, service: Service, remote: Remote | None = None) -> Caller:
        """The blocking face for the service; its first call waits for the connection."""
        return Caller(open_port(self.place(service)), service.resources(remote), name=service.name)

    def stream(self, service: Service) -> Stream:
        """The socket-like face for the service."""
        return Stream(open_port(self.place(service)), service.resources())

    def place(self, service: Service) -> str:
        """Where this domain finds the service. Raises MisuseError."""
        try:
            return self._places[service.name]
        except KeyError:
            known = ", ".join(sorted(self._places)) or "none"
            raise MisuseError(f"service {service.name!r} has no address here (there are: {known}); set {VARIABLE}, or "
                              "give Domain its places") from None

    def run(self) -> None:
        """Drive the endpoints until `stop`, or until all of them are destroyed."""
        self._stopped = False
        while not self._stopped and (alive := [e for e in self._endpoints if e.state.value != "destroyed"]):
            if len(alive) == 1:
                alive[0].pump(NAP)  # waits in the core, which polls first where that pays
            else:
                drive(alive)
        self._endpoints = [e for e in self._endpoints if e.state.value != "destroyed"]

    def stop(self) -> None:
        """Make `run` return; for a handler."""
        self._stopped = True


def drive(endpoints: Sequence[Endpoint], timeout: float = NAP) -> None:
    """Let each do what is due; if nothing was, sleep until one has more to do, up to `timeout` seconds."""
    busy = [endpoint.pump(0.0) for endpoint in endpoints]
    if any(busy):
        return
    poller, naps = select.poll(), [timeout]
    for endpoint in endpoints:
        if not endpoint.arm():
            return
        poller.register(endpoint.fileno(), select.POLLIN)
        if (patience := endpoint.patience) is not None:
            naps.append(patience)
    poller.poll(min(naps) * 1000)
