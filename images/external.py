"""Builds a user's own kernel module for the kernel of an image, with Debian's headers and compiler, not the host's.

    module = images.build_module(Path("docs/module-example"), image)       # -> .../idc_example.ko

Two parts, cached like those of an image: `kbuild`, the tree with headers, compiler and make, once for each kernel; and
`module`, for each state of the sources. May import all of `images` but `build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from images import archive, sandbox
from images.apt import Apt
from images.cache import Cache, default_directory
from images.errors import ImageError, ProgramError
from images.runner import Runner
from images.sources import hash_of
from images.spec import BUILDER_VERSION, DEFAULT, ImageSpec
from images.stages import Workshop

if TYPE_CHECKING:
    from pathlib import Path

    from images.errors import Progress
    from images.image import Image

#: What Debian's headers do not ask for, because every Debian system has it. mawk: scripts call it awk.
TOOLS = ("make", "coreutils", "dash", "findutils", "grep", "mawk", "sed")
#: Left by a build in the sources themselves; not sources.
_PRODUCTS = (".o", ".ko", ".mod", ".mod.c", ".cmd", ".order", ".symvers")
_MOST_BYTES = 64 << 20


def build_module(directory: Path, image: Image, *, spec: ImageSpec = DEFAULT, progress: Progress = lambda _: None,
                 mirrors: tuple[str, ...] = (), cache: Path | None = None) -> Path:
    """Build the out-of-tree module in `directory` (a Kbuild or Makefile with obj-m) for the kernel of `image`.

    Returns the .ko file in the cache; it keeps the module's name. Nothing is written to `directory`. The first call for
    a kernel downloads its headers (10 MB, and a compiler if the cache has none). `mirrors` as for `ensure`. Raises
    ImageError: no module there, the mirror does not have this kernel's headers any more, or the compiler's own words.
    """
    sources = module_sources(directory)
    store = Cache(cache or default_directory())
    release = str(image.manifest["kernel_release"])
    version = str(image.manifest["packages"]["kernel"][1])
    headers = (f"linux-headers-{release}={version}", *TOOLS)
    kbuild_key = hash_of(BUILDER_VERSION, spec.suite, spec.arch, headers)
    kbuild = store.stage("kbuild", kbuild_key, ".tar")
    made = store.stage("module", hash_of(kbuild_key, sources, sandbox.MODULE))
    if not made.exists():
        with store.locked(progress) as lock:
            shop = Workshop(spec, store, Runner(lock), progress)
            try:
                if not kbuild.exists():
                    _make_kbuild(shop, headers, mirrors, kbuild)
                if not made.exists():
                    shop.module(kbuild, sources, release, directory.name, made)
            except BaseException:
                shop.runner.cancel()
                raise
    modules = sorted(made.glob("*.ko"))
    if len(modules) != 1:
        names = ", ".join(path.name for path in modules) or "none"
        raise ImageError(f"{directory} must make one module, but made {names}; see obj-m in its Kbuild")
    return modules[0]


def module_sources(directory: Path) -> list[archive.Entry]:
    """All files of a module's directory but hidden ones and what an earlier build left. Raises ImageError."""
    if not any((directory / name).is_file() for name in ("Kbuild", "Makefile")):
        raise ImageError(f"{directory} has neither Kbuild nor Makefile; a start is docs/module-example")
    found = [path for path in sorted(directory.rglob("*"))
             if path.is_file() and not path.name.endswith(_PRODUCTS)
             and not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    size = sum(path.stat().st_size for path in found)
    if size > _MOST_BYTES:
        raise ImageError(f"{directory} holds {size >> 20} MB of files, which is more than the sources of a module; "
                         "give it a directory of its own")
    return [archive.file(f"build/{path.relative_to(directory)}", path.read_bytes()) for path in found]


def _make_kbuild(shop: Workshop, headers: tuple[str, ...], mirrors: tuple[str, ...], path: Path) -> None:
    with shop.making("headers", f"fetching {headers[0].partition('=')[0]}"):
        apt = Apt(shop.spec, shop.cache, shop.runner, shop.log("headers"))
        apt.configure(mirrors)
        apt.update()
        try:
            apt.download(headers, essential=False)
        except ProgramError as error:
            raise ImageError(f"{error}\n  try: testbed image build --refresh (a mirror keeps the headers of its newest "
                             f"kernel only; this image wants {headers[0]})") from error
    shop.kbuild(apt, headers, path)
