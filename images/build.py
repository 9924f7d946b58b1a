"""Builds what is missing of an image, in parallel where parts do not need each other. May import all of `images`."""

from __future__ import annotations

import errno
import json
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from images.cache import Cache, default_directory, touch
from images.errors import ROOM, ImageError
from images.image import MANIFEST, Image, read_image
from images.runner import Runner
from images.spec import DEFAULT, ImageSpec
from images.stages import Keys, Sources, Versions, Workshop, make_keys, packages_key

if TYPE_CHECKING:
    from pathlib import Path

    from images.errors import Progress


#: What a cache takes up after the first build (measured: 990 MiB), and some more.
BUILD_BYTES = 1200 << 20


def ensure(
    spec: ImageSpec = DEFAULT,
    *,
    progress: Progress = lambda _: None,
    mirrors: tuple[str, ...] = (),
    refresh: bool = False,
    cache: Path | None = None,
) -> Image:
    """The image for `spec` and for the sources as they are now; built if the cache does not have it.

    Nothing runs and nothing is locked when it is there. `mirrors` are URLs of Debian mirrors, by default those of the
    host's apt; `refresh` asks them for newer package versions. `progress` gets one line for each step. Safe to
    interrupt or kill at any moment: the next call goes on with what is complete. Raises ImageError.
    """
    store = Cache(cache or default_directory())
    sources = Sources.read()
    resolved = store.stage("packages", packages_key(spec, mirrors), ".json")
    if not refresh and (found := _find(spec, store, sources, resolved)):
        return found
    with store.locked(progress) as lock:
        # whoever held the lock may have built it
        if not refresh and (found := _find(spec, store, sources, resolved)):
            return found
        runner = Runner(lock)
        try:
            return _build(spec, store, sources, resolved, mirrors, refresh, Workshop(spec, store, runner, progress))
        except OSError as error:  # of our own file work, as when the disk fills up; programs have ProgramError
            runner.cancel()
            raise ImageError(f"building the image failed: {error.strerror}: {error.filename or store.root}"
                             + (f"; {ROOM}" if error.errno == errno.ENOSPC else "")) from error
        except BaseException:
            runner.cancel()
            raise


def _find(spec: ImageSpec, store: Cache, sources: Sources, resolved: Path) -> Image | None:
    if not resolved.exists():
        return None
    keys = make_keys(spec, _read_versions(resolved), sources)
    directory = store.images / f"{spec.name}-{keys.image}"
    if not (directory / MANIFEST).exists():
        return None
    touch(directory / MANIFEST)
    return read_image(directory)


def _read_versions(resolved: Path) -> Versions:
    return Versions.from_json(json.loads(resolved.read_text()))


def _part_paths(store: Cache, keys: Keys) -> dict[str, Path]:
    return {"base": store.stage("base", keys.base, ".tar"), "dev": store.stage("dev", keys.dev, ".tar"),
            "kernel": store.stage("kernel", keys.kernel), "core": store.stage("core", keys.core, ".tar")}


def _build(spec: ImageSpec, store: Cache, sources: Sources, resolved: Path, mirrors: tuple[str, ...], refresh: bool,
           shop: Workshop) -> Image:
    versions = _read_versions(resolved) if resolved.exists() and not refresh else None
    if versions is not None:
        parts = _part_paths(store, make_keys(spec, versions, sources))
        if not _packages_suffice(parts):
            versions = None
    if versions is None:
        store.require_room(BUILD_BYTES)
        # Lists are fetched whenever packages are needed: a mirror keeps only the latest version of each.
        apt, versions = shop.packages(mirrors, resolved)
        parts = _part_paths(store, make_keys(spec, versions, sources))
        if not _packages_suffice(parts):
            kernel_package, busybox = shop.download(apt, versions)

    keys = make_keys(spec, versions, sources)

    def compile_core() -> None:
        if not parts["core"].exists():
            if not parts["dev"].exists():
                shop.dev(apt, parts["dev"])
            shop.core(sources, parts["dev"], parts["core"])

    with ThreadPoolExecutor() as pool:
        work: list[Future[None]] = [pool.submit(compile_core)]
        if not parts["base"].exists():
            work.append(pool.submit(shop.base, apt, parts["base"]))
        if not parts["kernel"].exists():
            work.append(pool.submit(shop.kernel, kernel_package, busybox, parts["kernel"]))
        try:
            done, _ = wait(work, return_when=FIRST_EXCEPTION)
        except BaseException:
            shop.runner.cancel()
            raise
        failed = [future for future in done if future.exception()]
        if failed:
            shop.runner.cancel()
            failed[0].result()
    directory = store.images / f"{spec.name}-{keys.image}"
    if not (directory / MANIFEST).exists():  # it may be there: the mirror had nothing newer, or the list was lost
        shop.image(keys, versions, sources, parts | {"packages": resolved}, directory)
    return read_image(directory)


def _packages_suffice(parts: dict[str, Path]) -> bool:
    """Whether nothing has to be made from packages any more."""
    return parts["base"].exists() and parts["kernel"].exists() and (parts["core"].exists() or parts["dev"].exists())
