"""The device class `net`: a network interface in each of two domains, joined by shared memory. See docs/net.md."""

from idc.net.device import Net

__all__ = ["Net"]
