"""The life of one transaction, as it was: traced between two VMs, with the bytes that it left in shared memory.

    python docs/figures/transaction.py          boots two VMs, writes transaction.json and transaction.svg here
    python docs/figures/transaction.py --draw   draws again what transaction.json holds

docs/transaction.md shows both; tests/unit/test_transaction_doc.py checks them against the code.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNT = 200
RECORDS = "/var/lib/idc-trace"
BACK = f"""
import signal, threading
from idc.domain import Domain, Service
from idc.trace import file_tracer
domain = Domain({{"shout": "ivshmem:link/service"}})
tracer = file_tracer("back", "{RECORDS}")
signal.signal(signal.SIGTERM, lambda *_: domain.stop())
domain.serve(Service("shout"), bytes.upper).trace = tracer.endpoint("shout")
domain.run()
tracer.close()
"""
FRONT = f"""
import sys, time
from idc.domain import Domain, Service
from idc.trace import open_tracer
with open_tracer("ivshmem:trace/trace", lossless=True) as tracer:
    shout = Domain({{"shout": "ivshmem:link/service"}}).connect(Service("shout"))
    shout.endpoint.trace = tracer.endpoint("shout")
    for _ in range({COUNT}):
        assert shout.transact(b"hello", timeout=60) == b"HELLO"
        time.sleep(0.02)  # so that the back end sleeps when the next one comes
    print("done", flush=True)
    sys.stdin.read()
    shout.close()
