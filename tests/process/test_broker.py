"""Host copy between host processes as domains: what is copied, what is refused, who notices whose death."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
from broker_support import MIB, bench, copy, drive, join_domain, owner, started
from region_support import DEADLINE, descriptors, running, until

from host.broker import CHANNEL, MEMBER
from host.errors import RegionError, ServerError
from host.ivshmem.client import join
from host.region import RegionSpec
from idc.channel import MessageChannel
from idc.endpoint import Completion, Quotas, Resources, Result, State
from idc.endpoint.blocking import Caller
from idc.errors import TransactionError
from idc.layout import PAGE, Rights, pack_header, parse_header
from idc.remote.controlframes import CopyRequest, parse_copied
from idc.remote.controlframes import copy as copy_frame
from idc.remote.reference import REFERENCE_BYTES, Access
from idc.remote.resolution import Refusal
from idc.transport.address import open_port


def ok(completion: Completion, length: int) -> None:
    assert completion.result is Result.OK, completion.reason
    assert parse_copied(completion.status) == length


def refused(completion: Completion, refusal: Refusal, words: str = "") -> None:
    assert (completion.result, completion.error) == (Result.ERROR, refusal), completion
    assert words in completion.reason


def test_bytes_go_once_between_regions_that_the_two_do_not_share() -> None:
    with bench() as here:
        front, back = here.parties["front"], here.parties["back"]
        content = secrets.token_bytes(3 * MIB + 17)
        _, source = front.allocate("front-middle", content)
        target, reference = back.allocate("middle-back", bytes(len(content)))
        ok(copy([front, back], back, source, reference, len(content)), len(content))
        assert back.content("middle-back", target) == content
        status = here.service.broker_status()
        assert status["counts"]["back"]["copied"] == len(content)
        assert status["counts"]["back"]["pieces"] == 4
        assert (status["mapped"], status["leases"], status["jobs"]) == (2, 1, 0)  # its own comes with each request
        assert (status["counts"]["front"]["asked"], status["counts"]["back"]["asked"]) == (1, 0)
        assert list(back.exports.held.values()) == [-1]
        # a part of it, and to the source instead of from it: leases serve again
        ok(copy([front, back], back, reference, source, 1000, source_offset=5, target_offset=4096), 1000)
        assert front.exports.asked == 2  # to read, then to write


def test_forged_references_are_refused_and_nothing_is_touched() -> None:
    with bench() as here:
        front, back = here.parties["front"], here.parties["back"]
        _, source = front.allocate("front-middle", bytes(8192))
        target, reference = back.allocate("middle-back", b"\xee" * 8192)
        readable = front.exports.reference(front.regions["front-middle"],
                                           front.regions["front-middle"].pool.allocate(PAGE), Access.READ)
        for at in range(0, REFERENCE_BYTES, 3):
            forged = bytearray(source)
            forged[at] ^= 1 << at % 8
            completion = copy([front, back], back, bytes(forged), reference, 100)
            assert completion.result is Result.ERROR, at
            assert completion.error in (Refusal.FORGED, Refusal.MALFORMED, Refusal.NO_ROUTE, Refusal.STALE,
                                        Refusal.RIGHTS, Refusal.RANGE), completion
        refused(copy([front, back], back, source, reference, 8193), Refusal.RANGE)
        refused(copy([front, back], back, source, reference, 2, source_offset=8191), Refusal.RANGE)
        refused(copy([front, back], back, reference, readable, 10), Refusal.RIGHTS, "does not allow to WRITE")
        assert back.content("middle-back", target) == b"\xee" * 8192
        assert here.service.broker_status()["opened"] == 0


def test_who_asks_must_own_one_of_the_two() -> None:
    with bench() as here:
        front, middle, back = here.party("front", "middle", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, target = back.allocate("middle-back", bytes(PAGE))
        refused(copy([front, middle, back], middle, source, target, 10), Refusal.RIGHTS, "the asker's own")


@pytest.mark.parametrize(("what", "words"), [
    ("region of others", "of which it is no rw member"),
    ("part of another", "not in its part"),
    ("header page", "not in its part"),
    ("beyond the region", "not in its part"),
    ("no region", "does not exist"),
    ("shorter", "gives 4095 bytes"),
])
def test_an_owner_that_lies_gets_nobodys_pages_touched(what: str, words: str) -> None:
    with bench() as here:
        front, middle, back = here.party("front", "middle", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        target, reference = back.allocate("middle-back", b"\x11" * PAGE)
        other = middle.regions["middle-back"]
        (foreign,) = front.regions["front-middle"].header.parts_of(1)
        changes: dict[str, dict[str, Any]] = {
            "region of others": {"region": other.header.uuid, "offset": other.header.parts[0].offset},
            "part of another": {"offset": foreign.offset},
            "header page": {"offset": 0},
            "beyond the region": {"offset": (1 << 64) - PAGE},
            "no region": {"region": uuid4()},
            "shorter": {"length": PAGE - 1},
        }
        front.exports.lie = lambda truth: dataclasses.replace(truth, **changes[what])
        refused(copy([front, back], back, source, reference, 10), Refusal.FAILED, words)
        refused(copy([front, back], front, reference, source, 10), Refusal.FAILED, words)
        assert back.content("middle-back", target) == b"\x11" * PAGE
        front.exports.lie = None
        ok(copy([front, back], back, source, reference, 10), 10)


def test_a_control_region_is_no_place_to_copy_to() -> None:
    with bench() as here:
        front, back = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        assert front.control.identity is not None
        control = front.control.identity.domain  # the region's uuid
        front.exports.lie = lambda truth: dataclasses.replace(truth, region=control)
        refused(copy([front, back], back, source, reference, 10), Refusal.FAILED, "not in its part")


def test_a_flood_of_large_copies_does_not_hold_up_another_domain() -> None:
    with bench("--piece", "16384") as here:
        front, middle, back = everybody = here.party("front", "middle", "back")
        large = 6 * MIB
        _, source = front.allocate("front-middle", bytes(large))
        _, to = middle.allocate("front-middle", bytes(large))
        _, small = middle.allocate("middle-back", bytes(PAGE))
        _, mine = back.allocate("middle-back", bytes(PAGE))
        drive(everybody, lambda: front.control.endpoint.state is State.CONNECTED)
        flood: list[Completion] = []
        going = True

        def again(completion: Completion) -> None:
            flood.append(completion)
            if going:
                front.control.copy(source, to, large, again)

        sent = 0
        while front.control.copy(source, to, large, again) is Result.OK:
            sent += 1
        assert sent == 24
        for _ in range(50):
            ok(copy(everybody, back, small, mine, PAGE), PAGE)
            assert front.control.endpoint.outstanding == sent
        assert len(flood) < 50 * sent / 2  # in the order of arrival, each would have let all of it go first
        going = False
        drive(everybody, lambda: not front.control.endpoint.outstanding)
        for completion in flood:
            ok(completion, large)


def test_who_breaks_the_rules_of_the_link_loses_it_and_nobody_else() -> None:
    with bench() as here:
        front, back = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        control = here.service.control("rogue")
        address = f"member:{control.socket('rogue')}/{CHANNEL}"
        lavish = Resources(Quotas(64, 64, 256, 256), requests=64, messages=0)
        with Caller(open_port(address), lavish) as rogue:
            for body in (b"", b"\x00", b"\x02" * 100, b"\x03", b"\x03" * 255, b"\x04", b"\x05" * 16,
                         copy_frame(CopyRequest(bytes(REFERENCE_BYTES), bytes(REFERENCE_BYTES), 0, 0, 1))):
                with pytest.raises(TransactionError) as error:
                    rogue.transact(body, timeout=DEADLINE)
                assert error.value.code == Refusal.MALFORMED
            # more at a time than it accepts: its own library would not
            peer = rogue.endpoint._session
            assert peer is not None
            peer.peer = Quotas(60, 0, 256, 256)
            outcomes: list[Completion] = []
            everlasting = copy_frame(CopyRequest(source, reference, 0, 0, PAGE))
            for _ in range(60):
                rogue.endpoint.submit_transaction(everlasting, outcomes.append, notify=False)
            connections = rogue.endpoint.connections
            while len(outcomes) < 60:
                rogue.endpoint.pump(0.1)
            assert {o.result for o in outcomes} <= {Result.OK, Result.OUTCOME_UNKNOWN}
            ok(copy([front, back], back, source, reference, 10), 10)
            rogue.connect(DEADLINE)
            assert rogue.endpoint.connections >= connections
        assert "Traceback" not in (here.service.log.parent / "broker.log").read_text()


def test_rubbish_all_over_a_control_region_harms_nobody_else() -> None:
    with bench() as here, ExitStack() as held:
        front, back = everybody = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        control = here.service.control("rogue")
        region = held.enter_context(join(control.socket("rogue")))
        entry = next(channel for channel in region.header.channels if channel.name == CHANNEL)
        rubbish = random.Random(7)
        for n in range(60):
            with MessageChannel.begin(region, CHANNEL) as channel:
                drive(everybody, channel.advance)
                if n % 2:
                    region.memory[entry.offset : entry.offset + entry.length] = rubbish.randbytes(entry.length)
                else:  # frames of rubbish, in rings that are in order
                    for _ in range(5):
                        channel.sender.post(rubbish.randbytes(rubbish.randrange(1, 300)))
                    channel.sender.flush()
                page = region.memory[:PAGE]
                region.memory[:PAGE] = rubbish.randbytes(16) * (PAGE // 16)  # and all that the header page says
                ok(copy(everybody, back, source, reference, PAGE), PAGE)
                region.memory[:PAGE] = page
        assert set(here.service.broker_status()["domains"]) >= {"front", "middle", "back"}
        assert "Traceback" not in (here.service.log.parent / "broker.log").read_text()


def test_a_header_page_written_over_holds_up_no_broker_that_starts() -> None:
    with bench() as here, ExitStack() as held:
        front, back = everybody = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        control = here.service.control("rogue")
        region = held.enter_context(join(control.socket("rogue")))
        until("its link is joined", lambda: here.service.members(control.name)[MEMBER] == (1, True))
        header = parse_header(region.memory[:PAGE])
        region.memory[:PAGE] = pack_header(dataclasses.replace(header, vectors=256))  # which nobody will ever get
        here.service.restart_broker()
        assert here.service.members(control.name)[MEMBER] == (2, True)  # it was ready: all links were joined by then
        drive(everybody, lambda: {"front", "back"} <= set(here.service.broker_status()["domains"]))
        ok(copy(everybody, back, source, reference, PAGE), PAGE)
        assert "cannot be joined" not in (here.service.log.parent / "broker.log").read_text()


def test_a_doorbell_that_never_stops_is_not_listened_to() -> None:
    with bench() as here, ExitStack() as held:
        front, back = everybody = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        control = here.service.control("rogue")
        region = held.enter_context(join(control.socket("rogue")))
        channel = next(channel for channel in region.header.channels if channel.name == CHANNEL)
        bell = region.bell(1, channel.data_vector)
        held.callback(bell.close)
        going = True

        def storm() -> None:
            while going:
                bell.ring()

        with ThreadPoolExecutor(1) as pool:
            ringing = pool.submit(storm)
            try:
                until("it is not listened to", lambda: here.service.broker_status()["masked"]["rogue"] > 0)
                ok(copy(everybody, back, source, reference, PAGE), PAGE)
                assert here.service.broker_status()["masked"]["back"] == 0
            finally:
                going = False
            ringing.result()


def test_an_owner_killed_in_the_middle_and_back_again() -> None:
    links = (("front", "middle"), ("middle", "back"))
    with bench("--piece", "64", links=links[1:]) as here:
        back = here.parties["back"]
        here.served["front-middle"] = here.service.create(
            RegionSpec("front-middle", 16 * MIB, dict.fromkeys(links[0], Rights.RW)))
        length = 4 * MIB
        _, mine = back.allocate("middle-back", bytes(length))
        with owner(here, "front", "front-middle", length) as (process, reference):
            answers: list[Completion] = []
            assert back.control.copy(reference, mine, length, answers.append) is Result.OK
            drive([back], lambda: here.service.broker_status()["counts"]["back"]["pieces"] > 0)
            process.kill()
            drive([back], lambda: bool(answers))
            refused(answers[0], Refusal.FAILED, "bytes were copied")
            refused(copy([back], back, reference, mine, length), Refusal.NO_ROUTE)
        with started(here, "front", "front-middle", length) as (_, fresh):
            refused(copy([back], back, reference, mine, 10), Refusal.STALE, "incarnation 1 of front, which is in its "
                    "incarnation 2")
            ok(copy([back], back, fresh, mine, PAGE), PAGE)


def test_a_stopped_owner_costs_its_askers_a_time_out_and_others_nothing() -> None:
    with bench("--patience", "1.5", links=(("middle", "back"),)) as here:
        middle, back = here.party("middle", "back")
        here.served["front-middle"] = here.service.create(
            RegionSpec("front-middle", 16 * MIB, {"front": Rights.RW, "middle": Rights.RW}))
        _, theirs = middle.allocate("middle-back", bytes(PAGE))
        _, mine = back.allocate("middle-back", bytes(PAGE))
        with owner(here, "front", "front-middle", PAGE) as (process, reference):
            process.send_signal(signal.SIGSTOP)
            stuck: list[Completion] = []
            assert back.control.copy(reference, mine, 10, stuck.append) is Result.OK
            for _ in range(20):
                ok(copy([middle, back], middle, theirs, mine, PAGE), PAGE)
            assert not stuck
            drive([middle, back], lambda: bool(stuck))
            refused(stuck[0], Refusal.BUSY, "front did not answer within 1.5 s")
            process.send_signal(signal.SIGCONT)
            ok(copy([back], back, reference, mine, PAGE), PAGE)


def test_the_broker_killed_in_the_middle_of_a_copy_comes_back_with_no_state() -> None:
    with bench("--piece", "64") as here:
        front, back = everybody = here.party("front", "back")
        length = 4 * MIB
        content = secrets.token_bytes(length)
        _, source = front.allocate("front-middle", content)
        target, reference = back.allocate("middle-back", bytes(length))
        ok(copy(everybody, back, source, reference, 10), 10)
        answers: list[Completion] = []
        assert back.control.copy(source, reference, length, answers.append) is Result.OK
        drive(everybody, lambda: here.service.broker_status()["counts"]["back"]["pieces"] > 10)
        before = here.service.broker_pid
        os.kill(before, signal.SIGKILL)
        drive(everybody, lambda: bool(answers))
        assert answers[0].result is Result.OUTCOME_UNKNOWN
        drive(everybody, lambda: front.exports.dropped == back.exports.dropped == 1)
        assert back.control.copy(source, reference, length, answers.append) is Result.NOT_CONNECTED
        with pytest.raises(ServerError, match="restart_broker"):
            here.service.broker_status()
        here.service.restart_broker()
        assert here.service.broker_pid != before
        drive(everybody, lambda: {"front", "back"} <= set(here.service.broker_status()["domains"]))
        ok(copy(everybody, back, source, reference, length), length)
        assert back.content("middle-back", target) == content
        assert here.service.members("control-back") == {"back": (1, True), MEMBER: (2, True),
                                                               "registry": (0, False)}


def test_an_owner_revokes_and_is_told_when_nothing_uses_it() -> None:
    with bench("--piece", "64") as here:
        front, back = everybody = here.party("front", "back")
        length = MIB
        _, source = front.allocate("front-middle", bytes(length))
        _, reference = back.allocate("middle-back", bytes(length))
        answers: list[Completion] = []
        assert back.control.copy(source, reference, length, answers.append) is Result.OK
        drive(everybody, lambda: here.service.broker_status()["counts"]["back"]["pieces"] > 0)
        (lease,) = front.exports.held
        front.control.revoke(lease)
        assert front.exports.held[lease] != -1
        drive(everybody, lambda: front.exports.held[lease] == -1)
        back.control.endpoint.pump(0.0)
        ok(answers[0], length)  # what had begun was finished first
        front.exports.known.clear()
        refused(copy(everybody, back, source, reference, 10), Refusal.STALE)


def test_leases_that_are_not_kept_are_given_back() -> None:
    with bench() as here:
        front, back = everybody = here.party("front", "back")
        _, reference = back.allocate("middle-back", bytes(PAGE))
        for n in range(100):
            _, source = front.allocate("front-middle", bytes([n]) * 64)
            ok(copy(everybody, back, source, reference, 64), 64)
        held = [lease for lease, slot in front.exports.held.items() if slot != -1]
        drive(everybody, lambda: sum(slot != -1 for slot in front.exports.held.values()) == 32)
        assert held[-32:] == list(range(69, 101))
        assert here.service.broker_status()["leases"] == 32


def test_memory_is_opened_when_needed_and_no_more_than_so_much_of_it() -> None:
    pairs = (("a", "b"), ("c", "d"), ("e", "f"))
    with bench("--regions", "2", size=MIB, links=pairs) as here:
        everybody = here.party()
        made = {f"{a}-{b}": here.parties[a].allocate(f"{a}-{b}", a.encode() * PAGE) for a, b in pairs}
        before = descriptors(here.service.broker_pid)
        for first, second in (("a-b", "c-d"), ("c-d", "e-f"), ("e-f", "a-b")):
            asker = here.parties[second[0]]
            ok(copy(everybody, asker, made[first][1], made[second][1], PAGE), PAGE)
            status = here.service.broker_status()
            assert status["mapped"] == status["mapped_most"] == 2
            assert descriptors(here.service.broker_pid) <= before + 3  # two regions, and the caller of status
        assert here.parties["a"].content("a-b", made["a-b"][0]) == b"a" * PAGE
        assert here.service.broker_status()["opened"] == 4
        here.service.drop("a-b")
        until("the dropped region is let go of", lambda: here.service.broker_status()["mapped"] == 1)
        refused(copy(everybody, here.parties["c"], made["a-b"][1], made["c-d"][1], PAGE), Refusal.FAILED,
                "does not exist")


def test_copies_need_no_region_server_and_the_next_one_is_found() -> None:
    with bench() as here, ExitStack() as held:
        front, back = everybody = here.party("front", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        ok(copy(everybody, back, source, reference, PAGE), PAGE)
        os.kill(here.service.server_pid, signal.SIGSTOP)
        back.control.endpoint.disconnect()
        ok(copy(everybody, back, source, reference, PAGE), PAGE)
        os.kill(here.service.server_pid, signal.SIGKILL)
        ok(copy(everybody, back, source, reference, PAGE), PAGE)
        here.service.restart()
        drive(everybody, lambda: {"front", "back"} <= set(here.service.broker_status()["domains"]))
        fresh = here.service.create(RegionSpec("late-back", MIB, {"late": Rights.RW, "back": Rights.RW}))
        late = join_domain(here.service, "late", here.service.control("late"), [fresh], held)
        _, new = late.allocate("late-back", bytes(PAGE))
        ok(copy([*everybody, late], late, source, new, PAGE), PAGE)
        domains = here.service.broker_status()["domains"]
        assert set(domains) == {"front", "middle", "back", "late"}
        assert sorted(domains["back"]["writes"]) == ["control-back", "late-back", "middle-back"]
        assert domains["back"]["incarnation"] == 1


def test_what_a_domain_says_of_itself_does_not_count() -> None:
    with bench() as here:
        front, middle, back = here.party("front", "middle", "back")
        _, source = front.allocate("front-middle", bytes(PAGE))
        _, reference = back.allocate("middle-back", bytes(PAGE))
        # it mints references in another's name, and writes another name into its control region's page
        middle.control.identity = back.control.identity
        _, stolen = middle.allocate("middle-back", bytes(PAGE))
        refused(copy([front, middle, back], middle, source, stolen, 10), Refusal.RIGHTS)
        refused(copy([front, middle, back], middle, source, reference, 10), Refusal.RIGHTS)


def test_mistakes_of_whoever_sets_it_up() -> None:
    with running() as service:
        with pytest.raises(ServerError, match="no broker was started"):
            service.broker_status()
        with pytest.raises(RegionError, match="a name of the host's own"):
            service.control(MEMBER)
        with pytest.raises(ServerError, match=r"the broker ended with code 2(.|\n)*must be more than 0"):
            service.start_broker("--piece", "0")
        service.start_broker()
        with pytest.raises(ServerError, match="runs already"):
            service.start_broker()


