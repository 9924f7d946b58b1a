"""Local buffers of any type, copies between them that are counted, and the types that ship. See docs/buffers.md."""

from idc.buffers.cow import COPY_ON_WRITE, CowView
from idc.buffers.files import FILE_RANGE, file_range
from idc.buffers.hidden import HIDDEN_PAGES, Hidden, HiddenStore, MemfdStore
from idc.buffers.local import BufferType, CopyCounter, LocalBuffer, MappedType
from idc.buffers.memory import PROCESS_MEMORY, process_memory, process_memory_like
from idc.buffers.pool import REGION_PAGES, PagePool, PeerPart
from idc.buffers.registry import Registry, Strategy, standard_registry

__all__ = [
    "COPY_ON_WRITE", "FILE_RANGE", "HIDDEN_PAGES", "PROCESS_MEMORY", "REGION_PAGES", "BufferType", "CopyCounter",
    "CowView", "Hidden", "HiddenStore", "LocalBuffer", "MappedType", "MemfdStore", "PagePool", "PeerPart", "Registry",
    "Strategy", "file_range", "process_memory", "process_memory_like", "standard_registry",
]
