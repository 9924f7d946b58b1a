"""Attaches devices to domains and detaches them: the only one who plugs, and who writes what domains believe."""

from host.devices.controller import Controller, DeviceError, Seen
from host.devices.plugger import Plugger, ServicePlugger

__all__ = ["Controller", "DeviceError", "Plugger", "Seen", "ServicePlugger"]
