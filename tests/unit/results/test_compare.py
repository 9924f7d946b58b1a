"""What two runs are found to say: differences called, noise not, and conditions that forbid it all."""

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest

from testbed.bench.rows import Result, Row
from testbed.results.compare import LEAST, Comparison, compare, conditions, turns_needed

HOST = {"cpu": "one", "cpus": 2, "memory_mib": 1000, "machine": "x86_64", "kernel": "6", "hypervisor": False,
        "python": "3.11", "pinning": "none", "qemu": "7.2", "guest_kernel": "6.1", "netdev": "tap", "commit": "a"}
NAMES = [("rtt", "ns"), ("rate", "msg/s"), ("stream", "B/s"), ("transact", "ns")]


def row(name: str, unit: str, rounds: list[float], domains: str = "vm-vm") -> Row:
    figure = sorted(rounds)[len(rounds) // 2]
    percentiles = dict.fromkeys(("p50", "p90", "p99", "p999", "max"), figure) if unit == "ns" else {"value": figure}
    return Row(name, "ivshmem", domains, "poll", "core", 64, unit, 10, rounds=tuple(rounds), **percentiles)  # type: ignore[arg-type]


def run(seed: int, turns: int = 12, session: str = "one", times: float = 1.0, name: str = "rtt",
        **host: object) -> Result:
    """A run of four rows that vary by 1 %; those of `name` are `times` as long or as many."""
    rng = random.Random(seed)
    rows = tuple(row(each, unit, [100 * rng.lognormvariate(0, 0.01) * (times if each == name else 1)
                                  for _ in range(turns)]) for each, unit in NAMES)  # fmt: skip
    return Result("tcg", HOST | host, rows, session=session, quick=True)


def verdicts(found: Comparison) -> list[str]:
    return [each.kind for each in found.differences]


def test_a_against_itself_is_no_difference() -> None:
    found = compare(run(1), run(2))
    assert found.paired
    assert verdicts(found) == ["no difference"] * 4
    assert not found.conditions
    for each in found.differences:
        assert 0 < each.noise < 0.03
        assert not each.blind
        assert each.low <= each.change <= each.high


@pytest.mark.parametrize(("name", "times", "verdict"), [
    ("rtt", 1.1, "worse"), ("rtt", 0.9, "better"), ("rate", 1.1, "better"), ("stream", 0.9, "worse"),
])
def test_a_tenth_is_found_and_said_in_the_right_direction(name: str, times: float, verdict: str) -> None:
    found = compare(run(1), run(2, times=times, name=name))
    called = {each.row.name: each for each in found.differences if each.kind != "no difference"}
    assert list(called) == [name]
    assert called[name].kind == verdict
    assert called[name].change == pytest.approx(times - 1, abs=0.02)
    assert called[name].chance <= found.level


def test_a_hundredth_is_not_called_however_clear() -> None:
    """Code and memory that come to lie elsewhere do as much."""
    rows = [Result("tcg", HOST, (row("rtt", "ns", [figure + 0.01 * turn for turn in range(12)]),), session="one")
            for figure in (100.0, 100.0 * (1 + LEAST) - 0.5)]  # fmt: skip
    (each,) = compare(*rows).differences
    assert each.chance <= 0.01
    assert each.kind == "no difference"


def test_noise_that_hides_a_tenth_says_so() -> None:
    rng = random.Random(3)
    loud = [Result("tcg", HOST, (row("rtt", "ns", [100 * rng.lognormvariate(0, 0.5) for _ in range(12)]),),
                   session="one") for _ in range(2)]  # fmt: skip
    (each,) = compare(*loud).differences
    assert each.kind == "no difference"
    assert each.blind


def bistable(seed: int, takes: int, times: float, *, together: bool) -> Comparison:
    """Twelve turns of two versions on a machine that is twice as fast at some times as at others, and stays so for ten
    takes or so: `takes` in each turn of each version, next to those of the other or each version's in a row.

    Each start of the programs has a luck of its own, of 2 %, and each take varies by 3 %.
    """
    rng = np.random.default_rng(seed)
    figures = np.empty((2, 12, takes))
    for turn in range(12):
        slow = rng.random() < 0.5
        luck = rng.normal(0, 0.02, size=2)
        for at in range(2 * takes):
            slow ^= rng.random() < (0.5 if at == takes and not together else 0.1)  # the other's start takes long
            if together:
                slot = at // 2
                version = (at + slot + turn) % 2
            else:
                version, slot = (at // takes + turn) % 2, at % takes
            figures[version, turn, slot] = 3600 * math.exp(luck[version] + rng.normal(0, 0.03)) * (2 if slow else 1)
    figures[1] *= times
    rows = [dataclasses.replace(row("rtt", "ns", np.median(each, axis=1).tolist()),
                                takes=tuple(map(tuple, each.tolist())) if together else ()) for each in figures]
    return compare(*(Result("none", HOST, (each,), session="one", quick=True) for each in rows))


@pytest.mark.parametrize("times", [1.1, 1 / 1.1])
def test_a_tenth_is_found_on_a_machine_of_two_speeds_where_takes_alternate(times: float) -> None:
    found = [bistable(seed, 12, times, together=True).differences[0] for seed in range(100)]
    assert sum(each.kind == ("worse" if times > 1 else "better") for each in found) >= 95
    assert not any(each.blind for each in found)
    assert all(each.change == pytest.approx(times - 1, abs=0.06) for each in found)


def test_where_whole_runs_alternate_it_is_lost_and_said_to_be() -> None:
    found = [bistable(seed, 2, 1.1, together=False).differences[0] for seed in range(100)]
    assert sum(each.kind == "worse" for each in found) <= 25
    assert sum(each.blind for each in found) >= 70


@pytest.mark.parametrize("together", [True, False])
def test_a_machine_of_two_speeds_makes_no_difference_of_equals(together: bool) -> None:
    """Of 400, chance may call 4, and more than 11 less than once in a thousand times."""
    found = [bistable(seed, 12 if together else 2, 1.0, together=together).differences[0] for seed in range(400)]
    assert sum(each.kind != "no difference" for each in found) <= 11


def test_takes_that_have_no_likes_are_not_compared_one_by_one() -> None:
    """Benchmarks differ: what counts then are the figures of the turns."""
    one, other = (row("rtt", "ns", [figure] * 12) for figure in (100.0, 120.0))
    one, other = (dataclasses.replace(each, takes=((7.0,) * count,) * 12) for each, count in ((one, 3), (other, 4)))
    (found,) = compare(*(Result("none", HOST, (each,), session="one") for each in (one, other))).differences
    assert found.kind == "worse"
    assert found.change == pytest.approx(0.2)
    (found,) = compare(*(Result("none", HOST, (each,), session="one") for each in (one, one))).differences
    assert found.kind == "no difference"
    assert found.change == 0


@pytest.mark.parametrize(("turns", "session"), [(turns_needed() - 1, "one"), (2, ""), (4, ""), (1, "")])
def test_too_few_turns_can_tell_nothing(turns: int, session: str) -> None:
    found = compare(run(1, turns, session), run(2, turns, session, times=2.0))
    assert set(verdicts(found)) == {"cannot tell"}
    assert found.as_dict()["differences"][0]["verdict"] == "cannot tell"


def test_runs_measured_apart_are_compared_by_their_rounds() -> None:
    found = compare(run(1, 5, ""), run(2, 5, "", times=1.5))
    assert not found.paired
    assert verdicts(found) == ["worse", "no difference", "no difference", "no difference"]
    other = compare(run(1, 5, "one"), run(2, 5, "two", times=1.5))
    assert not other.paired, "turns of two sessions are no neighbours"


@pytest.mark.parametrize(("what", "said"), [
    ({"cpu": "two"}, "host (cpu): one and two"), ({"qemu": "8"}, "QEMU (qemu): 7.2 and 8"),
    ({"netdev": "user"}, "options (netdev): tap and user"), ({"python": "3.12"}, "options (python): 3.11 and 3.12"),
    ({"guest_kernel": None}, "guest (guest_kernel): 6.1 and unknown"),
])
def test_other_conditions_are_named(what: dict[str, Any], said: str) -> None:
    assert conditions(run(1), run(2, **what)) == [said]
    assert compare(run(1), run(2, **what)).conditions == (said,)


def test_other_accelerators_kinds_and_machines_are_named() -> None:
    first = run(1)
    assert conditions(first, dataclasses.replace(first, accel="kvm")) == ["accelerator: tcg and kvm"]
    single = dataclasses.replace(first, session="")
    assert conditions(single, dataclasses.replace(single, quick=False)) == ["options (quick): yes and no"]
    assert conditions(first, single) == ["options (turns): a run of many turns and a single run"]
    one, two, unknown = (run(1, host_id=name) for name in ("x", "y", ""))
    assert conditions(one, two) == ["host (host_id): x and y"]
    assert conditions(one, unknown) == conditions(one, first) == [], "a run from before it was noted"
    assert conditions(first, run(2, commit="b", load_before=9.0)) == []


def test_what_vms_ran_under_matters_only_to_their_rows() -> None:
    alone = Result("none", HOST | {"qemu": None}, (row("rtt", "ns", [1.0] * 12, "process"),), session="one", quick=True)
    whole = Result("tcg", HOST, (*run(1).results, *alone.results), session="one", quick=True)
    assert conditions(alone, whole) == []
    found = compare(alone, whole)
    assert len(found.differences) == 1
    assert found.only == (0, 4)


def test_figures_without_a_ratio_are_left_out_and_said() -> None:
    costs = [Result("none", HOST, (row("trace-cost", "%", [value] * 12),), session="one") for value in (-0.5, 0.4)]
    found = compare(*costs)
    assert found.differences == ()
    assert found.skipped == ("trace-cost ivshmem vm-vm: a figure that is not above 0 has no ratio",)


def test_rows_of_other_numbers_of_turns_share_the_level() -> None:
    """Of connecting, each device is a round: 50 beside the five of other rows."""
    first, second = (dataclasses.replace(run(seed, 5, "", times=times), results=(
        *run(seed, 5, "", times=times).results, dataclasses.replace(run(seed, 50, "").results[0], name="connect")))
        for seed, times in ((1, 1.0), (2, 1.5)))  # fmt: skip
    found = compare(first, second)
    assert [each.turns for each in found.differences] == [(5, 5)] * 4 + [(50, 50)]
    assert verdicts(found)[:4] == ["cannot tell"] * 4, "half the level each, which five and five turns do not reach"


def test_a_row_of_one_turn_has_no_noise_to_speak_of() -> None:
    (each,) = compare(*(Result("tcg", HOST, (row("rtt", "ns", [value]),)) for value in (1.0, 2.0))).differences
    assert each.kind == "cannot tell"
    assert math.isinf(each.noise)
    assert Comparison(False, (each,)).as_dict()["differences"][0]["noise"] is None
