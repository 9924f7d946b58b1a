"""Images and overlays against a plain byte string; what survives a process, and what a machine; bad input."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idc._core import ffi
from idc.block import overlay
from idc.block.image import Image, ImageError, Spec
from idc.block.lease import InUseError
from idc.block.overlay import CLUSTER, OverlayError
from idc.block.protocol import FUA, REQUEST, Can, Geometry, Op
from idc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 5 * CLUSTER + 12_345
PART = 1 << 20


@dataclass
class Bench:
    """An image, memory for its requests, and what it must hold."""

    spec: Spec
    runtime: Path
    content: bytearray
    image: Image = field(init=False)
    memory: bytearray = field(default_factory=lambda: bytearray(PART))

    def open(self) -> None:
        self.image = Image(self.spec, "block-0 of front", self.runtime)
        self.image.attach(ffi.from_buffer("uint8_t *", self.memory), 0, PART)

    def read(self, offset: int, length: int) -> bytes:
        assert self.image.request(Op.READ, offset, length, 64) == 0
        return bytes(self.memory[64:64 + length])

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.memory[32:32 + len(data)] = data
        assert self.image.request(Op.WRITE, offset, len(data), 32, fua=fua) == 0
        self.content[offset:offset + len(data)] = data

    def zero(self, op: Op, offset: int, length: int) -> None:
        assert self.image.request(op, offset, length) == 0
        self.content[offset:offset + length] = bytes(length)

    def flush(self) -> None:
        assert self.image.request(Op.FLUSH) == 0

    def whole(self) -> bytes:
        return b"".join(self.read(at, min(PART // 2, len(self.content) - at))
                        for at in range(0, len(self.content), PART // 2))

    def act(self, chance: random.Random) -> None:
        """One request."""
        offset = chance.randrange(len(self.content))
        length = chance.randrange(1, min(len(self.content) - offset, 2 * CLUSTER) + 1)
        op = chance.choice((Op.READ, Op.WRITE, Op.WRITE, Op.TRIM, Op.ZEROES, Op.FLUSH))
        if op is Op.READ:
            assert self.read(offset, length) == self.content[offset:offset + length]
        elif op is Op.WRITE:
            self.write(offset, chance.randbytes(length), fua=chance.random() < 0.1)
        elif op is Op.FLUSH:
            self.flush()
        else:
            self.zero(op, offset, length)


@pytest.fixture(params=["raw", "overlay"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    content = random.Random(5).randbytes(SIZE)
    (tmp_path / "base").write_bytes(content)
    spec = Spec(tmp_path / "base") if request.param == "raw" else Spec(tmp_path / "over", tmp_path / "base")
    made = Bench(spec, tmp_path / "run", bytearray(content))
    made.open()
    yield made
    made.image.close()


@pytest.mark.parametrize("seed", range(3))
def test_any_requests_and_opened_again_now_and_then(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        bench.act(chance)
        if chance.random() < 0.03:
            bench.image.close()
            bench.open()
    assert bench.whole() == bench.content
    if bench.spec.base is not None:
        assert bench.spec.base.read_bytes() == random.Random(5).randbytes(SIZE)
    counters = bench.image.counters
    assert counters["copied"] == counters["read_bytes"] + counters["written_bytes"]  # once each


def test_what_the_geometry_says(bench: Bench) -> None:
    geometry = bench.image.geometry
    assert geometry.size == SIZE
    assert geometry.minimum == 1
    assert Can.READ_ONLY not in geometry.can
    assert Geometry.parse(geometry.pack()) == geometry


@pytest.mark.parametrize("seed", range(6))
def test_after_its_machine_died_an_overlay_has_all_that_was_flushed(tmp_path: Path, seed: int) -> None:
    """Each byte is what it was at the last flush, or what was written to it since. RUNTIME goes with the machine."""
    chance = random.Random(seed)
    content = chance.randbytes(SIZE)
    (tmp_path / "base").write_bytes(content)
    bench = Bench(Spec(tmp_path / "over", tmp_path / "base"), tmp_path / "run", bytearray(content))
    bench.open()
    for _ in range(30):
        bench.act(chance)
    bench.flush()
    versions = [bytes(bench.content)]
    for _ in range(chance.randrange(12)):
        offset = chance.randrange(SIZE - 1000)
        bench.write(offset, chance.randbytes(1000))
        versions.append(bytes(bench.content))
    bench.image.close()
    shutil.rmtree(tmp_path / "run")
    bench.open()
    found = bench.whole()
    for at in range(SIZE):
        assert any(found[at] == version[at] for version in versions), at
    bench.image.close()


def test_a_bitmap_of_another_session_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    bench = Bench(Spec(tmp_path / "over", tmp_path / "base"), tmp_path / "run", bytearray(SIZE))
    bench.open()
    bench.write(0, b"a" * 100)
    bench.image.close()
    shutil.copytree(tmp_path / "run", tmp_path / "stale")
    shutil.rmtree(tmp_path / "run")
    bench.open()  # as after the machine's death: a new session
    assert bench.read(0, 100) in (bytes(100), b"a" * 100)
    bench.write(0, b"b" * 100)
    bench.flush()
    bench.image.close()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "stale").rename(tmp_path / "run")
    bench.open()
    assert bench.read(0, 100) == b"b" * 100
    bench.image.close()


@given(data=st.binary(min_size=0, max_size=64))
def test_no_bytes_do_harm(data: bytes) -> None:
    with_image(data)


@given(op=st.integers(0, 255), flags=st.integers(0, 255), zero=st.integers(0, 1), offset=st.integers(0, 2**64 - 1),
       length=st.integers(0, 2**64 - 1), buffer=st.integers(0, 2**64 - 1))
def test_no_request_goes_beyond_its_bounds(op: int, flags: int, zero: int, offset: int, length: int,
                                           buffer: int) -> None:
    with_image(REQUEST.pack(op, flags, zero, 0, offset, length, buffer))


@given(op=st.sampled_from([1, 2, 4, 5]), offset=st.integers(4000, 4200), length=st.integers(0, 300),
       buffer=st.integers(4000, 12400))
def test_bounds_are_exact(op: int, offset: int, length: int, buffer: int) -> None:
    with_image(REQUEST.pack(op, 0, 0, 0, offset, length, buffer if op < 3 else 0))


_shared: dict[str, Image] = {}


def with_image(data: bytes) -> None:
    """Carry it out on an image of 4096 bytes with a part of 4096 bytes in the middle of memory, and look at all."""
    fd, runtime = os.memfd_create("image"), tempfile.TemporaryDirectory(prefix="idc-block-")
    try:
        os.write(fd, b"i" * 4096)
        image = Image(Spec(Path(f"/proc/self/fd/{fd}")), "block-0 of front", Path(runtime.name))
        memory = bytearray(b"m" * 12288)
        image.attach(ffi.from_buffer("uint8_t *", memory), 4096, 4096)
        error = image.do(data)
        image.close()
        assert memory[:4096] == memory[8192:] == b"m" * 4096
        assert os.fstat(fd).st_size == 4096
        if error:
            assert memory == b"m" * 12288
            assert os.pread(fd, 4097, 0) == b"i" * 4096
            assert error in (errno.EINVAL, errno.EIO)
        else:
            op, flags, zero, zero_too, offset, length, buffer = REQUEST.unpack(data)
            assert op in (1, 2, 3, 4, 5)
            assert not flags & ~FUA
            assert not zero
            assert not zero_too
            assert offset + length <= 4096
            assert op > 2 or 4096 <= buffer <= 8192 - length
    finally:
        runtime.cleanup()
        os.close(fd)


@given(st.binary(max_size=80))
def test_a_geometry_is_parsed_or_refused(status: bytes) -> None:
    try:
        geometry = Geometry.parse(status)
    except ProtocolError:
        return
    assert geometry.pack() == status


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    (tmp_path / "empty").touch()
    (tmp_path / "some").write_bytes(b"x" * 1000)
    with pytest.raises(ImageError, match=r"image .*none: No such file or directory"):
        Image(Spec(tmp_path / "none"), "d", runtime)
    with pytest.raises(ImageError, match="is empty: make it as large as the disk shall be"):
        Image(Spec(tmp_path / "empty"), "d", runtime)
    with pytest.raises(ImageError, match="is neither a file nor a block device"):
        Image(Spec(tmp_path), "d", runtime) if os.getuid() else Image(Spec(Path("/dev/null")), "d", runtime)
    with pytest.raises(ImageError, match="is no absolute path"):
        Image(Spec(Path("some")), "d", runtime)
    with pytest.raises(OverlayError, match="is no overlay, though base= is given"):
        Image(Spec(tmp_path / "some", tmp_path / "some2"), "d", runtime) if (
            tmp_path / "some2").write_bytes(b"y" * 4096) else None
    with pytest.raises(ImageError, match="cannot be shared"):
        Image(Spec(tmp_path / "over", tmp_path / "some", shared=True), "d", runtime)
    with pytest.raises(OverlayError, match=r"base image .* is empty"):
        Image(Spec(tmp_path / "over", tmp_path / "empty"), "d", runtime)
    assert not list(tmp_path.glob("*over*"))


def test_a_base_that_changed_or_an_overlay_that_was_cut_or_damaged(tmp_path: Path) -> None:
    base, over, runtime = tmp_path / "base", tmp_path / "over", tmp_path / "run"
    base.write_bytes(bytes(SIZE))
    spec = Spec(over, base)
    Image(spec, "d", runtime).close()
    os.utime(base, ns=(1, 1))
    with pytest.raises(OverlayError, match=r"base image .* was written to since overlay"):
        Image(spec, "d", runtime)
    base.write_bytes(bytes(SIZE + 1))
    with pytest.raises(OverlayError, match=rf"was made over .* of {SIZE} bytes; .* has {SIZE + 1}"):
        Image(spec, "d", runtime)
    over.unlink()
    Image(spec, "d", runtime).close()
    whole = over.read_bytes()
    os.truncate(over, len(whole) - 1)
    with pytest.raises(ImageError, match=r"overlay .* was cut"):
        Image(spec, "d", runtime)
    over.write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    with pytest.raises(OverlayError, match=r"the header of overlay .* is damaged"):
        Image(spec, "d", runtime)


@given(st.binary(min_size=overlay.HEADER.size, max_size=overlay.HEADER.size))
def test_a_header_is_parsed_or_refused(head: bytes) -> None:
    page = (overlay.MAGIC + head[8:]).ljust(4096, b"\0")
    try:
        header = overlay.Header.parse(page, "x")
    except OverlayError:
        return
    assert header.bitmap_bytes * 8 * header.cluster >= header.size


def test_who_may_use_an_image_at_a_time(tmp_path: Path) -> None:
    path, runtime = tmp_path / "image", tmp_path / "run"
    path.write_bytes(b"x" * 4096)
    plain, shared = Spec(path), Spec(path, shared=True)
    first = Image(plain, "block-0 of front", runtime)
    for other in (plain, shared, Spec(path, read_only=True), Spec(tmp_path / "over", path)):
        with pytest.raises(InUseError, match=r"is locked by device block-0 of front \(process"):
            Image(other, "block-1 of front", runtime)
    first.close()
    both = [Image(shared, "block-0 of front", runtime), Image(shared, "block-1 of front", runtime),
            Image(Spec(path, read_only=True), "block-2 of front", runtime)]
    with pytest.raises(InUseError, match="is locked by another program"):
        Image(plain, "block-3 of front", runtime)
    for image in both:
        image.close()
    Image(plain, "block-3 of front", runtime).close()


HOLDER = """
import sys
from pathlib import Path
from idc.block.image import Image, Spec
image = Image(Spec(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("device", "killed"), [("block-0 of front", True), ("block-1 of front", False)])
def test_a_former_back_end_that_hangs_is_killed_and_that_of_another_device_is_not(tmp_path: Path, device: str, killed:
                                                                                  bool) -> None:
    path, runtime = tmp_path / "image", tmp_path / "run"
    path.write_bytes(b"x" * 4096)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path), "block-0 of front", str(runtime)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            if killed:
                Image(Spec(path), device, runtime).close()
                assert holder.wait(20) == -signal.SIGKILL
            else:
                with pytest.raises(InUseError, match=rf"is locked by device block-0 of front \(process {holder.pid}\)"):
                    Image(Spec(path), device, runtime)
                assert holder.poll() is None
        finally:
            holder.kill()


def test_a_cut_file_is_not_made_to_look_whole(bench: Bench) -> None:
    size = bench.spec.path.stat().st_size
    os.truncate(bench.spec.path, size - CLUSTER)
    assert bench.image.request(Op.FLUSH) == errno.EIO
    assert bench.image.request(Op.WRITE, SIZE - 100, 100, 0) == errno.EIO
    assert bench.spec.path.stat().st_size == size - CLUSTER
    assert "has shrunk under use" in bench.image.check()
    os.truncate(bench.spec.path, size)
    assert bench.image.request(Op.FLUSH) == errno.EIO  # until it is opened anew
