"""What an image is made from: hashes, keys, modules, archives, package sources. Nothing runs, nothing is built."""

from __future__ import annotations

import dataclasses
import io
import lzma
import stat
import struct
import tarfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from images import archive
from images.apt import Package, host_sources, mirror_sources, signed
from images.errors import ImageError
from images.kernel import unpack_bzimage
from images.modules import Module, closure, parse_modinfo
from images.sources import code_of, hash_of, package_entries, tree_entries
from images.spec import DEFAULT, ImageSpec
from images.stages import Keys, Sources, Versions, Workshop, make_keys, packages_key

VERSIONS = Versions(
    (Package("busybox-static", "1"), Package("python3", "3.11")), (Package("gcc", "12"),), Package("linux-image-6", "6")
)
SOURCES = Sources(
    (archive.file("idc/__init__.py", b""), archive.file("idc/core/ring.c", b"int x;"), archive.file("idc/a.py", b"1")),
    (archive.file("guest/agent.py", b"pass"),), (archive.file("etc/inittab", b""),), b"#!init",
)  # fmt: skip


def changed(*, spec: ImageSpec = DEFAULT, versions: Versions = VERSIONS, sources: Sources = SOURCES) -> set[str]:
    """Which keys differ from those of the unchanged inputs."""
    before, after = make_keys(DEFAULT, VERSIONS, SOURCES), make_keys(spec, versions, sources)
    names = [field.name for field in dataclasses.fields(Keys)]
    return {name for name in names if getattr(before, name) != getattr(after, name)}


def with_file(entries: tuple[archive.Entry, ...], path: str) -> tuple[archive.Entry, ...]:
    return tuple(archive.file(path, b"edited") if entry.path == path else entry for entry in entries)


class TestKeys:
    def test_same_inputs_same_keys(self) -> None:
        assert changed() == set()

    def test_editing_the_agent_rebuilds_only_the_last_layer(self) -> None:
        sources = dataclasses.replace(SOURCES, guest=with_file(SOURCES.guest, "guest/agent.py"))
        assert changed(sources=sources) == {"image"}

    def test_editing_python_of_idc_does_not_recompile_c(self) -> None:
        assert changed(sources=dataclasses.replace(SOURCES, idc=with_file(SOURCES.idc, "idc/a.py"))) == {"image"}

    def test_editing_c_recompiles(self) -> None:
        sources = dataclasses.replace(SOURCES, idc=with_file(SOURCES.idc, "idc/core/ring.c"))
        assert changed(sources=sources) == {"core", "image"}

    def test_init_is_an_input(self) -> None:
        assert changed(sources=dataclasses.replace(SOURCES, initramfs=b"x")) == {"image"}
        assert changed(sources=dataclasses.replace(SOURCES, tree=(archive.file("etc/inittab", b"other"),))) == {"image"}

    def test_a_new_version_in_the_root(self) -> None:
        versions = dataclasses.replace(VERSIONS, root=(Package("busybox-static", "1"), Package("python3", "3.11.1")))
        assert changed(versions=versions) == {"base", "image"}

    def test_a_new_compiler(self) -> None:
        assert changed(versions=dataclasses.replace(VERSIONS, dev=(Package("gcc", "13"),))) == {"dev", "core", "image"}

    def test_a_new_kernel(self) -> None:
        assert changed(versions=dataclasses.replace(VERSIONS, kernel=Package("k", "7"))) == {"kernel", "image"}

    def test_modules_and_compression(self) -> None:
        assert changed(spec=dataclasses.replace(DEFAULT, modules=("nbd",))) == {"kernel", "image"}
        assert changed(spec=dataclasses.replace(DEFAULT, compression="")) == {"image"}

    @pytest.mark.parametrize(("step", "parts"), [
        ("base", {"base", "image"}), ("dev", {"dev", "core", "image"}), ("kernel", {"kernel", "image"}),
        ("core", {"core", "image"}), ("image", {"image"}), ("_mmdebstrap", {"base", "dev", "core", "image"})])
    def test_the_code_that_makes_a_part_is_an_input(
        self, monkeypatch: pytest.MonkeyPatch, step: str, parts: set[str]
    ) -> None:
        before = make_keys(DEFAULT, VERSIONS, SOURCES)
        monkeypatch.setattr(Workshop, step, other_step)
        after = make_keys(DEFAULT, VERSIONS, SOURCES)
        assert {name for name in vars(before) if getattr(before, name) != getattr(after, name)} == parts

    def test_the_mirror_is_an_input_of_the_versions(self) -> None:
        assert packages_key(DEFAULT, ()) != packages_key(DEFAULT, ("http://mirror.example/debian",))

    def test_versions_survive_storing(self) -> None:
        assert Versions.from_json(VERSIONS.to_json()) == VERSIONS

    def test_no_busybox_is_an_error_that_says_so(self) -> None:
        with pytest.raises(ImageError, match="busybox-static"):
            make_keys(DEFAULT, dataclasses.replace(VERSIONS, root=()), SOURCES)


