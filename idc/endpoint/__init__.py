"""Endpoints: connections between two domains, with messages and transactions. docs/idc.md has design and rules."""

from idc.endpoint.endpoint import Client, Endpoint, Resources, Status
from idc.endpoint.frames import Quotas
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Completion, Result
from idc.endpoint.session import IncomingMessage, IncomingTransaction

__all__ = ["Client", "Completion", "Endpoint", "IncomingMessage", "IncomingTransaction", "Quotas", "Resources",
           "Result", "State", "Status"]