"""


def record() -> dict[str, Any]:
    """Run it, and keep the transaction that took the median time of the last hundred."""
    from host.region import RegionSpec
    from idc.layout import ChannelSpec, Kind, Rights
    from testbed.bed import Testbed

    both = {"front": Rights.RW, "back": Rights.RW}
    with Testbed(keep="never") as bed, tempfile.TemporaryDirectory() as directory:
        front, back = bed.boot("front", "back")
        link = bed.region(RegionSpec("link", 1 << 20, both, [ChannelSpec("service", Kind.MESSAGE, "front", "back",
                                                                           64 << 10, 512)]))
        bed.region(RegionSpec("trace", 4 << 20, both, [ChannelSpec("trace", Kind.BYTE, "front", "back", 1 << 20)]))
        recorder = back.spawn(["python3", "-m", "idc.trace.record", "ivshmem:trace/trace", "--domain", "front",
                               "--here", "back", "--directory", RECORDS])
        server = back.spawn(["python3", "-c", BACK])
        user = front.spawn(["python3", "-c", FRONT], stdin=True)
        assert next(user.lines(timeout=240)) == "done", user.output_so_far()
        fd = link.open_memory()
        with mmap.mmap(fd, link.header.size, prot=mmap.PROT_READ) as mapped:
            memory = mapped[:]
        os.close(fd)
        user.close_stdin()
        assert user.wait(60).exit_code == 0
        for process in (server, recorder):
            process.kill(15)
            process.wait(60)
        paths = []
        for name in ("front.1", "back.1"):
            paths.append(Path(directory) / f"{name}.idctrace")
            back.copy_from(f"{RECORDS}/{name}.idctrace", paths[-1])
        times = _times(paths)
        return {"command": "python docs/figures/transaction.py", "accel": bed.verdict.accel,
                "kernel": front.info.kernel, **times,
                **_slots(memory, link.header.channel("service"), times["before"] + 1)}


def _slots(memory: bytes, entry: Any, index: int) -> dict[str, Any]:  # noqa: ANN401
    """That message each way (HELLO was 0), as it still lies in its slot, and the words of both rings at the end."""
    from idc import layout

    found: dict[str, Any] = {"region": memory[:512].hex(), "channel": {"offset": entry.offset, "slots": entry.slots,
                                                                       "slot_size": entry.slot_size}}
    for name, data, control in (("request", entry.data_ab, layout.RING_AB), ("reply", entry.data_ba, layout.RING_BA)):
        at = data + index % entry.slots * entry.slot_size
        length = int.from_bytes(memory[at + 4:at + 8], "little")
        at_words = entry.offset + control
        words = {word: int.from_bytes(memory[at_words + place:at_words + place + 8], "little")
                 for word, place in (("tail", layout.RING_TAIL), ("space_event", layout.RING_SPACE_EVENT),
                                     ("head", layout.RING_HEAD), ("data_event", layout.RING_DATA_EVENT))}
        found[name] = {"index": index, "offset": at, "bytes": memory[at:at + 8 + length].hex(), "ring": words}
    return found


def _times(paths: list[Path]) -> dict[str, Any]:
    from idc.trace import store
    from idc.trace.events import Kind
    from testbed.trace.align import align, load

    aligned = align([load(store.read(path)) for path in paths])
    arrows = sorted(aligned.arrows, key=lambda arrow: arrow.submit.begin)
    assert len(arrows) == COUNT, len(arrows)
    assert all(arrow.submit.end >= 0 <= arrow.handle.end for arrow in arrows)

    def took(arrow: Any) -> int:  # noqa: ANN401
        events = aligned.sources[arrow.submit.source].events
        return int(events[arrow.submit.end].time - events[arrow.submit.begin].time)

    number, arrow = sorted(list(enumerate(arrows))[-100:], key=lambda each: took(each[1]))[50]
    points, bounds = {}, {}
    for what, span, which in (("submit", arrow.submit, "begin"), ("handle", arrow.handle, "begin"),
                              ("answer", arrow.handle, "end"), ("complete", arrow.submit, "end")):
        source = aligned.sources[span.source]
        event = source.events[getattr(span, which)]
        points[what], bounds[what] = aligned.at(source.file.domain, event.time)
    bells: dict[str, int] = {}
    for source in aligned.sources:
        what, after = (("request rung", "submit") if source is aligned.sources[arrow.submit.source] else
                       ("reply rung", "answer"))
        for event in source.events:
            at, _ = aligned.at(source.file.domain, event.time)
            if event.kind == Kind.DOORBELL and points[after] <= at <= points["complete"]:
                bells.setdefault(what, at - points["submit"])
    return {"before": number, "ns": {what: at - points["submit"] for what, at in points.items()}, "doorbells_ns": bells,
            "bound_ns": max(bounds.values())}


def draw(seen: dict[str, Any]) -> str:
    """An SVG: time to the right, a lane for each VM; light and dark."""
    ns, width, left, right = seen["ns"], 860, 90, 40
    bells = seen["doorbells_ns"]
    end = max(*ns.values(), *bells.values(), 1)
    front, back = 70, 190

    def x(at: float) -> float:
        return float(round(left + (width - left - right) * at / end, 1))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 270" font-family="sans-serif" '
             'font-size="13" role="img">', "<title>One transaction between two VMs</title>",
             "<style>text{fill:#222}.a{stroke:#222;fill:none}.b{fill:#0072b2}.c{stroke:#d55e00;stroke-dasharray:4 3;"
             "fill:none}@media(prefers-color-scheme:dark){text{fill:#ddd}.a{stroke:#ddd}.b{fill:#56b4e9}}</style>"]
    for name, y in (("front", front), ("back", back)):
        parts.append(f'<text x="8" y="{y + 5}">VM {name}</text>')
        parts.append(f'<path class="a" d="M{left} {y}H{width - right}"/>')
    parts.append(f'<rect class="b" x="{x(0)}" y="{front - 5}" width="{x(ns["complete"]) - x(0)}" height="10"/>')
    parts.append(f'<rect class="b" x="{x(ns["handle"])}" y="{back - 5}" '
                 f'width="{max(x(ns["answer"]) - x(ns["handle"]), 2)}" height="10"/>')
    for one, other, y, to in (("submit", "handle", front, back), ("answer", "complete", back, front)):
        parts.append(f'<path class="a" d="M{x(ns[one])} {y}L{x(ns[other])} {to}"/>')
    for n, (name, y, up) in enumerate((("submit", front, -14), ("handle", back, 24), ("answer", back, 42),
                                       ("complete", front, -32))):
        anchor = "end" if n == 3 else "start"
        parts.append(f'<text x="{x(ns[name])}" y="{y + up}" text-anchor="{anchor}">{name} '
                     f'{ns[name] / 1000:.1f} us</text>')
    for name, at in bells.items():
        y = front if name.startswith("request") else back
        low = 18 if y == front else -12
        parts.append(f'<path class="c" d="M{x(at)} {y - 10}V{y + 10}"/>')
        late = x(at) > width - right - 150  # no room to the right of it
        parts.append(f'<text x="{x(at) + (-4 if late else 4)}" y="{y + low + 4}" '
                     f'text-anchor="{"end" if late else "start"}">{name} {at / 1000:.1f} us</text>')
    parts.append(f'<text x="8" y="262">{seen["accel"]}, Linux {seen["kernel"]}; times of front on back\'s clock within '
                 f'{seen["bound_ns"] / 1000:.1f} us; after {seen["before"]} others</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """See above."""
    if sys.argv[1:] != ["--draw"]:
        (HERE / "transaction.json").write_text(json.dumps(record(), indent=1) + "\n")
    (HERE / "transaction.svg").write_text(draw(json.loads((HERE / "transaction.json").read_text())))


if __name__ == "__main__":
    main()
