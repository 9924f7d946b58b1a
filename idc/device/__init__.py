"""Device classes: drivers at two ends, and the life cycle that brings them together. See docs/devices.md."""

from idc.device.classes import DeviceClass, find, load
from idc.device.driver import BackDriver, Device, Driver, FrontDriver, SocketFront
from idc.device.options import Option
from idc.device.states import Role, State

__all__ = ["BackDriver", "Device", "DeviceClass", "Driver", "FrontDriver", "Option", "Role", "SocketFront", "State",
           "find", "load"]
