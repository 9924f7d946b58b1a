"""Runs the models and prints a table: states explored and the verdict for the protocol and for each mutant.

`python tests/model/run.py [--soak] [--jobs N] [FILE ...]`; the tests use the same lists. Exit code 1 if any verdict is
not the expected one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.spin import NONE, Model, ModelError, Mutant, build, mutants, search

#: MB for the largest search, which visits 48 million states; it is run for the protocol itself alone.
BIG: Final = 6000
#: Every run of these is exhaustive and takes seconds.
QUICK: Final = (
    Model("message_ring", ("SLOTS=2", "ITEMS=4")),
    Model("message_ring", ("SLOTS=2", "ITEMS=3"), ends=True),
    Model("byte_ring", ("SIZE=4", "TOTAL=5")),
    Model("byte_ring", ("SIZE=2", "TOTAL=4"), ends=True),
    Model("handshake", ("CRASHES=1", "ITEMS=1"), own_end=True),
)
#: Larger bounds, also with the mutants that are declared redundant. About half an hour.
SOAK: Final = (
    Model("message_ring", ("SLOTS=2", "ITEMS=6", "HIST=8")),
    Model("message_ring", ("SLOTS=4", "ITEMS=6", "HIST=8")),
    Model("byte_ring", ("SIZE=4", "TOTAL=7", "HIST=10")),
    Model("byte_ring", ("SIZE=4", "TOTAL=5"), ends=True),
    Model("handshake", ("CRASHES=1", "ITEMS=2"), own_end=True),
    Model("handshake", ("CRASHES=2", "ITEMS=1"), own_end=True, memory_mb=BIG),
    Model("handshake", ("CRASHES=1", "ITEMS=1", "TIMER"), own_end=True),
    Model("handshake", ("CRASHES=1", "ITEMS=1"), own_end=True, ends=True),
)


def needed(model: Model, mutant: Mutant) -> bool:
    """Must the search find an error? Not for a mutant that is declared redundant, or that these bounds cannot show."""
    if mutant is NONE:
        return False
    if "TIMER" in model.bounds:
        return mutant.name == "ACK_PUBLISH"
    return not (mutant.redundant or _needs_two_items(model, mutant))


def _needs_two_items(model: Model, mutant: Mutant) -> bool:
    return model.file == "handshake" and mutant.name == "HEAD_LOOK" and "ITEMS=2" not in model.bounds


def plan(model: Model, *, soak: bool) -> list[Mutant]:
    """What to run on `model`: the protocol itself, each mutant that must fail, in a soak also those that need not."""
    if model.ends or model.memory_mb == BIG:
        return [NONE]
    judged = [mutant for mutant in mutants(model.file) if needed(model, mutant) or (soak and mutant.redundant)]
    return [NONE, *(judged if "TIMER" not in model.bounds else [m for m in judged if needed(model, m)])]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="larger bounds, minutes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("files", nargs="*", help="models, such as message_ring (default: all)")
    args = parser.parse_args()
    bad = 0

    def one(model: Model) -> list[str]:
        nonlocal bad
        lines = [f"{model}"]
        with tempfile.TemporaryDirectory(prefix="idc-model-") as directory:
            pan = build(model, Path(directory))
            for mutant in plan(model, soak=args.soak):
                try:
                    outcome = search(model, pan, mutant, timeout=3600 if args.soak else 300)
                except ModelError as error:
                    bad += 1
                    lines.append(f"  {mutant!s:28} NO VERDICT: {error}")
                    continue
                good = bool(outcome.error) == needed(model, mutant)
                bad += not good
                verdict = outcome.error or "no error"
                lines.append(
                    f"  {mutant!s:28} {outcome.states:>10} states {outcome.seconds:>7.2f} s  "
                    f"{'as expected' if good else 'NOT AS EXPECTED'}: {verdict}"
                )
        return lines

    models = [model for model in (SOAK if args.soak else QUICK) if not args.files or model.file in args.files]
    with ThreadPoolExecutor(args.jobs) as pool:
        for lines in pool.map(one, models):
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
