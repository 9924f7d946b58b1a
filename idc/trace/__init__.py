"""Tracing: any domain logs events into a ring, another writes them to its file system; see docs/trace.md.

    with open_tracer("ivshmem:link/trace", lossless=False) as tracer:
        tracer.instant("cache miss", b"page 12")
        endpoint.trace = tracer.endpoint("echo")
"""

from __future__ import annotations

from idc.trace.events import Kind, TraceEvent, Type
from idc.trace.hook import EndpointTrace
from idc.trace.open import file_tracer, open_tracer
from idc.trace.ring import RingSink
from idc.trace.store import FileSink, StoreWriter
from idc.trace.tracer import Sink, Tracer

__all__ = ["EndpointTrace", "FileSink", "Kind", "RingSink", "Sink", "StoreWriter", "TraceEvent", "Tracer", "Type",
           "file_tracer", "open_tracer"]
