"""Tests of the report of a constructed request profile: its lines add up, and terminal, document and file have all of
it."""

import dataclasses
import json

import msgspec
import pytest

from lorameter import cli
from lorameter.commands import profile as commands_profile
from lorameter.profile.accounting import request_accounts
from lorameter.profile.evidence import evidence_of_requests
from lorameter.profile.request_rules import diagnose_requests

LINE = "profile lora-or-qlora:lora-r16 --phase generate"


@pytest.fixture
def profile(requests_profile):
    return requests_profile


def findings_of(profile):
    served, merged = request_accounts(profile)
    return served, merged, diagnose_requests(evidence_of_requests(profile, served, merged))


def test_the_lines_of_a_request_add_up(profile):
    """Phases and remainder add up to the request; a pass over one token has its share of the decode time."""
    served, merged = request_accounts(profile)
    assert sum(span.value for span in served.whole.phases.values()) == pytest.approx(served.whole.step.value - 0.001)
    assert served.whole.remainder.value == pytest.approx(0.001)
    assert served.decode.time.value == pytest.approx(0.01)
    assert (served.decode.calls, merged.decode.calls) == (20.0, 10.0)


def test_the_copied_head_and_the_adapter_are_found(profile):
    """The costs are half of the profiled time and the gain of merging."""
    *_, findings = findings_of(profile)
    assert [finding.code for finding in findings] == ["weight-copied", "adapter-unmerged"]
    assert findings[0].cost_s == pytest.approx(0.31 / 2 - 524_288 / 1e10)
    assert findings[1].cost_s == pytest.approx(0.045)
    head = dataclasses.replace(profile, facts=msgspec.structs.replace(profile.facts, head=""))
    assert not findings_of(head)[2][0].suggestion


def test_the_command_prints_one_document(profile, monkeypatch, capsys, tmp_path):
    """With --json stdout has one document only; --try measures the suggested change for the phase of the finding."""
    monkeypatch.setattr(commands_profile, "profile_requests", lambda *args, **options: (profile, tmp_path))
    assert cli.main([*LINE.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [finding["metric"] for finding in document["findings"]] == ["first_token_time_s", "request_time_s"]
    assert set(document["requests"]) == {"served", "merged"}
    assert document["requests"]["served"]["decode"]["time"]["value"] == pytest.approx(0.01)
    assert sum(document["cold_parts_s"].values()) == pytest.approx(6.2)
    asked = []
    monkeypatch.setattr(commands_profile, "_try", lambda *given: asked.append(given[2]))
    cli.main([*LINE.split(), "--try", "--json"])
    cli.main([*LINE.split(), "--try", "adapter-unmerged", "--json"])
    assert [dict(finding.changes) for finding in asked] == [{"copy_head_input": True}, {"merge_adapter": True}]
    capsys.readouterr()
    assert cli.main([*LINE.split(), "--try", "padding"]) == 2
    assert "no such finding" in capsys.readouterr().err
