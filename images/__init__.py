"""Builds the guest kernel and root file system from Debian packages. Stands alone.

    image = images.ensure()          # builds it if it is not in the cache
    image.kernel, image.initrd, image.rootfs, image.kernel_arguments
"""

from __future__ import annotations

from images.build import ensure
from images.cache import default_directory
from images.errors import ImageError, MissingProgramError, ProgramError
from images.external import build_module
from images.image import Image, list_images, prune, show
from images.spec import DEFAULT, ImageSpec

__all__ = [
    "DEFAULT",
    "Image",
    "ImageError",
    "ImageSpec",
    "MissingProgramError",
    "ProgramError",
    "build_module",
    "default_directory",
    "ensure",
    "list_images",
    "prune",
    "show",
]
