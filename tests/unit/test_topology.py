"""Topologies: what is written is what is understood, and every mistake is one line that names its place."""

import itertools
import tomllib
from pathlib import Path

import pytest
from device_support import install

from host.ivshmem.detour import Doorbells
from testbed import build
from testbed.errors import SpecError
from testbed.qemu_args import Memory, VmSpec, Wiring, qemu_args
from testbed.topology import (
    Bus,
    Link,
    Machine,
    Topology,
    TopologyError,
    load,
    pair,
    parse,
    parse_size,
    resolve,
    size_text,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "cache.toml"
GOOD = """
name = "good"
[vms.front]
memory = "256M"
[vms.back]
cpus = 2
[links.fb]
members = ["front", "back"]
[regions.ro]
size = "16M"
members = { front = "rw", back = "ro" }
[networks.lan]
members = ["front", "back"]
"""

MISTAKES = [
    ('memory = "256M"', 'memry = "256M"', "[vms.front]: no such key 'memry'; did you mean 'memory'?"),
    ('memory = "256M"', 'memory = "lots"', "[vms.front] memory: 'lots' is no size"),
    ('memory = "256M"', "memory = true", "[vms.front] memory: input should be a valid integer, not True"),
    ('memory = "256M"', 'memory = "1K"', "[vms.front] memory: 1K is not whole mebibytes"),
    ("cpus = 2", "cpus = 0", "[vms.back] cpus: a VM has at least one, not 0"),
    ("cpus = 2", "cpus = '2'", "[vms.back] cpus: input should be a valid integer"),
    ("cpus = 2", "pin = [-1]", "[vms.back] pin: [-1] holds a number that is no CPU's"),
    ("cpus = 2", "kernel_args = ['a b']", "[vms.back] kernel_args: 'a b' is not one word"),
    ("cpus = 2", "disks = [{pth = 'x'}]", "[vms.back] disks[0]: no such key 'pth'; did you mean 'path'?"),
    ("cpus = 2", "region_ports = 1", "[vms.back] region_ports: 1 are not enough for its 2 regions (ro, fb)"),
    ("cpus = 2", "region_port = '8M'", "[vms.back] region_port: 8M is too small for region 'ro' of 16M"),
    ("[vms.back]", "[vms.Back]", "[vms.Back]: 'Back' is no name of a VM"),
    ('"front", "back"]\n[reg', '"frnt", "back"]\n[reg', "[links.fb] members: 'frnt' is no VM of this testbed; did you"),
    ('"front", "back"]\n[reg', '"front"]\n[reg', "[links.fb]: a link has two members, this one 1"),
    ('"front", "back"]\n[reg', '"front", "front"]\n[reg', "[links.fb] members: 'front' is named twice"),
    ('members = ["front", "back"]\n[reg', "[reg", "[links.fb] members: is missing"),
    ('size = "16M"', 'size = "3M"', "[regions.ro] size: 3M is no power of two"),
    ('size = "16M"', "size = 512", "[regions.ro]: region 'ro' has 512 bytes: must be a power of two"),
    ('back = "ro"', 'back = "r"', "[regions.ro] members.back: input should be 'rw' or 'ro', not 'r'; did you"),
    ("[regions.ro]", "[regions.fb]", "[links.fb]: another region has that name too"),
    ("[networks.lan]", "[network.lan]", "no such key 'network'; did you mean 'networks'?"),
    ('lan]\nmembers = ["front", "back"]', "lan]\nmembers = []", "[networks.lan] members: a network needs"),
    ("[networks.lan]", "[networks.lan]\nkind = 'tab'", "[networks.lan] kind: input should be 'auto', 'tap', 'stream'"),
    ("cpus = 2", "gdb = 'yes'", "[vms.back] gdb: input should be 'off', 'on' or 'wait', not 'yes'"),
    ('size = "16M"', "doorbells = [{ drop = 2.0 }]",
     "[regions.ro] doorbells[0]: doorbells: drop=2.0 is no probability"),
    ('size = "16M"', "doorbells = [{ drp = 0.5 }]",
     "[regions.ro] doorbells[0]: no such key 'drp'; did you mean 'drop'?"),
    ('size = "16M"', "doorbells = [{ pair = ['front', 'back'] }]",
     "[regions.ro] doorbells[0].pair: 'front' cannot ring 'back' (rw members: front)"),
    ('size = "16M"', "doorbells = [{}, {}]", "[regions.ro] doorbells[1]: a second entry without a pair"),
    ("[links.fb]", "[links.fb]\ndoorbells = [{ pair = ['back', 'front'] }, { pair = ['back', 'front'] }]",
     "[links.fb] doorbells[1].pair: named twice"),
    ('size = "16M"', "parts = { frnt = '1M' }",
     "[regions.ro]: part for 'frnt', which is no rw member of region 'ro' (rw members: front)"),
    ('size = "16M"', "parts = { front = '5000' }", "[regions.ro]: part for 'front' of 5000 bytes: must be whole pages"),
    ('size = "16M"', "parts = { front = '16M' }", "[regions.ro]: part for 'front' of 16777216 bytes: 16773120"),
    ('name = "good"', 'name = "Not good"', "name: 'Not good' is no name"),
    ('name = "good"', 'accel = "hvf"', "accel: input should be 'auto', 'kvm' or 'tcg', not 'hvf'"),
]


@pytest.mark.parametrize(("good", "bad", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_names_file_table_and_key(tmp_path: Path, good: str, bad: str, message: str) -> None:
    assert good in GOOD
    file = tmp_path / "bed.toml"
    file.write_text(GOOD.replace(good, bad))
    with pytest.raises(TopologyError) as caught:
        resolve(load(file), source=str(file))
    text = str(caught.value)
    assert text.startswith(f"{file}: {message}")
    assert "\n" not in text


def test_parts_reach_the_region() -> None:
    topology = parse(tomllib.loads(GOOD.replace("[links.fb]", "[links.fb]\nparts = { back = '1M', front = '64K' }")))
    header = resolve(topology).regions["fb"].spec("fb").plan()
    assert [(header.members[part.owner].name, part.length) for part in header.parts] == [
        ("back", 1 << 20), ("front", 1 << 16)]


def test_what_cannot_be_read_is_one_line_too(tmp_path: Path) -> None:
    file = tmp_path / "bed.toml"
    with pytest.raises(TopologyError, match=r"cannot read the topology .*No such file"):
        load(file)
    file.write_bytes(b"[vms.front\n")
    with pytest.raises(TopologyError, match=r"is no TOML: .*at line 1"):
        load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TopologyError, match="is no TOML"):
        load(file)
    with pytest.raises(TopologyError, match="there is no VM"):
        resolve(Topology())


def test_the_example_resolves_and_what_is_printed_reads_back() -> None:
    topology = load(EXAMPLE)
    assert topology.name == "cache"
    resolved = resolve(topology)
    assert set(resolved.regions) == {"pages", "spare", "requests1", "requests2"}
    assert resolved.links == {}
    assert resolve(parse(tomllib.loads(resolved.as_toml()))) == resolved
    assert parse(tomllib.loads(topology.as_toml(everything=False)), directory=EXAMPLE.parent) == topology


def test_ports_grow_with_the_regions() -> None:
    regions = {f"r{n}": Link(members=("a", "b"), size=1 << 29) for n in range(6)}
    vms = resolve(Topology(vms={"a": Machine(), "b": Machine()}, links=regions)).vms
    assert (vms["a"].region_ports, vms["a"].region_port) == (6, 1 << 29)


def test_a_bus_has_a_channel_for_each_pair() -> None:
    names = tuple("abcdefg")
    bed = Topology(vms=dict.fromkeys(names, Machine()), buses={"all": Bus(members=names)})
    assert len(resolve(bed).regions["all"].channels) == 21
    with pytest.raises(TopologyError, match=r"\[buses.all\]: a bus has 2 to 7 members, this one 8"):
        parse({"vms": {}, "buses": {"all": {"members": list("abcdefgh")}}})


def test_a_host_process_may_be_a_member_if_it_is_named() -> None:
    bed = Topology(vms={"a": Machine()}, links={"x": Link(members=("a", "tool"))})
    with pytest.raises(TopologyError, match="'tool' is no VM"):
        resolve(bed)
    assert "x" in resolve(bed.model_copy(update={"processes": ("tool",)})).regions


@pytest.mark.parametrize(("text", "size"), [("4096", 4096), ("64K", 65536), ("16M", 1 << 24), ("1 GiB", 1 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(size_text(size)) == size


def test_what_this_machine_lacks_is_told_before_anything_starts(tmp_path: Path) -> None:
    def refuse(**fields: object) -> str:
        bed = resolve(parse({"vms": {"front": fields}}, directory=tmp_path))
        with pytest.raises(SpecError) as caught:
            build.check_host(bed)
        assert "\n" not in caught.value.message
        return str(caught.value)

    assert refuse(kernel="none") == f"[vms.front] kernel: {tmp_path}/none cannot be read: No such file or directory"
    (tmp_path / "tree").mkdir()
    assert "is a directory without arch/x86/boot/bzImage\nhint: give a build tree" in refuse(kernel="tree")
    assert refuse(disks=[{"path": "d"}]).startswith("[vms.front] disks[0].path: there is no ")
    assert "may not run on CPU 4095" in refuse(pin=[4095])
    assert "no image matches 'nothing'" in refuse(image="nothing")


def test_huge_pages_come_from_a_memfd() -> None:
    spec = VmSpec("a", Path("/k"), memory=Memory(256, "memfd", share=True, hugepages=True))
    args = qemu_args(spec, Wiring("fd=3", "fd=4", "fd=5"))
    assert "memory-backend-memfd,id=ram,size=256M,share=on,hugetlb=on" in args


def test_the_default_is_a_pair_and_a_link() -> None:
    resolved = resolve(pair())
    assert list(resolved.vms) == ["front", "back"]
    assert resolved.regions["front-back"].members == {"front": "rw", "back": "rw"}


def test_faults_of_doorbells_are_resolved_to_pairs() -> None:
    faults = [{"drop": 0.5, "seed": 7}, {"pair": ["b", "a"], "delay": [0, 0.25]}]
    resolved = resolve(parse({"vms": {"a": {}, "b": {}, "c": {"gdb": "on"}},
                              "buses": {"bus": {"members": ["a", "b", "c"], "doorbells": faults}}}))
    plan = resolved.regions["bus"].plan()
    assert plan["b", "a"] == Doorbells(delay=(0.0, 0.25))
    assert set(plan) == set(itertools.permutations("abc", 2))
    assert {pair for pair, bells in plan.items() if bells == Doorbells(drop=0.5, seed=7)} == set(plan) - {("b", "a")}
    assert resolve(parse(tomllib.loads(resolved.as_toml()))) == resolved
    assert resolved.vms["c"].gdb == "on"


BROKERED = '[broker]\npatience = 2.0\npiece = "64K"\n[links.fb]'


def test_a_broker_takes_a_port_of_each_member_and_prints_back() -> None:
    resolved = resolve(parse(tomllib.loads(GOOD.replace("[links.fb]", BROKERED).replace("cpus = 2", "region_ports=3"))))
    assert resolved.broker is not None
    assert (resolved.broker.members, resolved.broker.piece) == (("front", "back"), 1 << 16)
    assert resolve(parse(tomllib.loads(resolved.as_toml()))) == resolved
    assert resolve(parse(tomllib.loads(GOOD))).broker is None


@pytest.mark.parametrize(("good", "bad", "message"), [
    ("[links.fb]", "[broker]\nmembers = ['frnt']\n[links.fb]", "[broker] members: 'frnt' is no VM of this testbed;"),
    ("[links.fb]", "[broker]\npatience = 0.0\n[links.fb]", "[broker] patience: 0 is no time to answer in"),
    ("[links.fb]", "[broker]\npeace = '1M'\n[links.fb]", "[broker]: no such key 'peace'; did you mean 'piece'?"),
    ("[links.fb]", "[broker]\n[links.control-a]", "[links.control-a]: names that begin with 'control-' are"),
    ("[vms.front]", "[broker]\n[vms.broker]\n[vms.front]", "[broker]: 'broker' is a name of the host's own"),
    ("cpus = 2", "region_ports = 2\n[broker]",
     "[vms.back] region_ports: 2 are not enough for its 2 regions (ro, fb) and its control link"),
])
def test_mistakes_about_the_broker(good: str, bad: str, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        resolve(parse(tomllib.loads(GOOD.replace(good, bad, 1))))
    assert str(caught.value).startswith(f"topology: {message}")


DEVICE = """[broker]
[devices.words]
class = "echo"
frontend = "front"
backend = "back"
options = { times = 2 }
[links.fb]"""


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))


@pytest.mark.usefixtures("classes")
def test_a_device_takes_a_port_of_each_end_and_prints_back() -> None:
    text = GOOD.replace("[links.fb]", DEVICE).replace("cpus = 2", "cpus = 2\nregion_ports = 4")
    resolved = resolve(parse(tomllib.loads(text)))
    assert resolved.devices["words"].options == {"times": 2}
    assert resolve(parse(tomllib.loads(resolved.as_toml()))) == resolved
    assert parse(resolved.model_dump()) == resolved


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize(("good", "bad", "message"), [
    ('class = "echo"', 'class = "ekho"', "[devices.words]: there is no device class 'ekho' here (there are: "),
    ('class = "echo"', 'kind = "echo"', "[devices.words]: no such key 'kind'"),
    ('class = "echo"\n', "", "[devices.words] class: is missing"),
    ("times = 2", 'times = "2"', "[devices.words]: device class echo, option times: '2' is no int"),
    ("times = 2", "time = 2", "[devices.words]: device class echo has no option 'time'; did you mean 'times'?"),
    ('backend = "back"', 'backend = "bakc"', "[devices.words] backend: 'bakc' is no VM of this testbed; did you mean"),
    ('backend = "back"', 'backend = "front"', "[devices.words] backend: 'front' is the front end too"),
    ("[broker]", "", "[devices.words]: devices need a registry; write a [broker] table"),
    ("[broker]", "[broker]\nmembers = ['back']", "[devices.words] frontend: 'front' has no control link"),
    ("[links.fb]", "[devices.again]\nclass = 'echo'\nfrontend = 'front'\nbackend = 'back'\n[links.fb]",
     "[devices.again]: [devices.words] is the same device; give one of them another number"),
])
def test_mistakes_about_devices(good: str, bad: str, message: str) -> None:
    text = GOOD.replace("[links.fb]", DEVICE)
    assert good in text
    with pytest.raises(TopologyError) as caught:
        resolve(parse(tomllib.loads(text.replace(good, bad, 1))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
