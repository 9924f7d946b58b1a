"""Keys of a device in the registry. No I/O. Depends on idc.registry.frames.

A device of class C with number N, whose front end is in domain F and whose back end in B:

    /domain/F/device/C/N/           owned by F, B may read
        id                          changes whenever the device is attached anew
        backend                     B
        link                        REGION/CHANNEL: where the ends meet; whose word it is: the host's
        options/NAME                as text
        close                       why, once the device is to be detached
        state                       a line for each of the last steps: state, since, why; ephemeral, written by F
    /domain/B/backend/C/F/N/        owned by B, F may read; the same with `frontend` F
    /domain/D/link/REGION           by the host: this link of D's stays plugged, so keep it mapped
    /device/C/F/N                   the host's own record, which no domain reads or writes: JSON

Of all this a domain believes only what the host wrote into its own home, and of its peer only `state`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from idc.device.states import Role
from idc.registry.frames import home

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where the host's own records are.
RECORDS: Final = "/device"


class Name(NamedTuple):
    """A device: there is at most one of a class, front end and number."""

    kind: str
    front: str
    number: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.number} of {self.front}"

    @property
    def record(self) -> str:
        """The host's own record."""
        return f"{RECORDS}/{self.kind}/{self.front}/{self.number}"

    def front_path(self) -> str:
        """The front end's keys."""
        return f"{home(self.front)}/device/{self.kind}/{self.number}"

    def back_path(self, back: str) -> str:
        """The back end's keys."""
        return f"{home(back)}/backend/{self.kind}/{self.front}/{self.number}"

    def path(self, role: Role, back: str) -> str:
        """The keys of one end."""
        return self.front_path() if role is Role.FRONT else self.back_path(back)


def below(domain: str, role: Role) -> str:
    """Where a domain's ends of that role are."""
    return f"{home(domain)}/{'device' if role is Role.FRONT else 'backend'}"


def links(domain: str) -> str:
    """Where a domain is told of links that stay plugged."""
    return f"{home(domain)}/link"


def depth(role: Role) -> int:
    """How many names lead from there to an end."""
    return 2 if role is Role.FRONT else 3


def name_of(role: Role, domain: str, parts: tuple[str, ...]) -> Name:
    """The device whose end is so many names below `below`."""
    if role is Role.FRONT:
        kind, number = parts
        return Name(kind, domain, number)
    kind, front, number = parts
    return Name(kind, front, number)


def roles() -> Iterator[Role]:
    """Both."""
    yield Role.FRONT
    yield Role.BACK

