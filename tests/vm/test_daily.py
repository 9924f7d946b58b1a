"""The commands of every day, on a real testbed of two VMs: up, ps, exec, cp, logs, console, ssh, plug, dump, down."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.bed import Testbed

Result = subprocess.CompletedProcess[str]
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-P", "-m", "testbed.cli"]


class Cli:
    """The `testbed` command with a runtime directory of its own, so that it meets nobody else's testbeds."""

    def __init__(self, runtime: str) -> None:
        self.base = Path(runtime, "idc-testbed")
        self.env = {**os.environ, "XDG_RUNTIME_DIR": runtime, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([*COMMAND, *words], env=self.env, text=True, **(pipes | options))

    def __call__(self, *words: str, stdin: str = "", code: int | None = 0, timeout: float = 200) -> Result:
        result = subprocess.run([*COMMAND, *words], env=self.env, text=True, input=stdin, capture_output=True,
                                timeout=timeout, check=False)
        assert code is None or result.returncode == code, result
        return result

    def bed(self) -> dict[str, Any]:
        (bed,) = json.loads(self("ps", "--json").stdout)
        return dict(bed)


@pytest.fixture(scope="module")
def runtime() -> Iterator[str]:
    # not pytest's own directory: its path is too long for sockets
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory:
        yield directory


@pytest.fixture(scope="module")
def cli(runtime: str) -> Iterator[Cli]:
    cli = Cli(runtime)
    try:
        cli("up", "--name", "day")
        yield cli
    finally:
        cli("down", "--all", "--force")


@pytest.fixture
def fresh(runtime: str) -> Iterator[Cli]:
    """A runtime directory without a testbed; what a test starts there is ended."""
    directory = tempfile.mkdtemp(dir=runtime)
    cli = Cli(directory)
    yield cli
    cli("down", "--all", "--force")


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)


def test_ps_shows_vms_and_who_is_present(cli: Cli) -> None:
    bed = cli.bed()
    assert bed["name"] == "day"
    assert [(vm["name"], vm["state"]) for vm in bed["vms"]] == [("front", "running"), ("back", "running")]
    assert all(member["present"] and member["plugged"] for member in bed["regions"][0]["members"])
    text = cli("ps").stdout
    assert "front rw, back rw" in text


def test_exec_gives_output_input_and_exit_code(cli: Cli) -> None:
    result = cli("exec", "front", "--", "cat; echo err >&2; exit 7", stdin="typed\n", code=7)
    assert (result.stdout, result.stderr) == ("typed\n", "err\n")
    assert cli("exec", "day/back", "--", "hostname").stdout == "back\n"
    assert cli("exec", "back", "printf", "%s|", "a b", "-c").stdout == "a b|-c|"
    assert cli("exec", "--cwd", "/tmp", "--env", "X=1 2", "back", "--", "pwd; echo $X").stdout == "/tmp\n1 2\n"
    assert "cannot start 'no-such-command'" in cli("exec", "back", "no-such-command", "x", code=127).stderr
    assert cli("exec", "back", "--", "kill -9 $$", code=137).stdout == ""


def test_exec_moves_bytes_both_ways_and_stops_when_its_reader_does(cli: Cli) -> None:
    data = os.urandom(3_000_000)
    both = subprocess.run([*COMMAND, "exec", "front", "cat", "-"], env=cli.env, input=data, capture_output=True,
                          timeout=100, check=True)
    assert hashlib.sha256(both.stdout).digest() == hashlib.sha256(data).digest()
    endless = cli.popen("exec", "front", "--", "exec yes")
    assert endless.stdout is not None
    assert endless.stdout.readline() == "y\n"
    endless.stdout.close()
    assert endless.wait(30) == 128 + signal.SIGPIPE
    assert endless.stderr is not None
    assert endless.stderr.read() == ""
    endless.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_ctrl_c_and_death_end_the_remote_command(cli: Cli, number: int, code: int) -> None:
    process = cli.popen("exec", "front", "--", f"echo up; exec sleep 77{number}")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    eventually(lambda: cli("exec", "front", "--", f"pgrep -f '[s]leep 77{number}'", code=None).returncode == 1)


