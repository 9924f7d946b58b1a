"""What a controller needs of whoever has the domains: regions made and plugged, and taken out again.

`ServicePlugger` is for domains that are host processes, which join by themselves; `testbed.devices` plugs VMs.
Depends on host.region.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from host import control_region
from host.errors import RegionError, ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from host.region import RegionService, RegionSpec


class Plugger(Protocol):
    """All of it may take as long as a VM takes to let a device in or out."""

    def domains(self) -> Sequence[str]:
        """Names of the domains that have a control region, and so can have devices."""

    def plug(self, spec: RegionSpec) -> None:
        """Make a region and plug it into its members. Raises HostError or a testbed's error, with nothing left."""

    def unplug(self, name: str, *, force: bool = False) -> tuple[str, ...]:
        """Take the region out of its members and drop it. Nothing happens for one that there is not.

        By force, members that do not let go are returned: they keep a mapping of memory that nobody else has. Raises
        HostError or a testbed's error if a member does not let go otherwise; it can be called again.
        """


class ServicePlugger:
    """For host processes."""

    def __init__(self, service: RegionService) -> None:
        self._service = service

    def domains(self) -> Sequence[str]:
        """See `Plugger`."""
        return [name.removeprefix(control_region.PREFIX) for name in self._service.regions()
                if name.startswith(control_region.PREFIX)]

    def plug(self, spec: RegionSpec) -> None:
        """See `Plugger`."""
        self._service.create(spec)

    def unplug(self, name: str, *, force: bool = False) -> tuple[str, ...]:
        """See `Plugger`."""
        del force  # nobody is asked: a process keeps the mapping that it has
        try:
            self._service.drop(name)
        except ServerError:
            raise
        except RegionError:
            if name in self._service.regions():
                raise
        return ()
