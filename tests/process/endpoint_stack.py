"""python endpoint_stack.py UP [DOWN]: a back end of a stack; without DOWN the last. Ends when its upper end is gone.

With IDC_STAY in the environment it stays, for another upper end to come.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

from liveness import Bottom, Counting, Middle, gone, single, turn

from idc.endpoint import Endpoint
from idc.transport.address import open_port


def over(client: Counting) -> bool:
    return client.cycles > 0 and "IDC_STAY" not in os.environ


def main() -> None:
    up, *down = sys.argv[1:]
    if not down:
        bottom = Bottom()
        endpoint = Endpoint(open_port(up), bottom, single())
        turn([endpoint], until=lambda: over(bottom))
        gone(endpoint)
        sys.stdout.write(f"{bottom.handled}\n")
        return
    middle = Middle(down[0])
    upper = Endpoint(open_port(up), middle, single())
    turn([upper, middle.lower], until=lambda: over(middle), each=middle.press)
    assert middle.most <= 2  # one request and one message
    gone(upper, middle.lower)
    sys.stdout.write(f"{middle.handled}\n")


if __name__ == "__main__":
    main()
