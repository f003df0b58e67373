"""A constructed profile of requests: its lines add up, and all of it is on screen, in the document and in the file."""

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
    """Phases and remainder are the request; a pass over one token is its share of decode."""
    served, merged = request_accounts(profile)
    assert sum(span.value for span in served.whole.phases.values()) == pytest.approx(served.whole.step.value - 0.001)
    assert served.whole.remainder.value == pytest.approx(0.001)
    assert served.decode.time.value == pytest.approx(0.01)
    assert (served.decode.calls, merged.decode.calls) == (20.0, 10.0)


def test_tokens_are_those_of_the_requests_that_count(profile):
    """Of pairs half of which had no CPU to themselves: what a token took in those is in no median, as in no phase."""
    samples = {}
    for name, times in profile.record.samples.items():
        slow = 1.0 if "cpu_time" in name else 3.0
        samples[name] = times + tuple(slow * time for time in times)
    seen = dataclasses.replace(profile, record=profile.record.replaced(samples=samples))
    for account, quiet in zip(request_accounts(seen), request_accounts(profile), strict=True):
        assert (account.whole.pairs, account.whole.counted) == (16, 8)
        assert account.first_token.value == quiet.first_token.value
        assert account.token.value == quiet.token.value
        assert account.prefill.time.value == quiet.prefill.time.value


def test_the_copied_head_and_the_adapter_are_found(profile):
    """With what each costs: half of what the profiler saw, and what merging gained."""
    *_, findings = findings_of(profile)
    assert [finding.code for finding in findings] == ["weight-copied", "adapter-unmerged"]
    assert findings[0].cost_s == pytest.approx(0.31 / 2 - 524_288 / 1e10)
    assert findings[1].cost_s == pytest.approx(0.045)
    head = dataclasses.replace(profile, facts=msgspec.structs.replace(profile.facts, head=""))
    assert not findings_of(head)[2][0].suggestion


def test_the_command_prints_one_document(profile, monkeypatch, capsys, tmp_path):
    """With --json nothing else is on stdout; the remedy is tried that is asked for, by the phase's own findings."""
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
