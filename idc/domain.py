"""A domain's own view: which services it offers and uses. Where they are is configuration, never the client's business.

    echo = Service("echo")                                  # declaration, shared by both sides

    domain = Domain.here()                                  # back end
    domain.serve(echo, lambda parameters: parameters)
    domain.run()

    echo_back = Domain.here().connect(echo)                 # front end
    echo_back.transact(b"hello")

`IDC_SERVICES` holds NAME=ADDRESS pairs, separated by blanks; see `idc.transport.address`. `IDC_CONTROL` is the address
of the control link to the broker, where there is one, and `IDC_REGISTRY` that of the link to the registry, in which
services are looked for that IDC_SERVICES does not name.

    domain.publish(echo)                                    # back end, after serve: its front end may find it

    domain.share()                                          # sets aside what others may reach of this domain
    endpoint = domain.endpoint(echo, client, domain.resources(echo))
    buffer = domain.region(echo).pool.allocate(4096)        # pages that can be reached without a copy in between
    reference = endpoint.register(buffer, Access.READ).reference()

Depends on idc.endpoint and idc.transport, and loads idc.remote and idc.registry for a program that uses them: to import
them is a third of the time in which a program starts in an emulated guest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from idc.endpoint import Client, Endpoint, Quotas, Resources
from idc.endpoint.blocking import NAP, Caller
from idc.endpoint.stream import Stream
from idc.endpoint.together import drive
from idc.errors import MisuseError
from idc.transport.address import CONTROL_VARIABLE, REGISTRY_VARIABLE, open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from idc.endpoint import IncomingTransaction
    from idc.region import Region
    from idc.registry import Registry
    from idc.remote import Exports, Regions, Remote
    from idc.remote.control import Control
    from idc.transport.base import Port
    from idc.transport.shared import SharedPort

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
        messages = self.outstanding if self.quotas.messages else 0  # of which the other side accepts as few
        return Resources(self.quotas, requests=self.outstanding, messages=messages, remote=remote)


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
        control: address of the control link; empty where there is no broker.
        registry: address of the link to the registry; empty where there is none.
    """

    def __init__(self, places: Mapping[str, str], control: str = "", registry: str = "") -> None:
        self._met: list[Region] = []
        self._regions: Regions | None = None
        self._places = dict(places)
        self._control_address = control
        self._control: Control | None = None
        self._registry_address = registry
        self._registry: Registry | None = None
        self._exports: Exports | None = None
        self._endpoints: list[Endpoint] = []
        self._mapped: dict[str, Region] = {}
        self._ports: dict[str, SharedPort] = {}
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
        return cls(places, os.environ.get(CONTROL_VARIABLE, ""), os.environ.get(REGISTRY_VARIABLE, ""))

    def share(self, count: int = 16, leases: int = 64, forwards: int = 16, *, timeout: float = 10.0) -> Exports:
        """Make the table of what others may reach of this domain; once, before the first endpoint that uses it.

        With a control link it waits up to `timeout` seconds for the broker to say who this domain is, and the broker
        copies from then on where that takes a broker. Other arguments as of `idc.remote.Exports`.

        Raises:
            MisuseError: called before.
            TimedOutError: the broker did not say.
            OSError, IdcError: the control link cannot be opened.
        """
        from idc.remote import Exports
        from idc.remote.control import Control

        if self._exports is not None:
            raise MisuseError("this domain has a table of exports already")
        if not self._control_address:
            self._exports = Exports(count, leases, forwards, regions=self.regions)
            return self._exports
        control = Control(open_port(self._control_address))
        try:
            who = control.identify(timeout)
        except BaseException:
            control.close()
            raise
        self._control = control
        self._exports = Exports(count, leases, forwards, regions=self.regions, domain=who.domain,
                                incarnation=who.incarnation)
        control.serve(self._exports)
        return self._exports

    @property
    def regions(self) -> Regions:
        """Those that its endpoints meet their peers in."""
        if self._regions is None:
            from idc.remote import Regions

            self._regions = Regions(*self._met)
        return self._regions

    @property
    def control(self) -> Control | None:
        """The control link, if `share` has opened one. `run` drives it."""
        return self._control

    def resources(self, service: Service) -> Resources:
        """For an endpoint of the service with remote buffers. Raises MisuseError before `share`."""
        from idc.remote import Remote

        if self._exports is None:
            raise MisuseError("call share() first: an endpoint with remote buffers needs a table of exports")
        return service.resources(Remote(self._exports, broker=self._control))

    def region(self, service: Service) -> Region:
        """The region in which this domain meets the service's other side. Raises MisuseError if there is none."""
        if service.name not in self._mapped:
            raise MisuseError(f"service {service.name!r} has no endpoint here, or none that meets its peer in a "
                              f"region ({self._places.get(service.name, 'its address is looked for in the registry')})")
        return self._mapped[service.name]

    def endpoint(self, service: Service, client: Client, resources: Resources | None = None) -> Endpoint:
        """An endpoint of the service, which `run` drives.

        Raises:
            MisuseError: this domain's configuration has no such service.
            OSError, IdcError: what its address names cannot be opened.
        """
        endpoint = Endpoint(self._open(service), client, resources or service.resources(), service.name)
        self._endpoints.append(endpoint)
        return endpoint

    def _open(self, service: Service) -> Port:
        from idc.transport.shared import SharedPort

        port = open_port(self.place(service))
        if isinstance(port, SharedPort):
            self._mapped[service.name] = port.region
            self._ports[service.name] = port
            self._met.append(port.region)
            if self._regions is not None:
                self._regions.add(port.region)
        return port

    def serve(self, service: Service, handler: Callable[[bytes], bytes]) -> Endpoint:
        """Answer the service's transactions with what `handler` returns; what it raises, the submitter is told."""
        return self.endpoint(service, _Server(handler))

    def connect(self, service: Service, remote: Remote | None = None) -> Caller:
        """The blocking face for the service; its first call waits for the connection.

        After `share` it has remote buffers, and drives the control link whenever it waits.
        """
        shared = remote is None and self._exports is not None
        resources = self.resources(service) if shared else service.resources(remote)
        port = self._open(service)
        return Caller(port, resources, name=service.name, beside=self._links)

    def stream(self, service: Service) -> Stream:
        """The socket-like face for the service."""
        return Stream(open_port(self.place(service)), service.resources())

    @property
    def registry(self) -> Registry:
        """The link to the registry, opened when it is first used; `run` drives it from then on.

        Raises:
            MisuseError: this domain has none.
            OSError, IdcError: it cannot be opened. In a VM one process has it, the one that has the control region.
        """
        if self._registry is None:
            from idc.registry import Registry

            if not self._registry_address:
                raise MisuseError(f"this domain has no link to a registry; set {REGISTRY_VARIABLE}")
            self._registry = Registry(open_port(self._registry_address))
        return self._registry

    def publish(self, service: Service) -> None:
        """Let the domain at the other end of a service's channel find it in the registry, while this domain is there.

        Raises:
            MisuseError: the service has no endpoint here, no region, or there is no registry.
            RegistryError, TimedOutError: the registry refuses, or is not there.
        """
        from idc.registry import services

        self.region(service)
        services.publish(self.registry, service.name, self._ports[service.name])

    def place(self, service: Service, timeout: float = 10.0) -> str:
        """Where this domain finds the service: as configured, else in the registry, for which it waits up to `timeout`
        seconds. Raises MisuseError, TimedOutError, RegistryError.
        """
        try:
            return self._places[service.name]
        except KeyError:
            if self._registry_address:
                from idc.registry import services

                return services.find(self.registry, service.name, self._registry_address, timeout)
            known = ", ".join(sorted(self._places)) or "none"
            raise MisuseError(f"service {service.name!r} has no address here (there are: {known}); set {VARIABLE}, or "
                              "give Domain its places") from None

    def run(self) -> None:
        """Drive the endpoints until `stop`, or until all of them are destroyed."""
        self._stopped = False
        while not self._stopped and (alive := [e for e in self._endpoints if e.state.value != "destroyed"]):
            drive([*alive, *self._links], NAP)
        self._endpoints = [e for e in self._endpoints if e.state.value != "destroyed"]

    @property
    def _links(self) -> list[Endpoint]:
        """What is driven besides the services."""
        return [link.endpoint for link in (self._control, self._registry) if link is not None]

    def stop(self) -> None:
        """Make `run` return; for a handler."""
        self._stopped = True

    def close(self) -> None:
        """Destroy its endpoints, whatever their clients have not completed, and the links to broker and registry.

        Idempotent.
        """
        for endpoint in self._endpoints:
            endpoint.abandon()
        self._endpoints.clear()
        if self._control is not None:
            self._control.close()
        if self._registry is not None:
            self._registry.close()
