"""A host process rings a VM at full rate: the front end in the VM masks the eventfd behind its vector, and goes on.

The guest's kernel takes each interrupt that QEMU gives it all the same; what is bounded is the process. (Masking the
vector in the device would spare the kernel, too; see docs/idc.md.)
"""

import json
import subprocess
import sys
from pathlib import Path

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from testbed.bed import Testbed

HOSTILE = Path(__file__).parent.parent / "process" / "endpoint_hostile.py"
LIMIT = 60.0
#: Most CPU seconds that a second of storm adds to the same work without one, which costs more the slower the machine.
#: Without masking it is nearly all there are.
MOST_CPU = 0.25

FRONT = """
import json, time
from idc.endpoint import Client, Endpoint, Resources, Result
from idc.transport.address import open_port

endpoint = Endpoint(open_port("ivshmem:storm/service"), Client(), Resources())
answers = []


due = 0.0
deadline = time.monotonic() + 40


def ask():
    global due
    assert time.monotonic() < deadline, endpoint.status
    if not endpoint.outstanding and time.monotonic() >= due:
        due = time.monotonic() + 0.02
        endpoint.submit_transaction(b"x", answers.append)
    endpoint.pump(0.02)


def measure(seconds):
    began, cpu, before = time.monotonic(), time.process_time(), len(answers)
    while time.monotonic() - began < seconds:
        ask()
    passed = time.monotonic() - began
    return {"cpu": (time.process_time() - cpu) / passed, "answers": len(answers) - before}


while endpoint.status.masked == 0:
    ask()
storm = measure(1.5)
masked, last = endpoint.status.masked, -1
while last != endpoint.status.masked or endpoint.status.masked_now:  # until a second has passed without one
    last = endpoint.status.masked
    measure(1.0)
calm = measure(0.5)
print(json.dumps({"storm": storm, "calm": calm, "masked": masked, "last": last, "after": endpoint.status.masked,
                  "connections": endpoint.connections, "ok": all(c.result is Result.OK for c in answers)}))
endpoint.destroy()
"""


def test_a_storm_from_a_host_process_is_masked_in_the_vm() -> None:
    channel = ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)
    with Testbed(keep="never") as bed:
        (front,) = bed.boot("front")
        region = bed.region(RegionSpec("storm", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, [channel]))
        ringer = subprocess.Popen([sys.executable, str(HOSTILE), str(region.socket("back")), "ring", "8"],
                                  stdout=subprocess.DEVNULL)
        try:
            told = json.loads(front.succeed(["python3", "-c", FRONT], timeout=LIMIT))
        finally:
            ringer.kill()
            ringer.wait()
    sys.stdout.write(f"{told}\n")
    assert told["ok"]
    assert told["connections"] == 1
    assert told["storm"]["cpu"] - told["calm"]["cpu"] <= MOST_CPU
    assert told["storm"]["answers"] > 10
    assert told["after"] == told["last"]  # not again once it is over
    assert told["calm"]["answers"] > 5