def other_step() -> str:
    """Does something else."""
    return "else"


class TestCode:
    def test_what_is_said_about_code_does_not_count_what_it_does_counts(self, tmp_path: Path) -> None:
        def code(text: str) -> str:
            path = tmp_path / f"m{len(list(tmp_path.iterdir()))}.py"
            path.write_text(text)
            loader = SourceFileLoader(path.stem, str(path))
            module = ModuleType(path.stem)
            module.__file__ = str(path)
            exec(loader.get_code(path.stem) or "", vars(module))
            return code_of(module)

        plain = code("def f(a):\n    return a + 1\n")
        assert plain == code('"""Doc."""\n\ndef f(a):  # why\n    """Doc."""\n    return (a\n            + 1)\n')
        assert plain != code("def f(a):\n    return a + 2\n")


class TestHash:
    def test_borders_between_parts_count(self) -> None:
        assert len({hash_of("ab", "c"), hash_of("a", "bc"), hash_of("abc"), hash_of(("ab", "c"))}) == 4

    def test_types_count(self) -> None:
        assert len({hash_of("1"), hash_of(1), hash_of(b"1")}) == 3

    def test_mode_counts(self) -> None:
        assert hash_of(archive.file("a", b"", 0o644)) != hash_of(archive.file("a", b"", 0o755))

    def test_what_has_no_stable_form_is_refused(self) -> None:
        with pytest.raises(TypeError, match="set"):
            hash_of({1, 2})


class TestSources:
    def test_generated_files_are_left_out(self, tmp_path: Path) -> None:
        for name in ("a.py", "_core.c", "_core.cpython-311.so", "__pycache__/a.py", "core/x.c", "notes.txt"):
            path = tmp_path / "idc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"#!x")
        entries = package_entries("idc", tmp_path)
        assert [entry.path for entry in entries] == ["idc/a.py", "idc/core/x.c"]
        assert all(stat.S_IMODE(entry.mode) == 0o644 for entry in entries)

    def test_a_package_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="nothing"):
            package_entries("nothing", tmp_path)

    def test_scripts_of_the_root_can_be_run(self) -> None:
        modes = {entry.path: stat.S_IMODE(entry.mode) for entry in tree_entries()}
        assert modes["usr/lib/idc-testbed/agent"] == 0o755
        assert modes["etc/inittab"] == 0o644


class TestModules:
    TREE: ClassVar = {
        "vfio_pci": Module(Path("vfio-pci.ko"), ("vfio_pci_core", "vfio")),
        "vfio_pci_core": Module(Path("vfio-pci-core.ko"), ("vfio",)),
        "vfio": Module(Path("vfio.ko"), ()),
        "erofs": Module(Path("erofs.ko"), (), ("crc32c", "gone")),
        "crc32c": Module(Path("crc32c.ko"), ()),
        "a": Module(Path("a.ko"), ("b",)),
        "b": Module(Path("b.ko"), ("a",)),
    }

    def test_dependencies_come_first_and_once(self) -> None:
        assert closure(["vfio-pci", "vfio"], self.TREE) == ["vfio", "vfio_pci_core", "vfio_pci"]

    def test_soft_dependencies_only_where_they_exist(self) -> None:
        assert closure(["erofs"], self.TREE) == ["crc32c", "erofs"]

    def test_builtin_is_left_out(self) -> None:
        assert closure(["vfio-pci"], self.TREE, ["vfio.ko"]) == ["vfio_pci_core", "vfio_pci"]

    def test_a_circle_ends(self) -> None:
        assert sorted(closure(["a"], self.TREE)) == ["a", "b"]

    def test_a_missing_module_names_who_needs_it(self) -> None:
        with pytest.raises(ImageError, match="no module gone, which top needs"):
            closure(["top"], {"top": Module(Path("top.ko"), ("gone",))})

    def test_modinfo(self) -> None:
        content = b"\x7fELF..license=GPL\0depends=vfio-pci-core,vfio\0softdep=pre: crc32c aes post: x\0retpoline=Y\0"
        assert parse_modinfo(content) == (("vfio_pci_core", "vfio"), ("crc32c", "aes"))
        assert parse_modinfo(b"..\0depends=\0name=a\0") == ((), ())


