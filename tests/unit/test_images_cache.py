"""The cache: lock, rubbish of killed builds, choosing what to prune, and programs that fail or are cancelled."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest

import images
from images.cache import Cache, choose_stale, default_directory
from images.errors import ImageError, MissingProgramError, ProgramError, find_program
from images.runner import Runner


def nothing(_: str) -> None:
    """Progress that is not looked at."""


class TestDirectory:
    def test_order_of_the_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        monkeypatch.setenv("IDC_TESTBED_CACHE", "/own")
        assert default_directory() == Path("/own")
        monkeypatch.delenv("IDC_TESTBED_CACHE")
        assert default_directory() == Path("/x/idc-testbed")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", "/h")
        assert default_directory() == Path("/h/.cache/idc-testbed")

    def test_not_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "c").write_text("")
        with pytest.raises(ImageError, match="IDC_TESTBED_CACHE"), Cache(tmp_path / "c").locked(nothing):
            pass


class TestLock:
    def test_the_second_says_that_it_waits(self, tmp_path: Path) -> None:
        cache, said, order = Cache(tmp_path), threading.Event(), []

        def second() -> None:
            with cache.locked(lambda _: said.set()):
                order.append("second")

        with cache.locked(nothing):
            thread = threading.Thread(target=second)
            thread.start()
            assert said.wait(10)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]

    def test_a_killed_build_holds_on_until_its_programs_have_ended(self, tmp_path: Path) -> None:
        """kill -9 leaves mmdebstrap behind for a moment, which must not write into the next build's directory."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        # the program ignores TERM, as mmdebstrap does while it cleans up, and lives until the pipe is written
        code = (
            "import sys; from pathlib import Path; from images.cache import Cache; from images.runner import Runner\n"
            f"with Cache(Path({str(tmp_path)!r})).locked(print) as lock:\n"
            f"    Runner(lock).run('x', ['sh', '-c', 'trap \"\" TERM; echo started >&2; read line < {pipe}'],"
            f" Path({str(tmp_path / 'log')!r}))\n")
        builder = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 20
        while not (tmp_path / "log").exists() or "\nstarted" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            assert builder.poll() is None
            time.sleep(0.01)
        builder.kill()
        builder.wait()
        said: list[str] = []

        def let_it_end(text: str) -> None:
            said.append(text)
            pipe.write_text("go\n")

        with Cache(tmp_path).locked(let_it_end):
            assert said == ["another image build is running; waiting for it"]

    def test_what_a_killed_build_left_is_cleared(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        (cache.tmp / "base").mkdir(parents=True)
        (cache.tmp / "base" / "half.tar").write_bytes(b"half")
        with cache.locked(nothing):
            assert list(cache.tmp.iterdir()) == []


class Usage(NamedTuple):
    """As shutil.disk_usage tells it."""

    total: int
    used: int
    free: int


class TestRoom:
    def test_a_full_disk_is_told_before_anything_is_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("images.cache.shutil.disk_usage", lambda _: Usage(100, 50, 40 << 20))
        said: list[str] = []
        with pytest.raises(ImageError, match=r"\d+ MiB needed, 40 MiB free; try testbed image prune"):
            images.ensure(progress=said.append, cache=tmp_path)
        assert said == []

    def test_packages_that_are_here_are_not_counted_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = Cache(tmp_path)
        cache.debs.mkdir()
        (cache.debs / "a.deb").write_bytes(bytes(3 << 20))
        monkeypatch.setattr("images.cache.shutil.disk_usage", lambda _: Usage(100, 50, 8 << 20))
        cache.require_room(10 << 20)
        with pytest.raises(ImageError, match="no room"):
            cache.require_room(12 << 20)

    def test_a_disk_that_fills_up_under_the_builders_own_hands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/tmp/kernel")

        monkeypatch.setattr("images.stages.Workshop.packages", full)
        with pytest.raises(ImageError, match=r"No space left on device: /cache/tmp/kernel; free some space"):
            images.ensure(cache=tmp_path)


class TestPrune:
    USED: ClassVar = {"old": 1.0, "middle": 2.0, "new": 3.0}

    def test_keeps_the_newest(self) -> None:
        assert choose_stale(self.USED, keep=1) == ["old", "middle"]
        assert choose_stale(self.USED, keep=5) == []
        assert choose_stale(self.USED, keep=0) == ["old", "middle", "new"]

    def make(self, cache: Cache, name: str, when: float, parts: list[str]) -> None:
        directory = cache.images / f"debian12-{name}"
        directory.mkdir(parents=True)
        files = {key: f"{name}.{key}" for key in ("kernel", "initrd", "rootfs", "kernel_deb")}
        for file in files.values():
            (directory / file).write_bytes(bytes(4096))
        manifest = directory / "manifest.json"
        manifest.write_text(json.dumps(
            {"name": "debian12", "hash": name, "files": files, "bytes": dict.fromkeys(files, 4096),
             "kernel_arguments": ["quiet"], "parts": parts}))
        os.utime(manifest, (when, when))
        cache.stages.mkdir(exist_ok=True)
        for part in parts:
            (cache.stages / part).write_bytes(bytes(4096))

    def test_images_with_the_parts_only_they_need(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        self.make(cache, "aaa", 1, ["base-1.tar", "core-1.tar"])
        self.make(cache, "bbb", 2, ["base-1.tar", "core-2.tar"])
        (cache.images / "debian12-ccc").mkdir()
        removed, freed = images.prune(cache=tmp_path)
        assert sorted(path.name for path in removed) == ["core-1.tar", "debian12-aaa", "debian12-ccc"]
        assert freed >= 5 * 4096
        assert [image.hash for image in images.list_images(tmp_path)] == ["bbb"]
        assert sorted(path.name for path in cache.stages.iterdir()) == ["base-1.tar", "core-2.tar"]

    def test_show(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        with pytest.raises(ImageError, match="testbed image build"):
            images.show(cache=tmp_path)
        self.make(cache, "aab", 1, [])
        self.make(cache, "aac", 2, [])
        assert images.show(cache=tmp_path).hash == "aac"
        assert images.show("aab", tmp_path).label == "debian12-aab"
        with pytest.raises(ImageError, match="matches"):
            images.show("aa", tmp_path)

    def test_a_damaged_image_is_said_to_be(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        self.make(cache, "aaa", 1, [])
        (cache.images / "debian12-aaa" / "aaa.rootfs").unlink()
        with pytest.raises(ImageError, match="damaged"):
            images.show(cache=tmp_path)

    def test_a_truncated_image_is_said_to_be_and_how_to_get_rid_of_it(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        self.make(cache, "aaa", 1, [])
        directory = cache.images / "debian12-aaa"
        os.truncate(directory / "aaa.rootfs", 100)
        with pytest.raises(ImageError) as caught:
            images.show(cache=tmp_path)
        why = "aaa.rootfs has 100 bytes, it was written with 4096"
        assert str(caught.value) == (
            f"the image in {directory} is damaged ({why}); try: rm -r {directory}, then testbed image build"
        )


class TestRunner:
    def test_output_inputs_and_log(self, tmp_path: Path) -> None:
        given = tmp_path / "with 'quote"
        given.write_text("content")
        log = tmp_path / "log"
        text = Runner().run("reading", ["sh", "-c", "cat <&4; echo noise >&2"], log, inputs={4: given})
        assert text == "content"
        assert log.read_text().startswith("+ ")
        assert log.read_text().endswith("noise\n")

    def test_a_failure_can_be_replayed_and_says_what_to_try(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        with pytest.raises(ProgramError) as caught:
            Runner().run("building", ["sh", "-c", "echo 'No space left on device' >&2; exit 3"], log,
                         environment={"A": "b c"})
        text = str(caught.value)
        assert "building failed: it ended with exit code 3" in text
        assert "A='b c' " in caught.value.command
        assert str(log) in text
        assert "| No space left on device" in text
        assert "try: free some space" in text
        assert caught.value.status == 3

    def test_a_missing_program_names_its_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("images.errors.SEARCH_PATH", str(tmp_path))
        with pytest.raises(MissingProgramError, match="apt-get install erofs-utils"):
            Runner().run("x", ["mkfs.erofs"], tmp_path / "log")

    def test_a_signal_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ProgramError, match="by signal SIGKILL"):
            Runner().run("x", ["sh", "-c", "kill -9 $$"], tmp_path / "log")

    def test_kill_of_the_builder_ends_children_of_children(self, tmp_path: Path) -> None:
        """The pipe's end of file is the news that the last of them is gone."""
        read_end, write_end = os.pipe()
        code = (
            "from pathlib import Path; from images.runner import Runner\n"
            f"Runner({write_end}).run('x', ['sh', '-c',"
            f" '(echo here > /proc/self/fd/{write_end}; exec sleep 100) & wait'], Path({str(tmp_path / 'log')!r}))\n")
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[write_end]) as builder:
            os.close(write_end)
            assert os.read(read_end, 5) == b"here\n"
            builder.kill()
        assert select.select([read_end], [], [], 10)[0]
        assert os.read(read_end, 1) == b""
        os.close(read_end)

    def test_cancel_ends_children_of_children(self, tmp_path: Path) -> None:
        runner, mark, failures = Runner(), tmp_path / "pid", []

        def work() -> None:
            try:
                runner.run("sleeping", ["sh", "-c", f"sleep 100 & echo $! > {mark}.new; mv {mark}.new {mark}; wait"],
                           tmp_path / "log")
            except ProgramError as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        deadline = time.monotonic() + 10
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        runner.cancel()
        thread.join(10)
        assert len(failures) == 1
        assert failures[0].status < 0
        status = Path(f"/proc/{mark.read_text().strip()}/stat")
        # nobody may have reaped it yet
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
        with pytest.raises(ImageError, match="cancelled"):
            runner.run("late", ["true"], tmp_path / "log")


def test_a_failed_script_is_shown_by_its_first_line_and_its_own_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ProgramError) as failed:
        Runner().run("making it", ["sh", "-c", "set -e\necho wrong: 7 >&2\nexit 3"], log)
    assert str(failed.value).splitlines() == [
        "making it failed: it ended with exit code 3",
        f"  command: {find_program('sh')} -c 'set -e ... (whole in the log)",
        f"  log: {log}", "  | wrong: 7"]
    assert "exit 3'" in log.read_text()
