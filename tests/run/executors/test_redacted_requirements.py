"""Requirements that were written down without their credential, asked for again."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError, redact
from lorameter.run.executors.environments import parse_requirements
from lorameter.run.executors.redacted_requirements import asked_again

KEPT = redact("peft @ https://user:hunter2@host.example:8443/peft.whl torch==2.9.0")


def test_a_credential_that_is_nowhere_is_asked_for(tmp_path):
    """With the ways of giving it, and the host that it is for."""
    with pytest.raises(UsageError, match=r"run r, base: .*host\.example:8443 is not kept.*\.netrc") as refused:
        asked_again("run r, base", KEPT, {"HOME": str(tmp_path), "PIP_INDEX_URL": "https://u:p@other.example/simple"})
    assert "machine host.example login" in str(refused.value)
    assert "PIP_EXTRA_INDEX_URL" in str(refused.value)


@pytest.mark.parametrize("by", ["home", "netrc", "index"])
def test_a_credential_that_is_kept_elsewhere_is_not_asked_for(tmp_path, by):
    """pip takes it from there by the host, so the address goes without its user."""
    environment = {"HOME": str(tmp_path / "none")}
    if by == "index":
        environment["PIP_EXTRA_INDEX_URL"] = "https://pypi.org/simple https://u:p@host.example:8443/simple"
    else:
        (tmp_path / ".netrc").write_text("machine host.example login u password p\n")
        environment |= {"HOME": str(tmp_path)} if by == "home" else {"NETRC": str(tmp_path / ".netrc")}
    again = asked_again("run r, base", KEPT, environment)
    assert parse_requirements(again) == ("peft @ https://host.example:8443/peft.whl", "torch==2.9.0")


def test_a_query_that_is_not_kept_cannot_be_asked_again():
    """No file has it."""
    with pytest.raises(UsageError, match="Measure the A/B anew"):
        asked_again("run r, base", redact("peft @ https://host/peft.whl?sig=hunter2"))


def test_requirements_without_a_credential_stay():
    """Most have none."""
    assert asked_again("run r, base", "peft==0.19.1", {}) == "peft==0.19.1"
