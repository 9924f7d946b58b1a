"""Errors of the host side, named by what failed. May depend on nothing.

HostError
  +-- HolderError           the fd holder refused or is gone
  +-- ServerError           the region server refused, did not start, or is gone
  +-- RegionError           a region that cannot be made as asked
  +-- ProtocolError         the other side of an ivshmem connection broke the protocol
  +-- PeerError             a peer or vector that does not exist, or a connection that ended
  +-- SocketPathError       a Unix socket path that does not fit, or that is taken
"""

from __future__ import annotations


class HostError(Exception):
    """Base of everything the host side raises on purpose."""


class HolderError(HostError):
    """The fd holder refused a request, or does not answer."""


class ServerError(HostError):
    """The region server refused a request, did not start, or does not answer."""


class RegionError(HostError):
    """A region cannot be made, or has no such member."""


class ProtocolError(HostError):
    """What came over an ivshmem connection is not the protocol."""


class PeerError(HostError):
    """An ivshmem peer or vector does not exist, or the connection to the server ended."""


class SocketPathError(HostError):
    """A path cannot be bound as a Unix socket."""
