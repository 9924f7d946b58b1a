"""The data pump: queues of a device, whose data C moves in threads that hold no interpreter. See docs/pump.md."""

from idc.pump.place import Place, places
from idc.pump.queue import Counters, Queue, Shape

__all__ = ["Counters", "Place", "Queue", "Shape", "places"]
