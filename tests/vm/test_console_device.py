"""Terminals in a VM, as a person uses them from the host, and from another VM."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect
import pytest

from idc.console.client import Attachment, hang_up, terminals
from idc.console.protocol import Size
from idc.transport.address import open_port
from testbed import registry
from testbed.control import Control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Programs start slowly in emulated guests, the more so on a machine that others use too.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = """
name = "terminals"
[vms.front]
[vms.back]
[broker]
[devices.desk]
class = "console"
frontend = "front"
backend = "back"
options = { command = "/bin/sh" }
"""
LIMIT = 200.0


class Bed:
    """A running testbed, by the commands of a user."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        self.words = [sys.executable, "-P", "-m", "testbed.cli"]

    def run(self, *words: str, code: int = 0) -> str:
        result = subprocess.run([*self.words, *words], env=self.env, text=True, capture_output=True, timeout=600,
                                stdin=subprocess.DEVNULL, check=False)
        assert result.returncode == code, result
        return result.stderr if code else result.stdout

    @contextlib.contextmanager
    def person(self, *words: str, rows: int = 24, columns: int = 80) -> Iterator[pexpect.spawn]:  # type: ignore[type-arg]
        """Somebody who types."""
        person = pexpect.spawn(self.words[0], [*self.words[1:], "tty", *words], env=self.env, timeout=LIMIT,
                               dimensions=(rows, columns))
        try:
            yield person
        finally:
            person.close()

    @property
    def address(self) -> str:
        """Of the host's terminals in "back"."""
        with Control(registry.find("terminals", self.directory / "idc-testbed")) as link:
            return f"unix:{link.call('tty', {'vm': 'back'})['socket']}"

    def kill_drivers(self, where: str) -> None:
        """-9, and whoever keeps them starts others."""
        if where == "back":
            self.run("exec", "back", "--", "kill -9 $(pgrep -P $(pgrep -o -f 'python3 -m guest.drivers'))")
            return
        (keeper,) = [path for path in Path("/proc").iterdir() if path.name.isdigit() and self._keeps(path)]
        os.kill(int((keeper / "task" / keeper.name / "children").read_text().split()[0]), signal.SIGKILL)

    def _keeps(self, process: Path) -> bool:
        try:
            words, parent = (process / "cmdline").read_bytes(), (process / "stat").read_text().rsplit(")")[1].split()[1]
            return (b"guest.drivers" in words and str(self.directory).encode() in words
                    and b"guest.drivers" not in Path("/proc", parent, "cmdline").read_bytes())
        except OSError:
            return False


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory:
        bed = Bed(Path(directory))
        file = Path(directory) / "terminals.toml"
        file.write_text(TOPOLOGY)
        try:
            bed.run("up", str(file))
            yield bed
        finally:
            bed.run("down", "--all", "--force")


def until(attachment: Attachment, enough: Callable[[bytes], object]) -> bytes:
    deadline, out = time.monotonic() + LIMIT, b""
    while not enough(out):
        out += attachment.read(max(0.1, deadline - time.monotonic()))
    return out


def shell(address: str, size: Size | None = None) -> Attachment:
    """A shell that echoes nothing."""
    attachment = Attachment(open_port(address), size=size)
    attachment.attach(LIMIT)
    attachment.write(b"stty raw -echo; PS1=; echo $((6*7)) ready\n")
    until(attachment, lambda out: b"42 ready\n" in out)
    return attachment


