"""Memory of regions, mapped here only while copies need it: at most so many at a time, those used longest ago go first.

A mapping holds one descriptor of its own. Depends on host.errors and the standard library.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from typing import TYPE_CHECKING

from host.errors import RegionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID


class Custody:
    """Mappings by region.

    Args:
        opener: gives a descriptor of a region's memory, which is closed here. Raises HostError.
        most: mapped at a time, at least 2: a copy takes two.

    Attributes:
        opened: how often memory was opened so far.
    """

    def __init__(self, opener: Callable[[UUID], int], most: int = 64) -> None:
        self.most = max(most, 2)
        self.opened = 0
        self._opener = opener
        self._maps: OrderedDict[UUID, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        """Mapped now; so many descriptors are open for it."""
        return len(self._maps)

    def memory(self, region: UUID) -> mmap.mmap:
        """All of a region, readable and writable; valid until two others have been asked for. Raises HostError."""
        mapping = self._maps.get(region)
        if mapping is None:
            while len(self._maps) >= self.most:
                self._maps.popitem(last=False)[1].close()
            fd = self._opener(region)
            try:
                mapping = self._maps[region] = mmap.mmap(fd, os.fstat(fd).st_size)
            except (OSError, ValueError) as error:
                raise RegionError(f"memory of region {region} cannot be mapped: {error}") from error
            finally:
                os.close(fd)
            self.opened += 1
        self._maps.move_to_end(region)
        return mapping

    def drop(self, region: UUID) -> None:
        """Unmap it, if it is mapped."""
        mapping = self._maps.pop(region, None)
        if mapping is not None:
            mapping.close()

    def keep_only(self, regions: set[UUID]) -> None:
        """Unmap all others."""
        for region in self._maps.keys() - regions:
            self.drop(region)
