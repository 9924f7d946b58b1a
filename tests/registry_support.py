"""A registry in the test's own process: domains meet it through queues, and nothing is on disk."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from host.registry import tree
from host.registry.desk import Desk
from host.registry.links import SeatLink
from idc.registry import Registry
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.registry.tree import Limits


@dataclass
class Bench:
    """A registry and domains.

    Attributes:
        desk: the registry's logic.
        writable: False makes every write to the disk that is not there fail.
    """

    desk: Desk
    writable: bool = True
    links: dict[str, SeatLink] = field(default_factory=dict)
    registries: list[Registry] = field(default_factory=list)

    def join(self, name: str) -> Registry:
        """A domain of that name; "host" is the host."""
        here, there = meeting()
        if name != "host":
            self.desk.admit(name, name.encode().ljust(16, b"."))
        link = SeatLink(there, self.desk, name)
        self.links[name] = link
        registry = Registry(here)
        endpoint, pump = registry.endpoint, registry.endpoint.pump

        def both(timeout: float = 0.0) -> bool:
            busy = self.turn()
            return pump(0.0 if busy else min(timeout, 0.002)) or busy

        endpoint.pump = both  # type: ignore[method-assign]
        self.registries.append(registry)
        return registry

    def turn(self) -> bool:
        """Let the registry do what is due."""
        busy = self.desk.work()
        for link in self.links.values():
            busy |= link.pump()
        batch = self.desk.batch()
        if batch is not None:
            if self.writable:
                self.desk.written(batch)
            else:
                self.desk.failed(batch, "no space left on device")
        return self.desk.tell() or busy or batch is not None

    def settle(self) -> None:
        """Until nothing is due at any end."""
        while any([self.turn(), *(registry.pump(0.0) for registry in self.registries)]):
            pass


@contextmanager
def bench(limits: Limits | None = None) -> Iterator[Bench]:
    """A registry with an empty tree."""
    here = Bench(Desk(tree.empty(), limits))
    yield here
    for registry in here.registries:
        registry.close()
    for link in here.links.values():
        link.close()
