"""Terminals between process domains: many over one device, and whatever can happen to those who carry them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect
import pytest
from device_support import Bench, bench, until
from region_support import DEADLINE

from idc.console.client import Attachment, hang_up, terminals
from idc.console.protocol import ConsoleError, Fault, Op, Request, Size
from idc.console.service import PROGRAMS
from idc.console.terminal import WINDOW
from idc.errors import MisuseError, TimedOutError
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: A shell that says nothing of itself, so that what comes is what was asked for.
COMMAND = "/bin/sh -c 'stty raw -echo; echo ready; PS1= exec sh'"
TYPED = 200
MIB = 1 << 20


class Device:
    """A console device."""

    def __init__(self, here: Bench) -> None:
        self.here = here
        self.address = f"unix:{here.domains['front'].sockets / 'console-0'}"

    def attach(self, terminal: str | None = None, *, name: str = "", size: Size | None = None,
               term: str = "dumb") -> Attachment:
        attachment = Attachment(open_port(self.address), terminal, name=name, size=size, term=term)
        try:
            attachment.attach(DEADLINE)
        except BaseException:
            attachment.close()
            raise
        return attachment

    def open(self, *, name: str = "", size: Size | None = None, term: str = "dumb") -> Attachment:
        """A new one, once nothing is echoed any more."""
        attachment = self.attach(name=name, size=size, term=term)
        said(attachment, b"ready\n")
        return attachment

    def list(self) -> list[dict[str, object]]:
        return terminals(open_port(self.address), DEADLINE)

    def hang_up_all(self) -> None:
        for each in self.list():
            hang_up(open_port(self.address), str(each["number"]), DEADLINE)

    @property
    def server(self) -> int:
        """The process with the terminals."""
        (found,) = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()
                    and str(self.here.domains["back"].sockets).encode() in _words(path)[-1:][0]]
        return found


def _words(process: Path) -> list[bytes]:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]
    return [words[words.index(b"--socket") + 1]] if b"idc.console.server" in words else [b""]


def more(attachment: Attachment, enough: Callable[[bytes], object], limit: float = 60.0) -> bytes:
    """Output until there is enough of it."""
    deadline, out = time.monotonic() + limit, b""
    while not enough(out):
        left = deadline - time.monotonic()
        assert left > 0, out[-1000:]
        with contextlib.suppress(TimedOutError):
            got = attachment.read(left)
            assert got or not attachment.over, out[-1000:]
            out += got
    return out


def said(attachment: Attachment, pattern: bytes) -> re.Match[bytes]:
    """What matches, once it was put out."""
    found = re.search(pattern, more(attachment, lambda out: re.search(pattern, out)))
    assert found is not None
    return found


def run(attachment: Attachment, line: str) -> None:
    attachment.write(line.encode() + b"\n")


@pytest.fixture(scope="module")
def shared() -> Iterator[Device]:
    with bench("front", "back") as here:
        name = here.controller.attach("console", "front", "back", {"command": COMMAND, "scrollback": 1000}).name
        device = Device(here)
        yield device
        server = device.server
        here.controller.detach(name)
        until(lambda: not Path(f"/proc/{server}").exists())


@pytest.fixture
def device(shared: Device) -> Iterator[Device]:
    yield shared
    shared.hang_up_all()


def test_ten_at_once_each_with_its_own_bytes_and_size(device: Device) -> None:
    with contextlib.ExitStack() as held:
        all_ = [held.enter_context(device.open(size=Size(20 + n, 70 + n), term=f"term{n}")) for n in range(10)]
        for n, attachment in enumerate(all_):
            run(attachment, f"echo $TERM $(stty size) own {n}; seq {n}000 {n}500; echo last")
        for n, attachment in enumerate(all_):
            out = more(attachment, lambda out: out.endswith(b"last\n"))
            numbers = b"".join(b"%d\n" % number for number in range(n * 1000, n * 1000 + 501))
            assert out == b"term%d %d %d own %d\n" % (n, 20 + n, 70 + n, n) + numbers + b"last\n"
            attachment.resize(Size(10 + n, 60))
            run(attachment, "stty size")
        # the new size is there before what was typed after it, or not much later
        for n, attachment in enumerate(all_):
            while b"%d 60\n" % (10 + n) not in more(attachment, lambda out: out.endswith(b"\n")):
                run(attachment, "stty size")
        assert sorted(each["rows"] for each in device.list()) == [10 + n for n in range(10)]  # type: ignore[type-var]


def test_ten_megabytes_go_unharmed_past_one_that_is_not_read(device: Device, tmp_path: Path) -> None:
    data, file, mark = os.urandom(10 * MIB), tmp_path / "data", tmp_path / "written"
    file.write_bytes(data)
    with device.open() as stuck, device.open() as moving, device.open() as lively:
        run(stuck, f"head -c {MIB} /dev/zero; touch {mark}")
        run(moving, f"cat {file}; exit 5")
        digest, count = hashlib.sha256(), 0
        while not moving.over:
            piece = moving.read(60)
            digest.update(piece)
            count += len(piece)
            if count % 10 == 0 and not moving.over:
                run(lively, "echo alive")
        assert (count, digest.digest()) == (len(data), hashlib.sha256(data).digest())
        assert (moving.code, moving.lost) == (5, 0)
        run(lively, "echo 'the end'")
        said(lively, b"the end\n")
        assert not mark.exists()  # held up, as whoever attaches to it wants it to be
        assert len(more(stuck, lambda out: len(out) >= MIB)) == MIB
        until(mark.exists)


def test_what_is_typed_arrives_unharmed(device: Device, tmp_path: Path) -> None:
    data, file = os.urandom(MIB), tmp_path / "typed"
    with device.open() as attachment:
        run(attachment, f"echo go; head -c {len(data)} > {file}; sha256sum {file}")
        said(attachment, b"go\n")
        attachment.write(data)
        assert said(attachment, b"[0-9a-f]{64}").group().decode() == hashlib.sha256(data).hexdigest()
        assert file.read_bytes() == data


def test_left_alone_a_program_goes_on_and_shows_its_last_words_to_whoever_comes(device: Device, tmp_path: Path) -> None:
    go, gone = tmp_path / "go", tmp_path / "gone"
    with device.open(name="work") as attachment:
        run(attachment, f"until test -e {go}; do sleep 0.05; done; seq 20000; touch {gone}")
    with pytest.raises(ConsoleError, match="there is a terminal 'work' already") as raised:
        device.attach(name="work")
    assert raised.value.fault is Fault.TAKEN
    (listed,) = device.list()
    assert (listed["name"], listed["attached"], listed["code"]) == ("work", 0, None)
    go.touch()
    until(gone.exists)
    everything = b"ready\n" + b"".join(b"%d\n" % n for n in range(1, 20001))
    for who in ("work", str(listed["number"])):
        with device.attach(who) as attachment:
            kept = more(attachment, lambda out: len(out) >= 1000)
            assert kept == everything[-1000:]
            assert attachment.replay == len(everything)
            run(attachment, "echo $((6 * 7)) >&2; :" if who == "work" else "exit 9")
            if who == "work":
                said(attachment, b"42\n")
                everything += b"42\n"
            else:
                until(lambda: attachment.pump() or attachment.over)
                attachment.wait_for(lambda: attachment.over, DEADLINE)
                assert attachment.code == 9
    until(lambda: device.list() == [])


def test_two_at_one_terminal_see_the_same(device: Device) -> None:
    with device.open(name="shared") as one, device.attach("shared") as other:
        run(one, "echo from one")
        for each in (one, other):
            said(each, b"from one\n")
        run(other, "echo from other")
        for each in (one, other):
            said(each, b"from other\n")
        assert device.list()[0]["attached"] == 2


@pytest.mark.parametrize(("how", "ends"), [("kill", ("front", "back") * 3), ("reload", ("front", "back"))])
def test_nothing_is_lost_or_doubled_whoever_of_the_drivers_dies(device: Device, tmp_path: Path, how: str,
                                                                ends: tuple[str, ...]) -> None:
    typed, numbers = tmp_path / "typed", b"".join(b"%d\n" % n for n in range(1, 300_001))
    with device.open() as reading, device.open() as typing:
        run(reading, "seq 300000")
        run(typing, f"echo go; head -n {TYPED} > {typed}; echo all")
        said(typing, b"go\n")
        out, lines = b"", 0
        for end in ends:
            enough = len(out) + len(numbers) // (len(ends) + 1)
            while len(out) < enough:
                out += reading.read(60)
                if lines < TYPED - 4:
                    run(typing, f"line {lines}")
                    lines += 1
            device.here.domains[end].replace(how)
            run(typing, f"line {lines}")
            lines += 1
            typing.pump()
        out += more(reading, lambda rest: len(out) + len(rest) >= len(numbers))
        for line in range(lines, TYPED):
            run(typing, f"line {line}")
        said(typing, b"all\n")
        assert out == numbers
        assert typed.read_bytes() == b"".join(b"line %d\n" % line for line in range(TYPED))
        assert reading.lost == typing.lost == 0


def test_the_process_with_the_terminals_dies_and_there_is_another_one(device: Device) -> None:
    with device.open() as attachment:
        run(attachment, "echo here")
        said(attachment, b"here\n")
        os.kill(device.server, signal.SIGKILL)
        attachment.wait_for(lambda: attachment.over, 60)
        assert isinstance(attachment.error, ConsoleError)
        assert attachment.error.fault is Fault.GONE
    with device.open() as attachment:
        run(attachment, "echo again")
        said(attachment, b"again\n")


def test_whoever_is_killed_is_not_counted_as_attached(device: Device) -> None:
    attachment = device.open(name="left")
    run(attachment, "head -c 3000000 /dev/zero; echo done")
    more(attachment, lambda out: len(out) > WINDOW)
    attachment.endpoint.abandon()  # as the kernel does when its process dies
    until(lambda: device.list()[0]["attached"] == 0)
    with device.attach("left") as attachment:
        run(attachment, "echo alive")


def test_bad_requests_are_refused_and_harm_nobody(device: Device) -> None:
    for wish in ("work", "31", ""):
        with pytest.raises(ConsoleError, match=r"no terminal '.*' \(there are: none\)") as raised:
            device.attach(wish)
        assert raised.value.fault is Fault.NO_SUCH
    with pytest.raises(ConsoleError, match="a window of 0 rows"):
        Attachment(open_port(device.address), size=Size(0, 80))
    with device.open() as attachment:
        with pytest.raises(ConsoleError, match="1 to 4096 of each"):
            attachment.resize(Size(24, 65535))
        answers: list[int] = []
        session = struct.pack("<Q", attachment._session)
        for rude in (b"", b"\xff" * 9, Request(Op.READ, attachment._session, at=1 << 60).pack(), b"\x05" + session,
                     Request(Op.WRITE, attachment._session, at=77, data=b"x").pack(), b"\x06" + session + bytes(4)):
            attachment.endpoint.submit_transaction(rude, lambda completion: answers.append(completion.error))
            wanted = len(answers) + 1
            attachment.wait_for(lambda wanted=wanted: len(answers) == wanted, DEADLINE)  # type: ignore[misc]
        assert answers == [Fault.BAD_REQUEST] * 5 + [Fault.BAD_SIZE]
        run(attachment, "echo unharmed")
        said(attachment, b"unharmed\n")


def test_too_many_terminals_and_a_command_that_cannot_be_run() -> None:
    with bench("front", "back") as here:
        with pytest.raises(MisuseError, match="option terminals: 33 is more than 32"):
            here.controller.attach("console", "front", "back", {"terminals": 33})
        name = here.controller.attach("console", "front", "back", {"command": "sh 'x"}, wait=None).name
        until(lambda: any("option command: \"sh 'x\": No closing quotation" in step.why
                          for step in here.controller.see(name).back))
        here.controller.detach(name)
        name = here.controller.attach("console", "front", "back", {"terminals": 2, "command": "/no/such/thing"}).name
        device = Device(here)
        for _ in range(3):  # those that have ended make room
            with device.attach() as attachment:
                attachment.wait_for(lambda: attachment.over, 60)
                assert attachment.code == 127
                assert attachment.read() == b"/no/such/thing cannot be run: No such file or directory\r\n"
        here.controller.detach(name)

        name = here.controller.attach("console", "front", "back", {"terminals": 2, "command": COMMAND}).name
        with device.open() as first, device.open():
            with pytest.raises(ConsoleError, match="there are 2 terminals already") as raised:
                device.attach()
            assert raised.value.fault is Fault.TOO_MANY
            run(first, "echo $$")
            program = int(said(first, rb"(\d+)\n").group(1))
            waiting = [Attachment(open_port(device.address), "0") for _ in range(PROGRAMS)]
            for each in waiting[:-2]:
                each.attach(DEADLINE)
            with pytest.raises(TimedOutError):  # one more than programs that may be connected at a time: it waits
                waiting[-1].attach(0.5)
            for each in waiting:
                each.endpoint.abandon()
            here.controller.detach(name)
            until(lambda: not Path(f"/proc/{program}").exists())  # hung up with its device


def test_a_person_uses_resizes_leaves_and_ends_one(device: Device) -> None:
    words = [sys.executable, "-m", "idc.console.tty", "--device", device.address.removeprefix("unix:")]
    refused = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: standard input is no terminal")
    person = pexpect.spawn(words[0], [*words[1:], "--name", "desk"], dimensions=(30, 100), timeout=60, encoding="utf-8")
    person.expect(r"terminal (\d+); Ctrl-\] leaves it")
    assert isinstance(person.match, re.Match)
    number = person.match.group(1)
    person.send("stty size\n")
    person.expect("30 100")
    person.setwinsize(44, 133)
    while True:
        person.send("stty size\n")
        if person.expect(["44 133", "30 100"]) == 0:
            break
    person.send("printf 'remember \\033[6nme'\n")
    person.expect("remember.*me")
    person.send("\x1d")
    person.expect(f"terminal {number}: left, and goes on")
    person.expect(pexpect.EOF)
    person.close()
    assert person.exitstatus == 0
    listed = subprocess.run([*words, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert listed[1].split("\t")[:4] == [number, "desk", "133x44", "0"]

    person = pexpect.spawn(words[0], [*words[1:], "desk"], dimensions=(30, 100), timeout=60, encoding="utf-8")
    person.expect("remember me")  # a question to the terminal is not asked again
    person.send("exit 3\n")
    person.expect("ended with exit code 3")
    person.expect(pexpect.EOF)
    person.close()
    assert person.exitstatus == 3
    missing = pexpect.spawn(words[0], [*words[1:], "desk"], timeout=60, encoding="utf-8")
    missing.expect(r"error: there is no terminal 'desk' \(there are: none\)")
    missing.expect(pexpect.EOF)
    missing.close()
    assert missing.exitstatus == 1
