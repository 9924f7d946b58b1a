"""The registry as a domain sees it: a tree of keys with watches, transactions and permissions. See docs/registry.md."""

from idc.registry.client import VARIABLE, Event, Registry, Watch
from idc.registry.frames import Fault, Permissions, Permit, home
from idc.registry.transaction import Transaction

__all__ = ["VARIABLE", "Event", "Fault", "Permissions", "Permit", "Registry", "Transaction", "Watch", "home"]
