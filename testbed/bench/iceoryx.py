"""iceoryx2 between two processes of this machine, by its own Python package: the strongest peer that is no socket.

    python3 -m testbed.bench.iceoryx near|far ROOT PREFIX rtt|stream SIZE COUNT     is one end

The package is no dependency of ours: where it is missing there is no such row, and that is said. Both ends loan, copy
in, send, poll for what comes, copy out; nothing is lost on the way (no overflow, the sender waits). Depends on iceoryx2
and `testbed.bench.subjects`.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idc.measure.worker import unpack_samples
from testbed.bench import words
from testbed.bench.errors import BenchFailed, PeerFailed
from testbed.bench.places import places_for_each
from testbed.bench.subjects import MOST_SAMPLES, WARM_PART, Key, Taken

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.bench.places import Place
    from testbed.run import Run

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "iceoryx2"
SHARED = Path("/dev/shm")
#: Messages that may be under way in a stream.
DEPTH = 16
LIMIT_SECONDS = 60.0
_HELLO, _BEGIN = b"h", b"b"


def why_absent() -> str:
    """Empty where the package is."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"its Python package is not installed (pip install {PACKAGE})"
    return ""


def iceoryx(place: Place, name: str, size: int) -> list[Iceoryx]:
    """It, at a place where it can be."""
    if place.run is None:
        return []
    if reason := why_absent():
        place.miss(f"iceoryx2: {reason}")
        return []
    return [Iceoryx(place.run, name, size, places_for_each())]


class Iceoryx:
    """Two processes of their own for each take.

    Args:
        run: what they belong to.
        name: "rtt" or "stream".
        size: bytes of a message.
        pins: a CPU for each, or None.
    """

    def __init__(self, run: Run, name: str, size: int, pins: tuple[int | None, int | None]) -> None:
        unit = "ns" if name == "rtt" else "B/s"
        self.key = Key(name, "iceoryx2", "poll", "python", size, unit)
        self.variant = ""
        self.note = "its Python package, publish and subscribe"
        self.per = 1
        self._run = run
        self._pins = pins
        self._ns = 0.0

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        first = 500
        self._ns = self._both(first)["ns"] / first
        count = max(int(seconds * 1e9 / 4 / self._ns), first)
        self._ns = self._both(count)["ns"] / count
        return first + count

    def take(self, seconds: float) -> Taken:
        """See `Subject`."""
        count = max(int(seconds * 1e9 / self._ns), 100)
        if self.key.unit == "ns":
            count = min(count, MOST_SAMPLES)
        answer = self._both(count)
        # As the ends count it, around the operations that count alone; the host counts such processes alike.
        units = count * (self.key.size / 1e9 if self.key.unit == "B/s" else 1e-3)
        used = {"near": answer["cpu"], "far": answer["far_cpu"]}
        used |= {f"host_{place}": seconds for place, seconds in used.items()}
        taken = Taken(warmup=warm_of(count), used=used, host_units=units, own_units=units)
        if self.key.unit == "ns":
            taken.samples = unpack_samples(answer)
        else:
            taken.value = count * self.key.size / (answer["ns"] / 1e9)
        return taken

    def _both(self, count: int) -> dict[str, Any]:
        """What near found, and what far used. Raises PeerFailed: it is their program, and none of our rows."""
        try:
            return self._ends(count)
        except BenchFailed as error:
            raise PeerFailed(f"iceoryx2, {self.key.name} of {words.size(self.key.size)}: {error.message}",
                             self) from error

    def _ends(self, count: int) -> dict[str, Any]:
        prefix = f"idcb{secrets.token_hex(4)}_"
        root = self._run.directory / PACKAGE
        log = self._run.path("iceoryx2.log")
        argv = [sys.executable, "-m", "testbed.bench.iceoryx"]
        where = [str(root), prefix, self.key.name, str(self.key.size), str(count)]
        ends: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("wb") as errors:
                for role, pin in zip(("far", "near"), reversed(self._pins), strict=True):
                    ends.append(self._run.popen([*argv, role, *where, str(-1 if pin is None else pin)],
                                                stdout=subprocess.PIPE, stderr=errors, cwd=ROOT))  # fmt: skip
            output, _ = ends[1].communicate(timeout=LIMIT_SECONDS)
            code, there = ends[1].returncode, b""
            if code == 0:
                there, _ = ends[0].communicate(timeout=LIMIT_SECONDS)
                code = ends[0].returncode
        except subprocess.TimeoutExpired:
            raise BenchFailed(f"it did not finish in {LIMIT_SECONDS:g} s") from None
        finally:
            for end in ends:
                end.kill()
                end.wait()
                if end.stdout is not None:
                    end.stdout.close()
            for left in SHARED.glob(f"{prefix}*"):
                left.unlink(missing_ok=True)
        if code != 0:
            said = log.read_text("utf-8", "replace").strip().splitlines()
            raise BenchFailed(f"it ended with {code}: {said[-1] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(output)
        return answer | {"far_cpu": json.loads(there)["cpu"]}


def warm_of(count: int) -> int:
    """Operations before those that count."""
    return max(int(count * WARM_PART), 50)


# -- one end, in a process of its own


class _Port:
    """One direction each: a publisher and a subscriber of fixed-size messages."""

    def __init__(self, iceoryx2: Any, node: Any, out: str, into: str, size: int) -> None:  # noqa: ANN401 - untyped package
        payload = type("Payload", (ctypes.Structure,), {"_fields_": [("data", ctypes.c_uint8 * size)]})
        self._size = size
        self._from = ctypes.create_string_buffer(size)
        self._to = ctypes.create_string_buffer(size)
        services = [node.service_builder(iceoryx2.ServiceName.new(name)).publish_subscribe(payload)
                    .enable_safe_overflow(False).subscriber_max_buffer_size(DEPTH).open_or_create()
                    for name in (out, into)]
        self._publisher = (services[0].publisher_builder()
                           .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered).create())
        self._subscriber = services[1].subscriber_builder().buffer_size(DEPTH).create()

    def meet(self, near: bool) -> None:
        """Return when messages arrive both ways: an end that is listed is not yet one that nothing is lost to.

        Near says hello until it is answered, then that it begins, and drops what comes before far's word for that.
        """
        deadline = time.monotonic() + LIMIT_SECONDS
        wanted = [_HELLO, _BEGIN] if near else [_BEGIN]
        while wanted:
            if near:
                self._from[0] = wanted[0]
                self.send()
            heard = self._heard(0.05)
            if not near and heard is not None:
                self._from[0] = heard
                self.send()
            if heard == wanted[0]:
                wanted.pop(0)
            if time.monotonic() > deadline:
                raise SystemExit("the other end did not come")
        while near and self._heard(0.05) is not None:
            pass  # an answer to a word that was said twice

    def _heard(self, seconds: float) -> bytes | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            sample = self._subscriber.receive()
            if sample is not None:
                ctypes.memmove(self._to, sample.payload_ptr, self._size)
                sample.delete()
                return self._to[0]
        return None

    def send(self) -> None:
        sample = self._publisher.loan_uninit()
        ctypes.memmove(sample.payload_ptr, self._from, self._size)
        sample.assume_init().send()

    def receive(self) -> None:
        take = self._subscriber.receive
        sample = take()
        while sample is None:
            sample = take()
        ctypes.memmove(self._to, sample.payload_ptr, self._size)
        sample.delete()