class TestArchives:
    def test_tar_has_links_modes_and_no_clock(self) -> None:
        entries = [archive.directory("d"), archive.file("d/x", b"#!/bin/sh\n"), archive.link("d/l", "x")]
        assert archive.make_tar(entries) == archive.make_tar(entries)
        with tarfile.open(fileobj=io.BytesIO(archive.make_tar(entries))) as opened:
            found = {member.name: member for member in opened}
        assert found["d/x"].mode == 0o755
        assert found["d/l"].linkname == "x"
        assert {(member.uid, member.gid, member.mtime) for member in found.values()} == {(0, 0, 0)}

    def test_tar_refuses_device_nodes(self) -> None:
        with pytest.raises(ValueError, match="dev/console"):
            archive.make_tar([archive.Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))])

    def test_cpio_is_what_the_kernel_reads(self) -> None:
        """Walk it as init/initramfs.c does: 110-byte headers, name and data padded to 4."""
        content = archive.make_cpio([archive.file("modules/a.ko", b"12345"), archive.link("l", "modules")])
        found, offset = {}, 0
        while True:
            assert content[offset : offset + 6] == b"070701"
            fields = [int(content[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
            size, name_size = fields[6], fields[11]
            name = content[offset + 110 : offset + 109 + name_size].decode()
            start = (offset + 110 + name_size + 3) & ~3
            offset = (start + size + 3) & ~3
            if name == "TRAILER!!!":
                break
            found[name] = (stat.S_IFMT(fields[1]), content[start : start + size])
        assert offset == len(content)
        assert list(found) == ["modules", "modules/a.ko", "l"]
        assert found["modules/a.ko"] == (stat.S_IFREG, b"12345")
        assert found["l"] == (stat.S_IFLNK, b"modules")


class TestKernel:
    @staticmethod
    def bzimage(payload: bytes) -> bytes:
        head = bytearray(1024)
        head[0x1F1] = 1
        head[0x202:0x206] = b"HdrS"
        struct.pack_into("<II", head, 0x248, 16, len(payload))
        return bytes(head) + bytes(16) + payload + b"behind"

    def test_xz(self) -> None:
        elf = b"\x7fELF" + bytes(1000)
        assert unpack_bzimage(self.bzimage(lzma.compress(elf) + b"\x10\0\0\0")) == elf

    @pytest.mark.parametrize(("image", "why"), [
        (b"", "not a bzImage"), (bytes(2048), "not a bzImage"), ("zstd", "unknown way"), ("text", "not an ELF"),
        ("broken", "cannot be unpacked"), ("cut", "is cut off")])
    def test_what_it_is_not(self, image: bytes | str, why: str) -> None:
        payloads = {"zstd": b"\x28\xb5\x2f\xfd", "text": lzma.compress(b"text"), "broken": b"\xfd7zXZ\0" + b"x" * 60,
                    "cut": lzma.compress(b"\x7fELF" + bytes(range(256)) * 99)[:-40]}
        with pytest.raises(ImageError, match=why):
            unpack_bzimage(self.bzimage(payloads[image]) if isinstance(image, str) else image)


class TestPackageSources:
    def test_the_hosts_own_mirrors_of_the_suite(self) -> None:
        targets = "\n".join([
            "Debian|bookworm|bookworm|main|http://mirror.example/debian/",
            "Debian|bookworm-security|bookworm-security|main|http://mirror.example/debian-security/",
            "Debian|bookworm|bookworm|contrib|http://mirror.example/debian/",
            "Debian|trixie|trixie|main|http://mirror.example/debian/",
            "Somebody||nodistro|main|https://packages.example/deb/"])
        assert host_sources(targets, DEFAULT) == [
            "deb [arch=amd64] http://mirror.example/debian/ bookworm main",
            "deb [arch=amd64] http://mirror.example/debian-security/ bookworm-security main"]

    def test_a_host_of_another_suite_has_none(self) -> None:
        assert host_sources("Ubuntu|noble|noble|main|http://mirror.example/ubuntu/", DEFAULT) == []
        only_updates = "Debian|bookworm-updates|bookworm-updates|main|http://mirror.example/debian/"
        assert host_sources(only_updates, DEFAULT) == []

    def test_mirrors_given(self) -> None:
        lines = mirror_sources(["http://m.example/debian", "http://m.example/debian-security/"], DEFAULT)
        assert [line.split()[3] for line in lines] == ["bookworm", "bookworm-updates", "bookworm-security"]
        assert signed(lines[:1], Path("/k.gpg")) == (
            "deb [signed-by=/k.gpg arch=amd64] http://m.example/debian bookworm main\n")