def test_ctrl_c_ends_a_command_that_ignores_it(cli: Cli) -> None:
    process = cli.popen("exec", "front", "--", "trap '' INT; echo up; while :; do sleep 1; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 137


def test_cp_both_ways_and_its_errors(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "file with blanks"
    source.write_bytes(os.urandom(1_000_000))
    cli("cp", str(source), "front:/tmp/")
    cli("cp", "front:/tmp/file with blanks", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    error = cli("cp", "front:/nope", str(tmp_path / "never"), code=1).stderr
    assert error.startswith("error: VM front: pull of /nope")
    assert error.count("\n") == 1
    assert not (tmp_path / "never").exists()
    cli("cp", str(source), str(tmp_path / "x"), code=1)
    assert "is a directory; try: tar" in cli("cp", str(tmp_path), "front:/tmp", code=1).stderr


def test_cp_does_not_replace_a_device(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    error = cli("cp", "front:/etc/hostname", str(tmp_path / "fifo"), code=1).stderr
    assert "fifo: it is there and is no regular file" in error
    assert error.count("\n") == 1
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_logs_and_console(cli: Cli) -> None:
    assert "front is a clone of template" in cli("logs", "front").stdout
    follow = cli.popen("logs", "-f", "back")
    console = cli.popen("console", "back", stdin=subprocess.PIPE)
    assert console.stdin is not None
    assert console.stdout is not None
    console.stdin.write("\n\necho con$((20 + 3))sole\n")
    console.stdin.flush()
    eventually(lambda: "con23sole" in cli("logs", "back").stdout)
    console.stdin.write("\x1d")
    out, err = console.communicate(timeout=30)
    assert "con23sole" in out, err
    assert console.returncode == 0
    follow.terminate()
    assert "con23sole" in follow.communicate(timeout=30)[0]


def test_ssh_needs_no_network(cli: Cli) -> None:
    result = cli("ssh", "front", "--", "hostname; exit 4", code=4)
    assert result.stdout == "front\n"
    assert result.stderr == ""
    assert cli("exec", "front", "--", "ls /sys/class/net").stdout.split() == ["lo"]


def test_unplug_plug_and_their_errors(cli: Cli) -> None:
    devices = "cat /sys/bus/pci/devices/*/device | grep -c 0x1110"
    cli("unplug", "day-region", "front", code=1)
    cli("unplug", "front-back", "front")
    assert cli("exec", "front", "--", devices, code=1).stdout == "0\n"
    assert "is not plugged into front" in cli("unplug", "front-back", "front", code=1).stderr
    member = cli.bed()["regions"][0]["members"][0]
    assert not member["present"]
    assert not member["plugged"]
    cli("plug", "front-back", "front")
    assert "plugged into front already" in cli("plug", "front-back", "front", code=1).stderr
    eventually(lambda: cli("exec", "front", "--", devices, code=None).stdout == "1\n")


def test_dump_live_and_from_a_file(cli: Cli, tmp_path: Path) -> None:
    text = cli("dump", "front-back").stdout
    assert "member 0 front: rw, present" in text
    assert "no inconsistency found" in text
    assert json.loads(cli("dump", "day/front-back", "--json").stdout)["header"]["members"][1]["name"] == "back"
    (tmp_path / "raw").write_bytes(os.urandom(8192))
    assert "! header page" in cli("dump", str(tmp_path / "raw"), code=1).stdout
    assert "no region of a running testbed; did you mean 'front-back'?" in cli("dump", "frontback", code=1).stderr


def test_dump_says_that_a_bundle_must_be_unpacked(cli: Cli, tmp_path: Path) -> None:
    cli("bundle", "day", "-o", str(tmp_path / "b.tar.gz"))
    error = cli("dump", str(tmp_path / "b.tar.gz"), code=1).stderr
    assert error.startswith(f"error: {tmp_path}/b.tar.gz is packed; try: unpack it with tar -xf")
    assert error.count("\n") == 1


def test_bundle_has_it_all(cli: Cli, tmp_path: Path) -> None:
    archive = tmp_path / "b.tar.gz"
    assert cli("bundle", "day", "-o", str(archive)).stdout == f"{archive}\n"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        header = tar.extractfile("b/regions/front-back.header")
        assert header is not None
        assert len(header.read()) == 4096
    assert {"versions.txt", "doctor.json", "status.json", "run/front.console.log", "run/topology.toml",
            "qmp/back/query-status.json", "qmp/back/query-pci.json", "regions/front-back.txt"} <= names
    assert os.listdir(tmp_path) == ["b.tar.gz"]
    assert "cannot write" in cli("bundle", "day", "-o", "/proc/b.tar.gz", code=1).stderr


def test_transfer_uses_the_vms_that_run(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(os.urandom(2_000_000))
    ends = ("--from", "front", "--to", "day/back")
    done = cli("transfer", str(source), *ends, "--save", str(tmp_path / "got"), "--json")
    assert "VMs of testbed day" in done.stderr
    told = json.loads(done.stdout)
    assert (told["path"], told["sha256"]) == ("ivshmem", hashlib.sha256(source.read_bytes()).hexdigest())
    assert (tmp_path / "got").read_bytes() == source.read_bytes()
    assert cli("exec", "front", "--", "ls -d /tmp/transfer.*", code=2).stdout == ""
    assert [region["name"] for region in cli.bed()["regions"]] == ["front-back"]
    tcp = cli("transfer", str(source), "--from", "front", "--to", "back", "--tcp", code=1)
    assert "share no network" in tcp.stderr
    assert "did you mean 'back'" in cli("transfer", str(source), "--from", "front", "--to", "bak", code=1).stderr
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    huge = cli("transfer", str(tmp_path / "huge"), "--from", "front", "--to", "back", code=1)
    assert "1024 MiB do not fit into the memory of VM front" in huge.stderr


def test_names_that_are_not_there_or_taken(cli: Cli) -> None:
    assert "did you mean 'front'?" in cli("exec", "frnt", "true", code=255).stderr
    assert "no testbed 'dy' runs; did you mean 'day'?" in cli("down", "dy", code=1).stderr
    error = cli("up", "--name", "day", code=1).stderr
    assert "a testbed 'day' runs already" in error
    assert error.count("\n") == 1


def test_a_vm_that_dies_during_exec(fresh: Cli) -> None:
    fresh("up", "-q")
    bed = fresh.bed()
    process = fresh.popen("exec", "front", "--", "echo up; exec sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.kill(bed["vms"][0]["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 255
    assert err.startswith("error: VM front: QEMU ended (signal SIGKILL)")
    assert f"{bed['directory']}/front.console.log" in err
    assert err.count("\n") == 1
    assert fresh.bed()["vms"][0]["state"].startswith("ended: QEMU ended")
    assert fresh("exec", "back", "echo", "well").stdout == "well\n"
    # a failure's logs stay, and make a bundle
    kept = fresh("down").stdout.split()[-1]
    assert Path(kept, "front.console.log").stat().st_size > 0
    fresh("bundle", kept, "-o", f"{kept}/late.tar.gz")


@pytest.mark.parametrize("force", [False, True])
def test_nothing_outlives_a_killed_supervisor(fresh: Cli, force: bool) -> None:
    fresh("up", "-q")
    bed = fresh.bed()
    qemu = [vm["pid"] for vm in bed["vms"]]
    if force:
        fresh("down", "--force")
    else:
        os.kill(bed["pid"], signal.SIGKILL)
    eventually(lambda: not Path(bed["directory"]).exists())
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in qemu)
    assert fresh("ps", "--json").stdout == "[]\n"


def test_an_interrupted_up_leaves_nothing(fresh: Cli) -> None:
    process = fresh.popen("up")
    assert process.stderr is not None
    assert "booting" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    eventually(lambda: not list(fresh.base.glob("[0-9a-f]*")))


def test_an_up_that_fails_says_why_and_leaves_its_logs_alone(fresh: Cli, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('keep = "never"\n[vms.front]\nextra = ["-device", "no-such-device"]\n')
    error = fresh("up", str(file), code=1).stderr
    assert "error: VM front: QEMU ended (exit code 1)" in error
    assert "no-such-device" in error
    assert not list(fresh.base.glob("[0-9a-f]*"))


def test_a_topology_with_all_there_is(fresh: Cli, tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    (tmp_path / "disk").write_bytes(b"disk" * 4096)
    text = (ROOT / "docs" / "examples" / "cache.toml").read_text()
    text = text.replace("[vms.reader1]", f"[vms.reader1]\npin = [{cpu}]\ndisks = [{{path = 'disk', readonly = true}}]")
    text = text.replace("[links.requests1]", "[links.requests1]\ndoorbells = [{drop = 1.0}]")
    text = text.replace("[vms.reader2]", "[vms.reader2]\ngdb = 'on'")
    text += "[networks.out]\nkind = 'user'\nmembers = ['reader1']\n"
    (tmp_path / "all.toml").write_text(text)
    said = fresh("up", str(tmp_path / "all.toml")).stderr
    bed = fresh.bed()
    assert f"VM reader2: gdb: target remote {bed['directory']}/reader2.gdb\n" in said
    assert bed["name"] == "all"
    regions = {region["name"]: {m["name"]: m["plugged"] for m in region["members"]} for region in bed["regions"]}
    assert regions["pages"] == {"cache": True, "reader1": True, "reader2": True}
    assert regions["spare"] == {"reader1": False, "reader2": False}
    faults = {region["name"]: {(pair["from"], pair["to"]) for pair in region["doorbell_faults"]}
              for region in bed["regions"]}
    assert faults.pop("requests1") == {("reader1", "cache"), ("cache", "reader1")}
    assert not any(faults.values())
    assert Path(bed["directory"], "reader2.gdb").is_socket()
    fresh("plug", "spare", "reader1")
    assert "has no member 'cache'" in fresh("plug", "spare", "cache", code=1).stderr
    assert fresh("exec", "reader1", "--", "head -c 4 /dev/vdb").stdout == "disk"
    assert fresh("exec", "cache", "nproc").stdout == "2\n"
    assert "10.78.1.15/24" in fresh("exec", "reader1", "--", "busybox ip address").stdout
    assert "via 10.78.1.2" in fresh("exec", "reader1", "--", "busybox ip route").stdout
    lan = next(net for net in bed["networks"] if net["name"] == "lan")
    address = lan["addresses"][2].partition("/")[0]
    fresh("exec", "cache", "--", f"busybox ping -c 1 -w 20 {address}")
    pid = next(vm["pid"] for vm in bed["vms"] if vm["name"] == "reader1")
    threads = [task for task in Path(f"/proc/{pid}/task").iterdir() if (task / "comm").read_text().startswith("CPU 0")]
    assert [os.sched_getaffinity(int(task.name)) for task in threads] == [{cpu}]


def test_paramiko_logs_in(image: object) -> None:
    with Testbed(keep="never") as bed:
        (vm,) = bed.boot("lone")
        client = vm.ssh()
        try:
            _, stdout, _ = client.exec_command("hostname", timeout=60)
            assert stdout.read() == b"lone\n"
            with client.open_sftp() as files, files.open("/tmp/x", "w") as file:
                file.write("over sftp")
            assert vm.succeed("cat /tmp/x") == "over sftp"
        finally:
            client.close()
