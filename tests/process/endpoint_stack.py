"""python endpoint_stack.py UP [DOWN]: a back end of a stack; without DOWN the last. Ends when its upper end is gone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

from liveness import Bottom, Middle, gone, single, turn

from idc.endpoint import Endpoint
from idc.transport.address import open_port


def main() -> None:
    up, *down = sys.argv[1:]
    if not down:
        bottom = Bottom()
        endpoint = Endpoint(open_port(up), bottom, single())
        turn([endpoint], until=lambda: bottom.cycles > 0)
        gone(endpoint)
        sys.stdout.write(f"{bottom.handled}\n")
        return
    middle = Middle(down[0])
    upper = Endpoint(open_port(up), middle, single())
    turn([upper, middle.lower], until=lambda: middle.cycles > 0, each=middle.press)
    assert middle.most <= 2  # one request and one message
    gone(upper, middle.lower)
    sys.stdout.write(f"{middle.handled}\n")


if __name__ == "__main__":
    main()
