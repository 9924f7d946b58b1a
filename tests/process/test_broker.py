"""Host copy between host processes as domains: what is copied, what is refused, who notices what."""

from __future__ import annotations

import secrets

from broker_support import bench, copy

from idc.endpoint import Result
from idc.remote.controlframes import parse_copied


def test_bytes_go_once_between_regions_that_the_two_do_not_share() -> None:
    with bench() as here:
        front, back = here.parties["front"], here.parties["back"]
        content = secrets.token_bytes(3 * (1 << 20) + 17)
        _, source = front.allocate("front-middle", content)
        target, reference = back.allocate("middle-back", bytes(len(content)))
        done = copy([front, back], back, source, reference, len(content))
        assert done.result is Result.OK, done.reason
        assert parse_copied(done.status) == len(content)
        assert back.content("middle-back", target) == content
        status = here.service.broker_status()
        assert status["counts"]["back"]["copied"] == len(content)
        assert status["counts"]["back"]["pieces"] == 4
        assert (status["mapped"], status["leases"], status["jobs"]) == (2, 2, 0)
