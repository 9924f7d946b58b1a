"""One end of the measurement of what tracing costs: see testbed.bench.tracing.

    python3 -m idc.measure.traced near|far python|core OUTSTANDING SEED BLOCKS COUNT CPU CACHE TRACE LINK

CACHE is a directory for what was compiled, of this user alone, or "-": in an emulated guest that takes a minute. TRACE
is a trace's address, LINK that of a region (scheme and what it stands for) with the channels CHANNELS.

The build without the hook is made from the same sources, less the statements that ask whether there is a trace; of
the core it takes the functions of untraced.c, which are made so. Each variant runs a copy of its own of those modules
and of the loop, on a channel of its own; which channel, and the order in each turn, are drawn anew. Depends on
idc.trace and idc.transport.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import marshal
import os
import random
import sys
import types
from pathlib import Path
from typing import Any, Final

from idc.trace import open_tracer
from idc.trace.place import open_place

VARIANTS: Final = ("without", "off", "on")
CHANNELS: Final = tuple(f"c{number}" for number in range(len(VARIANTS)))
#: Bytes of each transaction's parameters and status.
SIZE: Final = 64
#: A block that warms up is so many times as long.
WARM: Final = 5
COPIED: Final = ("idc.transport.shared", "idc.endpoint.session", "idc.endpoint.client", "idc.endpoint.endpoint",
                 "idc.endpoint.blocking", "idc.endpoint.engine", "idc.measure.traced_loops")
_CORE: Final = {
    **{f"idc_engine_{name}": f"idc_untraced_{name}" for name in ("start", "submit", "answered", "run")},
    **{f"idc_line_{name}": f"idc_untraced_line_{name}"
       for name in ("post", "send", "next", "call", "transact", "request", "answer")}}
#: What is asked before the trace is told something.
_ASKED: Final = {"trace", "_trace", "_flushed"}


class _Strip(ast.NodeTransformer):
    """Imports the variant's own copies; without the hook, leaves out what asks for it."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self.stripped = 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """See there."""
        if node.module in COPIED:
            node.module = f"{node.module}__{self._variant}"
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """See there."""
        self.generic_visit(node)
        asked = {each.attr for each in ast.walk(node.test) if isinstance(each, ast.Attribute)}
        if self._variant == "without" and asked & _ASKED:
            self.stripped += 1
            return None
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        """See there."""
        self.generic_visit(node)
        if self._variant == "without" and node.attr in _CORE:
            node.attr = _CORE[node.attr]
            self.stripped += 1
        return node


def build(variant: str, cache: Path | None = None) -> types.ModuleType:
    """The loops of a variant, on copies of all that has the hook; `STRIPPED`: how many statements were changed.

    Args:
        variant: one of VARIANTS.
        cache: a directory of this user's alone, for what was compiled.
    """
    module, stripped = types.ModuleType(""), 0
    for name in COPIED:
        changed, code = _compiled(name, variant, cache)
        stripped += changed
        module = types.ModuleType(f"{name}__{variant}")
        sys.modules[module.__name__] = module
        exec(code, module.__dict__)  # noqa: S102 - our own source
    module.__dict__["STRIPPED"] = stripped
    return module


def _compiled(name: str, variant: str, cache: Path | None) -> tuple[int, types.CodeType]:
    """How many statements were changed, and the code."""
    kept = None if cache is None else cache / f"{name}-{variant}"
    if kept is not None and kept.exists():
        found: tuple[int, types.CodeType] = marshal.loads(kept.read_bytes())
        return found
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    strip = _Strip(variant)
    tree = ast.fix_missing_locations(strip.visit(ast.parse(Path(spec.origin).read_text())))
    made = strip.stripped, compile(tree, spec.origin, "exec")
    if kept is not None:
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        kept.write_bytes(marshal.dumps(made))
    return made


def main() -> None:
    """Near writes {variant: a list of samples for each block, in ns} and {"dropped": events} as JSON."""
    role, kind, outstanding, seed, blocks, count, cpu, cache, trace, link = sys.argv[1:]
    if int(cpu) >= 0:
        os.sched_setaffinity(0, {int(cpu)})
    chance = random.Random(int(seed))
    channels = list(CHANNELS)
    chance.shuffle(channels)
    ends: dict[str, Any] = {}
    region, _ = open_place(f"{link}/{channels[0]}")  # once: a device has one user
    # Lossless: nothing is dropped, so all the work is done.
    with region, open_tracer(trace, lossless=True, timeout=20) as tracer:
        for variant, channel in zip(VARIANTS, channels, strict=True):
            loops = build(variant, None if cache == "-" else Path(cache))
            assert (loops.STRIPPED > 0) == (variant == "without")
            made, port = getattr(loops, f"{kind.title()}{role.title()}"), loops.port(region, channel)
            logs = tracer if variant == "on" else None
            ends[variant] = made(port, logs, int(outstanding)) if role == "near" else made(port, logs)
        found: dict[str, list[list[int]]] = {variant: [] for variant in VARIANTS}
        order = list(VARIANTS)
        for number in range(int(blocks) + 1):
            chance.shuffle(order)
            for variant in order:
                transactions = int(count) * (1 if number else WARM)
                if role == "far":
                    ends[variant].block(transactions)
                    continue
                samples = ends[variant].block(transactions, bytes(SIZE))
                if number:  # the first turn warms up
                    found[variant].append(samples)
        for end in ends.values():
            end.close()
    if role == "near":
        sys.stdout.write(json.dumps({**found, "dropped": tracer.dropped}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