def test_a_person_edits_with_vi_resizes_leaves_and_comes_back(bed: Bed) -> None:
    with bed.person("back", "--name", "edit") as person:
        person.expect(r"terminal \d+ of back; Ctrl-\] leaves it")
        person.expect("#")
        person.send("busybox vi /tmp/note\r")
        person.expect(r"\x1b\[24;1H")  # its last line
        person.send("ihello from afar\x1b")
        person.expect("hello from afar")
        person.setwinsize(40, 100)
        person.expect(r"\x1b\[40;1H")
        person.send("\x1d")
        person.expect(r"terminal \d+ of back: left, and goes on")
        person.expect(pexpect.EOF)
    assert re.search(r"edit +100x40 +0 +runs +/bin/sh -l", bed.run("tty", "back", "--list"))
    with bed.person("back", "edit", rows=30, columns=90) as person:
        person.expect("hello from afar")
        person.expect(r"\x1b\[30;1H")
        person.send("osecond line\x1b")
        person.expect(r"- /tmp/note \[Modified\] 2/2")
        person.send(":wq\r")  # what follows an Escape at once would be part of a key's sequence
        person.expect("#")
        person.send("exit 4\r")
        person.expect("ended with exit code 4")
        person.expect(pexpect.EOF)
        person.close()
        assert person.exitstatus == 4
    assert bed.run("exec", "back", "--", "cat /tmp/note") == "hello from afar\nsecond line\n"


def test_from_another_vm_too(bed: Bed) -> None:
    with bed.person("front") as person:
        person.expect("#")
        person.send("python3 -m idc.console.tty --name inner\r")
        person.expect("terminal 0; Ctrl")
        person.expect("#")
        person.send("cat /proc/sys/kernel/hostname; exit 6\r")
        person.expect("back\r")
        person.expect("ended with exit code 6")
        person.send("exit\r")
        person.expect("ended with exit code 6")  # a shell's own code is that of its last command
        person.expect(pexpect.EOF)


def test_ten_at_once_and_their_output_unharmed_whoever_of_the_drivers_is_killed(bed: Bed) -> None:
    ten_at_once(bed, 500_000)


@pytest.mark.soak
def test_ten_megabytes_unharmed_whoever_of_the_drivers_is_killed(bed: Bed) -> None:
    ten_at_once(bed, 10_000_000)


def ten_at_once(bed: Bed, length: int) -> None:
    address = bed.address
    with contextlib.ExitStack() as held:
        many = [held.enter_context(shell(address, Size(20 + n, 70))) for n in range(9)]
        moving = held.enter_context(shell(address))
        moving.write(b"head -c %d /dev/urandom > /tmp/sent; sha256sum /tmp/sent; cat /tmp/sent\n" % length)
        told = until(moving, lambda out: b"/tmp/sent\n" in out)
        wanted, _, rest = told.partition(b"  /tmp/sent\n")
        digest, count = hashlib.sha256(rest), len(rest)
        kill = iter(["back", "host"])
        while count < length:
            if count > length // 4 and (where := next(kill, None)):
                bed.kill_drivers(where)
            piece = moving.read(LIMIT)
            digest.update(piece)
            count += len(piece)
        assert (count, digest.hexdigest().encode(), moving.lost) == (length, wanted, 0)
        for n, attachment in enumerate(many):
            attachment.write(b"stty size; seq %d000 %d100; echo last\n" % (n, n))
        for n, attachment in enumerate(many):
            out = until(attachment, lambda out: out.endswith(b"last\n"))
            numbers = b"".join(b"%d\n" % number for number in range(n * 1000, n * 1000 + 101))
            assert out == b"%d 70\n" % (20 + n) + numbers + b"last\n"
        assert len([each for each in terminals(open_port(address)) if each["attached"]]) == 10
    for each in terminals(open_port(address)):
        hang_up(open_port(address), str(each["number"]))
    assert terminals(open_port(address)) == []


@pytest.mark.parametrize(("words", "error"), [
    (("back", "work"), "is no terminal"),
    (("back", "work", "--close"), "no terminal 'work'"), (("back", "--close"), "one thing at a time"),
])
def test_mistakes_are_one_line(bed: Bed, words: tuple[str, ...], error: str) -> None:
    said = bed.run("tty", *words, code=1).strip()
    assert error in said
    assert "\n" not in said


def test_mistakes_of_a_person(bed: Bed) -> None:
    for words, error in ((("back", "work"), r"error: there is no terminal 'work' \(there are: none\)"),
                         (("back", "--name", "7"), "error: '7' is no name of a terminal")):
        with bed.person(*words) as person:
            person.expect(error)
            person.expect(pexpect.EOF)
    with bed.person("back", rows=24, columns=5000) as person:
        person.expect("error: a window of 24 rows and 5000 columns: 1 to 4096 of each")
