"""The management agent and its client, over a socket pair: the guest's end is a process of this host."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from idc import framing
from testbed.agent import AgentClient
from testbed.calls import AgentFault, AgentInfo, HostFault
from testbed.errors import AgentLost, GuestHung, TestbedError

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; sys.path.insert(0, sys.argv[2]); from guest.agent import Agent; Agent(int(sys.argv[1])).run()"


class Bench:
    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.ready: list[AgentInfo] = []
        self.running = True
        self.process = self.start_agent()
        self.client = AgentClient(
            ours, "bench", lost=AgentLost, hung=GuestHung, running=lambda: self.running, on_ready=self.ready.append
        )

    def start_agent(self) -> subprocess.Popen[bytes]:
        fd = self.theirs.fileno()
        return subprocess.Popen([sys.executable, "-c", START, str(fd), str(ROOT)], pass_fds=[fd])

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.theirs.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    it.client.wait_ready(20)
    yield it
    it.close()


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_ready_tells_who_speaks(bench: Bench) -> None:
    info = bench.client.wait_ready(1)
    assert info.pid == bench.process.pid
    assert info.protocol == framing.PROTOCOL
    assert bench.ready == [info]


def test_exit_codes_streams_directory_and_environment(bench: Bench) -> None:
    result = bench.client.execute(sh("echo out; echo err >&2; pwd; echo $X; exit 7"), cwd="/usr", env={"X": "y"})
    assert (result.exit_code, result.out, result.err) == (7, "out\n/usr\ny\n", "err\n")
    assert bench.client.execute(sh("kill -9 $$")).exit_code == -9


@pytest.mark.parametrize(("argv", "code"), [(["/no/such"], 127), (["/etc/passwd"], 126)])
def test_what_cannot_start_ends_as_in_a_shell(bench: Bench, argv: list[str], code: int) -> None:
    result = bench.client.execute(argv)
    assert result.exit_code == code
    assert "cannot start" in result.err


def test_an_argument_with_a_zero_byte_fails_alone(bench: Bench) -> None:
    result = bench.client.execute(["echo", "a\0b"], timeout=20)
    assert result.exit_code == 126
    assert "null byte" in result.err
    assert bench.client.execute(["true"], timeout=20).exit_code == 0


def test_a_pipe_is_pulled_as_empty_and_holds_nobody_up(bench: Bench, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert bench.client.pull(str(tmp_path / "pipe"), tmp_path / "got", timeout=20) == 0
    assert bench.client.execute(["true"], timeout=20).exit_code == 0


def test_the_longest_name_goes_there_and_back(bench: Bench, tmp_path: Path) -> None:
    name = "n" * 255
    (tmp_path / "source").write_bytes(b"content")
    bench.client.push(tmp_path / "source", str(tmp_path / name), timeout=20)
    (tmp_path / "back").mkdir()
    assert bench.client.pull(str(tmp_path / name), tmp_path / "back" / name, timeout=20) == 7


def test_much_input_and_much_output_at_the_same_time(bench: Bench) -> None:
    data = os.urandom(3 * framing.WINDOW + 17)
    assert bench.client.execute(["cat"], stdin=data, timeout=60).stdout == data


def test_a_command_that_ignores_its_input_does_not_block(bench: Bench) -> None:
    assert bench.client.execute(["true"], stdin=bytes(4 * framing.WINDOW), timeout=60).exit_code == 0


def test_a_daemon_left_behind_does_not_hold_up_its_command(bench: Bench) -> None:
    began = time.monotonic()
    result = bench.client.execute(sh("sleep 30 & echo $!"), timeout=20)
    assert time.monotonic() - began < 15
    os.kill(int(result.out), signal.SIGKILL)


def test_many_commands_at_once_keep_their_outputs_apart(bench: Bench) -> None:
    processes = [bench.client.spawn(sh(f"for i in 1 2 3; do echo {n}; done")) for n in range(20)]
    assert [p.wait(60).out for p in processes] == [f"{n}\n" * 3 for n in range(20)]


def test_a_timeout_kills_the_whole_group(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        bench.client.execute(sh(f"sleep 1000 & echo $! > {tmp_path}/pid; wait"), timeout=1)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_spawned_output_comes_line_by_line_and_input_goes_in(bench: Bench) -> None:
    process = bench.client.spawn(["cat"], stdin=True)
    lines = process.lines(20)
    for word in ("one", "two"):
        process.write(f"{word}\n".encode())
        assert next(lines) == word
    assert process.poll() is None
    process.close_stdin()
    assert list(lines) == []
    assert process.wait(20).exit_code == 0


def test_output_that_nobody_reads_holds_the_command_up(bench: Bench) -> None:
    process = bench.client.spawn(sh("yes"), limit=framing.WINDOW)
    seen = -1
    while len(process.output_so_far()[0]) != seen:
        seen = len(process.output_so_far()[0])
        time.sleep(0.3)
    assert framing.WINDOW <= seen <= 3 * framing.WINDOW
    process.kill()
    assert process.wait(20).exit_code == -9


@pytest.mark.parametrize("size", [0, 1, framing.MAX_PAYLOAD, 3 * framing.WINDOW + 5])
def test_files_go_there_and_back_with_their_mode(bench: Bench, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    source.chmod(0o751)
    seen: list[tuple[int, int]] = []
    assert bench.client.push(source, f"{tmp_path}/there", timeout=60, progress=lambda *x: seen.append(x)) == size
    assert bench.client.pull(f"{tmp_path}/there", tmp_path / "back", timeout=60) == size
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert (tmp_path / "back").stat().st_mode & 0o7777 == 0o751
    assert not size or seen[-1] == (size, size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "source", "there"]


def test_a_file_that_cannot_be_written_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(4 * framing.WINDOW))
    with pytest.raises(AgentFault, match="No such file"):
        bench.client.push(source, f"{tmp_path}/no/such/place", timeout=20)
    with pytest.raises(AgentFault, match="Is a directory"):
        bench.client.push(source, str(tmp_path), timeout=20)
    with pytest.raises(AgentFault, match="No such file"):
        bench.client.pull(f"{tmp_path}/missing", tmp_path / "x", timeout=20)
    with pytest.raises(HostFault, match="cannot read"):
        bench.client.push(tmp_path / "missing", f"{tmp_path}/x")
    with pytest.raises(HostFault, match="cannot write"):
        bench.client.pull(str(source), tmp_path / "no" / "x", timeout=20)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_link_serves_others_during_a_long_transfer(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(64 * framing.WINDOW))
    pusher = threading.Thread(target=bench.client.push, args=(source, f"{tmp_path}/there"))
    pusher.start()
    rounds = 0
    while pusher.is_alive():
        bench.client.ping(20)
        rounds += 1
    assert rounds > 3


def test_an_agent_that_is_killed_fails_every_call_at_once(bench: Bench) -> None:
    process = bench.client.spawn(["sleep", "1000"])
    waiter: list[BaseException] = []

    def wait() -> None:
        try:
            process.wait(60)
        except TestbedError as error:
            waiter.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not process.pid:
        process.output_so_far()
    bench.process.kill()
    bench.process.wait()
    bench.theirs.close()
    thread.join(10)
    assert [type(error) for error in waiter] == [AgentLost]
    with pytest.raises(AgentLost):
        bench.client.ping()
    os.kill(process.pid, signal.SIGKILL)


def test_an_agent_that_starts_again_is_found_even_in_the_middle_of_a_frame(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(64 * framing.WINDOW))
    failed: list[BaseException] = []

    def push() -> None:
        try:
            bench.client.push(source, f"{tmp_path}/there")
        except TestbedError as error:
            failed.append(error)

    pusher = threading.Thread(target=push)
    pusher.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".push.*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    bench.process.kill()
    bench.process.wait()
    bench.process = bench.start_agent()
    pusher.join(20)
    assert [type(error) for error in failed] == [AgentLost]
    assert bench.client.execute(sh("echo again"), timeout=20).out == "again\n"
    assert not (tmp_path / "there").exists()


def test_a_new_host_ends_what_the_one_before_had_begun(bench: Bench) -> None:
    process = bench.client.spawn(["sleep", "1000"])
    while not process.pid:
        process.output_so_far()
    with bench.client._changed:
        bench.client._restart("another host took over")
        bench.client._wake()
    assert bench.client.execute(["true"], timeout=20).exit_code == 0
    with pytest.raises(AgentLost):
        process.wait(1)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize(("frame", "why"), [
    (framing.encode(0, 0, framing.READY, b"[1]"), "not a JSON object"),
    (framing.encode(0, 0, framing.READY, b"{"), "what makes no sense"),
    (framing.encode_json(0, 0, framing.READY, surprise=1), "what makes no sense"),
    (framing.encode_json(0, 0, framing.READY, protocol=99, boot_id="", uptime=0.0, kernel="", python="", host="",
                         pid=1), "protocol 99"),
])
def test_an_agent_that_talks_nonsense_fails_its_callers_at_once(frame: bytes, why: str) -> None:
    ours, theirs = socket.socketpair()
    client = AgentClient(ours, "liar", lost=AgentLost, hung=GuestHung, running=lambda: True, on_ready=lambda _: None)
    theirs.sendall(frame)
    with pytest.raises(AgentLost, match=why):
        client.wait_ready(20)
    client.close()
    theirs.close()


def test_silence_is_a_hang_unless_the_machine_is_paused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.agent.PING_AFTER", 0.2)
    bench.client.hang_limit = 0.5
    bench.process.send_signal(signal.SIGSTOP)
    bench.running = False
    with pytest.raises(TimeoutError):
        bench.client.execute(["true"], timeout=2)
    bench.running = True
    with pytest.raises(GuestHung, match="said nothing"):
        bench.client.execute(["true"], timeout=20)
    bench.process.send_signal(signal.SIGCONT)
    assert bench.client.execute(["true"], timeout=20).exit_code == 0


def test_a_slow_command_is_no_hang(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.agent.PING_AFTER", 0.1)
    bench.client.hang_limit = 0.5
    assert bench.client.execute(["sleep", "2"], timeout=20).exit_code == 0


def test_the_agent_does_not_switch_off_a_real_machine(bench: Bench) -> None:
    bench.client.poweroff()
    assert bench.client.ping() > 0


def test_this_machine_keeps_its_identity(bench: Bench) -> None:
    before = (os.uname().nodename, Path("/proc/sys/kernel/random/boot_id").read_text())
    identity = {"name": "other", "boot_id": str(uuid.uuid4()), "machine_id": "0" * 32}
    with pytest.raises(AgentFault, match="not in a virtual machine") as caught:
        bench.client.identify(**identity, entropy=bytes(32), timeout=20)
    assert caught.value.errno == errno.EPERM
    assert (os.uname().nodename, Path("/proc/sys/kernel/random/boot_id").read_text()) == before