def _near(port: _Port, name: str, count: int) -> dict[str, Any]:
    now, send, receive = time.monotonic_ns, port.send, port.receive
    if name == "stream":
        for number in (warm_of(count), count):
            began, used = now(), time.process_time()
            for _ in range(number):
                send()
            receive()
            took = now() - began
        return {"ns": took, "cpu": time.process_time() - used}
    for _ in range(warm_of(count)):
        send()
        receive()
    samples = array("Q", bytes(8 * count))
    used = time.process_time()
    began = before = now()
    for index in range(count):
        send()
        receive()
        after = now()
        samples[index] = after - before
        before = after
    used = time.process_time() - used
    return {"ns": before - began, "cpu": used, "data": base64.b64encode(zlib.compress(samples.tobytes(), 1)).decode()}


def _far(port: _Port, name: str, count: int) -> dict[str, Any]:
    send, receive = port.send, port.receive
    if name == "stream":
        for number in (warm_of(count), count):
            used = time.process_time()
            for _ in range(number):
                receive()
            send()
    else:
        for number in (warm_of(count), count):
            used = time.process_time()
            for _ in range(number):
                receive()
                send()
    return {"cpu": time.process_time() - used}


def main() -> None:
    """One end: see the top of the file."""
    role, root, prefix, name, size, count, pin = sys.argv[1:]
    if int(pin) >= 0:
        os.sched_setaffinity(0, {int(pin)})
    iceoryx2: Any = importlib.import_module(PACKAGE)
    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    config = iceoryx2.config.default()
    config.global_cfg.prefix = iceoryx2.FileName.new(prefix)
    config.global_cfg.root_path = iceoryx2.Path.new(root)
    node = iceoryx2.NodeBuilder.new().config(config).create(iceoryx2.ServiceType.Ipc)
    ways = ("there", "back") if role == "near" else ("back", "there")
    port = _Port(iceoryx2, node, *ways, int(size))
    port.meet(role == "near")
    run: Callable[[_Port, str, int], dict[str, Any]] = _near if role == "near" else _far
    sys.stdout.write(json.dumps(run(port, name, int(count))) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
