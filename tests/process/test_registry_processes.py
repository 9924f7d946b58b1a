"""The registry between host processes as domains: who dies, who floods, who writes rubbish, and what others notice."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import DEADLINE, alive, descriptors, running, until
from typer.testing import CliRunner

from host.errors import RegionError, ServerError
from host.ivshmem.client import join
from host.region import RegionSpec
from host.registry import CHANNEL, MEMBER
from idc.channel import MessageChannel
from idc.domain import Domain, Service
from idc.endpoint import Completion, Quotas, Resources, Result
from idc.endpoint.blocking import Caller
from idc.errors import DeniedError, MisuseError, NoSuchKeyError, RegistryError, TimedOutError, TransactionError
from idc.layout import PAGE, ChannelSpec, Kind, Rights
from idc.registry import Event, Permissions, Permit, Registry
from idc.registry.frames import Fault, Op, Request
from idc.transport.address import open_port
from testbed import cli_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.region import RegionService

PROGRAM = Path(__file__).with_name("registry_domain.py")


class Bench:
    """A region service with a registry, and domains made when they are named."""

    def __init__(self, service: RegionService, held: ExitStack) -> None:
        self.service = service
        self._held = held

    def address(self, name: str) -> str:
        """Where the domain meets the registry; makes its control region."""
        if f"control-{name}" not in self.service._call({"op": "list"})["regions"]:
            self.service.control(name)
        return f"member:{self.service.log.parent}/{name}@control-{name}.sock/{CHANNEL}"

    def join(self, name: str, timeout: float = DEADLINE) -> Registry:
        """The domain, in this process."""
        return self._held.enter_context(Registry(open_port(self.address(name)), timeout=timeout))

    def host(self) -> Registry:
        """A host process, this one."""
        return self._held.enter_context(Registry(open_port(f"unix:{self.service.registry_socket}"), timeout=DEADLINE))

    def start(self, mode: str, name: str, *more: str) -> subprocess.Popen[str]:
        """The domain, in a process of its own."""
        process = subprocess.Popen([sys.executable, str(PROGRAM), mode, self.address(name), *more],
                                   stdout=subprocess.PIPE, text=True)
        self._held.callback(end, process)
        return process

    @property
    def log(self) -> str:
        """What the registry said."""
        return (self.service.log.parent / "registry.log").read_text()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextmanager
def bench(*options: str) -> Iterator[Bench]:
    with running() as service:
        service.start_registry(*options)
        with ExitStack() as held:
            here = Bench(service, held)
            try:
                yield here
            finally:
                sys.stdout.write(f"{here.log}\nruns: {alive(service.registry_pid)}\n")  # shown if the test fails
        assert "Traceback" not in here.log, here.log
        assert alive(service.registry_pid)


def pump_until(registry: Registry, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        registry.pump(0.05)


def test_a_domain_is_who_its_control_region_says_and_reads_what_it_may() -> None:
    with bench() as here:
        front, back, host = here.join("front"), here.join("back"), here.host()
        assert (front.domain, back.domain, host.domain) == ("front", "back", "host")
        front.write("/domain/front/secret", "x")
        for call in (lambda: back.read("/domain/front/secret"), lambda: back.write("/domain/front/secret", ""),
                     lambda: back.list("/domain/front"), lambda: back.rm("/domain/front/secret")):
            with pytest.raises(DeniedError):
                call()
        events: list[Event] = []
        back.watch("/domain/front", events.append)
        front.set_permissions("/domain/front/secret", Permissions("front", Permit.READ))
        pump_until(back, lambda: len(events) == 2)
        assert back.read("/domain/front/secret") == b"x"


def test_ephemeral_nodes_vanish_when_their_domain_is_killed_and_watchers_are_told() -> None:
    with bench() as here:
        host = here.host()
        events: list[Event] = []
        host.watch("/domain/front/up", events.append)
        for count in range(1, 4):
            process = here.start("ephemeral", "front")
            assert line(process) == "up"
            assert host.read("/domain/front/up") == b"1"
            process.kill()
            pump_until(host, lambda: not host.exists("/domain/front/up"))
            pump_until(host, lambda count=count: len(events) >= 2 * count + 1)  # type: ignore[misc]
            process.wait()
        assert host.list("/domain/front") == ["stays"]


def test_a_home_ends_with_its_control_region() -> None:
    with bench() as here:
        host = here.host()
        assert here.join("front").home == "/domain/front"
        host.write("/domain/front/k", "")
        here.service.drop("control-front")
        pump_until(host, lambda: not host.exists("/domain/front"))
        here.address("front")
        pump_until(host, lambda: host.exists("/domain/front"))
        assert host.list("/domain/front") == []


def test_a_stopped_watcher_holds_up_nobody_and_is_told_in_the_end() -> None:
    with bench() as here:
        process = here.start("watcher", "front")
        host = here.host()
        assert line(process) == "/domain/front 0"
        process.send_signal(signal.SIGSTOP)
        assert host.domain == "host"  # it is connected
        before = descriptors(here.service.registry_pid)
        for number in range(300):
            host.write("/domain/front/n", str(number))
        host.write("/domain/front/last", "")
        assert descriptors(here.service.registry_pid) == before
        process.send_signal(signal.SIGCONT)
        told = 0
        while told < 301:
            told += int(line(process).split()[1])
        assert told == 301


def test_killed_under_traffic_nothing_acknowledged_is_lost_and_no_other_connection_ends() -> None:
    echo = Service("echo")
    with bench() as here, ExitStack() as held:
        channel = ChannelSpec("echo", Kind.MESSAGE, "server", "client", 128 * 512, 512)
        region = here.service.create(RegionSpec("link", 1 << 20, dict.fromkeys(("server", "client"), Rights.RW),
                                                [channel]))
        server = here.start("serve", "server", f"member:{region.socket('server')}/echo")
        assert line(server) == "serving"
        domain = Domain({}, registry=here.address("client"))
        held.callback(domain.close)
        caller = held.enter_context(domain.connect(echo))  # found in the registry
        assert caller.transact(b"abc", timeout=DEADLINE) == b"cba"
        writer = here.start("numbers", "front")
        host = here.host()
        assert line(writer) == "1"
        host.write("/kept", "for good")
        for _ in range(8):
            last = int(line(writer))
            os.kill(here.service.registry_pid, signal.SIGKILL)
            assert caller.transact(b"abc", timeout=DEADLINE) == b"cba"
            here.service.restart_registry()
            assert int(host.read("/domain/front/n")) >= last
        assert host.read("/kept") == b"for good"
        assert caller.endpoint.connections == 1
        # the server's offer is ephemeral, and its link is back in the same session: it was never gone
        assert host.read("/domain/server/service/echo/client/at") == b"link/echo"
        server.kill()
        pump_until(host, lambda: not host.exists("/domain/server/service/echo/client/at"))


def test_a_full_disk_fails_changes_and_nothing_else() -> None:
    with bench() as here:
        host, front = here.host(), here.join("front")
        front.write("/domain/front/k", "before")
        _, hard = resource.prlimit(here.service.registry_pid, resource.RLIMIT_FSIZE)
        resource.prlimit(here.service.registry_pid, resource.RLIMIT_FSIZE, (100, hard))
        for _ in range(3):
            with pytest.raises(RegistryError, match="write /domain/front/k: the registry cannot write: File too large"):
                front.write("/domain/front/k", "meanwhile")
        assert host.read("/domain/front/k") == b"before"
        resource.prlimit(here.service.registry_pid, resource.RLIMIT_FSIZE, (hard, hard))
        front.write("/domain/front/l", "after")
        here.service.restart_registry()
        assert (host.read("/domain/front/k"), host.read("/domain/front/l")) == (b"before", b"after")


def test_ephemeral_nodes_of_those_who_died_with_the_registry_vanish_after_a_grace() -> None:
    with bench("--grace", "0.5") as here:
        process, host = here.start("ephemeral", "front"), here.host()
        assert line(process) == "up"
        os.kill(here.service.registry_pid, signal.SIGKILL)
        process.kill()
        here.service.restart_registry()
        pump_until(host, lambda: not host.exists("/domain/front/up"))
        assert host.list("/domain/front") == ["stays"]


def test_a_service_is_found_by_whom_it_is_offered_to_only() -> None:
    with bench() as here:
        channel = ChannelSpec("echo", Kind.MESSAGE, "server", "client", 128 * 512, 512)
        region = here.service.create(RegionSpec("link", 1 << 20, dict.fromkeys(("server", "client"), Rights.RW),
                                                [channel]))
        assert line(here.start("serve", "server", f"member:{region.socket('server')}/echo")) == "serving"
        client, third = Domain({}, registry=here.address("client")), Domain({}, registry=here.address("third"))
        assert client.place(Service("echo")) == f"member:{region.socket('client')}/echo"
        with pytest.raises(TimedOutError, match="nobody offers service 'echo' to third within"):
            third.place(Service("echo"), timeout=0.2)
        with pytest.raises(MisuseError, match="no link to a registry"):
            Domain({}).registry  # noqa: B018
        client.close()
        third.close()


def test_rubbish_all_over_a_control_region_harms_nobody_else() -> None:
    with bench() as here, ExitStack() as held:
        back = here.join("back")
        back.write("/domain/back/k", "v")
        here.address("rogue")
        region = held.enter_context(join(here.service.log.parent / "rogue@control-rogue.sock"))
        entry = next(channel for channel in region.header.channels if channel.name == CHANNEL)
        rubbish = random.Random(11)
        for n in range(60):
            with MessageChannel.begin(region, CHANNEL) as channel:
                pump_until(back, channel.advance)
                if n % 2:
                    region.memory[entry.offset:entry.offset + entry.length] = rubbish.randbytes(entry.length)
                else:
                    for _ in range(5):
                        channel.sender.post(rubbish.randbytes(rubbish.randrange(1, 3000)))
                    channel.sender.flush()
                page = region.memory[:PAGE]
                region.memory[:PAGE] = rubbish.randbytes(16) * (PAGE // 16)
                assert back.read("/domain/back/k") == b"v"
                region.memory[:PAGE] = page


def test_requests_that_are_none_are_refused_one_by_one() -> None:
    with bench() as here:
        address = here.address("rogue")
        accepts = Quotas(0, 32, 512, 4000)
        rubbish = random.Random(5)
        with Caller(open_port(address), Resources(accepts, messages=0)) as rogue:
            sound = Request(Op.WRITE, "/domain/rogue/k", rest=b"value").pack()
            codes = set()
            for n in range(400):
                body = bytearray(sound if n % 2 else rubbish.randbytes(rubbish.randrange(200)))
                for _ in range(rubbish.randrange(1, 4)):
                    if body:
                        body[rubbish.randrange(min(len(body), 20))] = rubbish.randrange(256)
                try:
                    rogue.transact(bytes(body), timeout=DEADLINE)
                except TransactionError as error:
                    codes.add(error.code)
            assert Fault.MALFORMED in codes
            assert codes <= set(Fault)
            assert rogue.endpoint.connections == 1


def test_who_accepts_less_than_an_answer_gets_a_reason_instead() -> None:
    with bench() as here:
        host = here.host()
        address = here.address("small")
        pump_until(host, lambda: host.exists("/domain/small"))
        host.write("/domain/small/k", bytes(300))
        with Caller(open_port(address), Resources(Quotas(0, 32, 512, 100), messages=0)) as small:
            with pytest.raises(TransactionError) as caught:
                small.transact(Request(Op.READ, "/domain/small/k").pack(), timeout=DEADLINE)
            assert caught.value.code == Fault.REFUSED
            assert b"longer than" in caught.value.status


def latencies(registry: Registry, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        registry.read("/domain/back/secret")
        taken.append(time.perf_counter() - began)
    return sorted(taken)


#: A guard against a domain that starves another, which would be hundreds of times. What is wanted is 2, and missed at
#: times on a quiet machine: docs/registry.md has the figures.
GUARD = 5


def percentile(taken: list[float], percent: int) -> float:
    return sorted(taken)[len(taken) * percent // 100]


@pytest.mark.parametrize("kind", ["flood", "trees"])
def test_a_flood_costs_another_domain_little_more_than_a_neighbour_that_spins(kind: str) -> None:
    """Both keep a CPU busy, the flood the registry besides; they take turns, so that both meet the same machine."""
    with bench() as here:
        back = here.join("back")
        back.write("/domain/back/secret", "x")
        spinner, flooder = here.start("spin", "spinner"), here.start(kind, "flooder")
        assert line(spinner) == line(flooder) == "going"
        flooder.send_signal(signal.SIGSTOP)
        ratios: list[float] = []
        # a p99 is at the mercy of whatever else runs here
        while not ratios or (ratios[-1] > GUARD and len(ratios) < 4):
            spin, flood = [], []
            for _ in range(8):
                spin += latencies(back, 400)
                spinner.send_signal(signal.SIGSTOP)
                flooder.send_signal(signal.SIGCONT)
                flood += latencies(back, 400)
                flooder.send_signal(signal.SIGSTOP)
                spinner.send_signal(signal.SIGCONT)
            ratios.append(percentile(flood, 99) / percentile(spin, 99))
        sys.stdout.write(f"p99 of a read under a flood by that beside a spinner: {ratios}\n")
        assert ratios[-1] <= GUARD, ratios
        host = here.host()
        assert 1 < len(host.list("/domain/flooder")) < 1024
        assert int.from_bytes(host.read("/domain/flooder/x")[:8], "little") > 100  # it was busy


def test_a_flooder_killed_with_all_its_requests_under_way_can_come_back() -> None:
    with bench() as here:
        host = here.host()
        for _ in range(5):
            flooder = here.start("flood", "flooder")
            assert line(flooder) == "going"
            time.sleep(0.02)
            flooder.kill()
            flooder.wait()
            with Registry(open_port(here.address("flooder")), timeout=DEADLINE) as again:
                again.write("/domain/flooder/x", "y", ephemeral=True)
            pump_until(host, lambda: not host.exists("/domain/flooder/x"))


def test_a_home_is_there_for_the_first_request_of_a_domain() -> None:
    with bench() as here:
        for index in range(8):
            assert here.join(f"d{index}").list(f"/domain/d{index}") == []


def test_a_flood_is_held_up_at_the_one_who_floods() -> None:
    with bench() as here:
        front = here.join("front")
        front.write("/domain/front/k", "")
        done: deque[Completion] = deque()
        sent = 0
        while front.submit(Request(Op.READ, "/domain/front/k"), done.append) is Result.OK:
            sent += 1
        assert sent == 16
        assert front.submit(Request(Op.READ, "/domain/front/k"), done.append) is Result.BACK_PRESSURED
        pump_until(front, lambda: len(done) == sent)


def test_mistakes_of_whoever_sets_it_up() -> None:
    with running() as service:
        with pytest.raises(ServerError, match="no registry was started"):
            _ = service.registry_pid
        for name in (MEMBER, "broker", "host"):
            with pytest.raises(RegionError, match="a name of the host's own"):
                service.control(name)
        with pytest.raises(ServerError, match=r"the registry ended with code 2(.|\n)*--nodes 0: must be more than 0"):
            service.start_registry("--nodes", "0")
        service.registry_directory.mkdir()
        (service.registry_directory / "tree").write_bytes(b"rubbish")
        with pytest.raises(ServerError, match="is damaged at byte 0: bring back a copy of it, or remove it"):
            service.start_registry()
        (service.registry_directory / "tree").unlink()
        service.start_registry()
        with pytest.raises(ServerError, match="runs already"):
            service.start_registry()
        until("it serves", service.registry_socket.exists)


def test_the_command_shows_and_changes_keys_as_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as here:
        front = here.join("front")
        front.write("/domain/front/a", "1")
        front.set_permissions("/domain/front/a", Permissions("front", Permit.READ, (("back", Permit.BOTH),)))
        monkeypatch.setattr(cli_registry, "_open",
                            lambda _bed: Registry(open_port(f"unix:{here.service.registry_socket}")))

        def command(*words: str) -> str:
            result = CliRunner().invoke(cli_registry.app, list(words))
            if result.exception is not None:
                raise result.exception
            return result.output

        assert command("ls", "/domain/front").splitlines()[1].split() == [
            "/domain/front/a", "1", "front:", "back", "both,", "others", "read"]
        assert command("get", "/domain/front/a") == "1\n"
        command("set", "/domain/front/b/c", "two words")
        assert front.read("/domain/front/b/c") == b"two words"
        rows = json.loads(command("ls", "-r", "--json"))
        assert [row["path"] for row in rows] == ["/domain", "/domain/front", "/domain/front/a", "/domain/front/b",
                                                 "/domain/front/b/c"]
        assert command("watch", "/domain/front", "-n", "1") == "/domain/front 0\n"
        command("rm", "/domain/front/b")
        with pytest.raises(NoSuchKeyError, match="rm /domain/front/b: there is no node /domain/front/b"):
            command("rm", "/domain/front/b")
