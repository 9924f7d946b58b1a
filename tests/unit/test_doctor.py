"""What `testbed doctor` says of a machine that lacks what it looks with."""

import pytest

from testbed import doctor


def test_a_machine_without_unshare_is_told_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.doctor.shutil.which", lambda *_: None)
    found = doctor._user_namespaces()
    assert (found.name, found.state, found.remedy) == ("user namespaces", "warn", "apt install util-linux")
