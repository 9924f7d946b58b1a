"""`Vm.shell`: a person's terminal on a VM's serial console, here a pseudo-terminal that pexpect types on."""

import sys
from pathlib import Path

import pexpect

PROGRAM = """
from testbed.bed import Testbed
with Testbed(keep="never") as bed:
    (vm,) = bed.boot("talkative")
    print("at your service", flush=True)
    vm.shell()
    print("left with", vm.succeed("cat /tmp/typed"), flush=True)
"""


def test_what_is_typed_reaches_a_root_shell(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    person = pexpect.spawn(sys.executable, [str(script)], timeout=120, cwd=str(Path(__file__).parents[2]))
    try:
        person.expect("at your service")
        person.expect("talkative.*#")
        person.send("id -un | tee /tmp/typed\r")
        person.expect("[\r\n]root\r")
        person.send("\x1d")
        person.expect("left with root")
        person.expect(pexpect.EOF)
    finally:
        person.close()
    assert person.exitstatus == 0
