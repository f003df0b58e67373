"""A constructed profile of requests: its lines add up, and all of it is on screen, in the document and in the file."""

import dataclasses
import io
import json

import pytest

from harness import cli
from harness.commands import profile as commands_profile
from harness.models.costs.decoding import mean_context
from harness.profile.requests import measure as measuring
from harness.profile.requests.accounting import request_accounts
from harness.profile.requests.evidence import evidence_of_requests
from harness.profile.requests.facts import RequestProfile
from harness.profile.requests.rules import diagnose_requests
from harness.records import codec
from harness.report.requests import describe_requests
from harness.report.terminal import console_for, show

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


def test_prompts_of_one_request_share_what_is_read(profile):
    """Each has its own products and its part of the cache, which is seen whole; the report says how many there are."""
    workload = dataclasses.replace(profile.workload, request_batch=4)
    sight = dataclasses.replace(profile.sight, cache_bytes=4 * profile.sight.cache_bytes)
    four = dataclasses.replace(profile, workload=workload, sight=sight)
    (served, _), (one, _) = request_accounts(four), request_accounts(profile)
    assert served.prefill.flops == 4 * one.prefill.flops
    assert served.decode.flops == 4 * one.decode.flops
    assert served.prefill.bytes == one.prefill.bytes
    assert served.decode.bytes == one.decode.bytes + 3 * 1024 * mean_context(workload)
    assert served.decode.mbu.value == pytest.approx(one.decode.mbu.value * served.decode.bytes / one.decode.bytes)
    said = describe_requests(four, *request_accounts(four), findings_of(four)[2])[0]
    assert "requests of 4 prompts of 32 tokens each, answered by 8 each" in said.text


def test_what_a_pass_takes_is_counted_from_the_model(profile):
    """By hand: rows through the weights, one row of logits, pairs of attention; bytes as they are stored."""
    served, merged = request_accounts(profile)
    attention = 4 * 2 * 2 * 32
    assert served.prefill.flops == 2 * 32 * 110_000 + 2 * 262_144 + attention * 32 * 33 // 2
    context = mean_context(profile.workload)
    assert served.decode.flops == 2 * 110_000 + 2 * 262_144 + attention * context
    cache = 39 * 1024 * context // 39
    assert served.decode.bytes == 200_000 + 524_288 + 640 + 20_000 + cache
    assert served.decode.bytes - merged.decode.bytes == 20_000
    assert served.decode.mbu.value == pytest.approx(served.decode.bytes / (0.01 * 1e10))
    unknown = dataclasses.replace(profile, shape=None, peaks={})
    account, _ = request_accounts(unknown)
    assert account.prefill.flops == 2 * 32 * 110_000 + 2 * 262_144
    assert (account.prefill.mfu, account.decode.mbu) == (None, None)


def test_what_a_device_holds_beside_the_peak_is_shown(profile, capsys):
    """As in a profile of steps: what the allocator keeps is no kind of what is in use."""
    memory = dataclasses.replace(profile.memory, beside={"fragmentation": 3 * 2**20})
    seen = dataclasses.replace(profile, memory=memory)
    show(describe_requests(seen, *findings_of(seen)), console_for())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "fragmentation, beside it" in line]
    assert "3 MiB" in line


def test_the_copied_head_and_the_adapter_are_found(profile):
    """With what each costs: half of what the profiler saw, and what merging gained."""
    *_, findings = findings_of(profile)
    assert [finding.code for finding in findings] == ["weight-copied", "adapter-unmerged"]
    assert findings[0].cost_s == pytest.approx(0.31 / 2 - 524_288 / 1e10)
    assert findings[1].cost_s == pytest.approx(0.045)
    head = dataclasses.replace(profile, sight=dataclasses.replace(profile.sight, head=""))
    assert not findings_of(head)[2][0].suggestion


def test_a_prompt_of_one_token_has_no_other_length(profile):
    """What could not be asked is not judged."""
    asked = {name: times for name, times in profile.record.samples.items() if "_length_" not in name}
    seen = dataclasses.replace(profile, record=profile.record.replaced(samples=asked))
    assert evidence_of_requests(seen, *request_accounts(seen)).new_length is None


def test_all_of_it_is_shown_and_read_back(profile):
    """Both states, passes, memory at the first token, the cache, the waterfall, the findings."""
    served, merged, findings = findings_of(profile)
    text = io.StringIO()
    show(describe_requests(profile, served, merged, findings), console_for(text))
    for words in ("prefill: the pass over the prompt", "a token of decode, with the adapter merged", "first token",
                  "DynamicCache, 39 KiB", "made anew at 100%", "quantising it", "6.2 s", "--try weight-copied",
                  "looked for and not found: dequantisation", "256 MiB", "lm_head.weight"):  # fmt: skip
        assert words in text.getvalue()
    assert codec.from_json(RequestProfile, json.loads(codec.dumps(profile)), "profile") == profile


def test_a_cold_start_that_failed_costs_nothing_else(profile):
    """Its table is left out, and all else is there."""
    lost = dataclasses.replace(profile, record=profile.record.replaced(values={}))
    served, merged, findings = findings_of(lost)
    text = io.StringIO()
    show(describe_requests(lost, served, merged, findings), console_for(text))
    assert lost.cold_parts_s == {}
    assert "A cold start" not in text.getvalue()
    assert "weight-copied" in text.getvalue()


def test_an_adapter_that_is_served_merged_has_one_state(profile):
    """Then its requests have no adapter beside the base, and nothing is compared with it."""
    seen = dataclasses.replace(
        profile, merged_activity=None, variant=dataclasses.replace(profile.variant, merge_adapter=True)
    )
    served, merged, findings = findings_of(seen)
    assert merged is None
    assert served.decode.bytes == request_accounts(profile)[1].decode.bytes
    assert "adapter-unmerged" not in {finding.code for finding in findings}


def test_the_command_prints_one_document(profile, monkeypatch, capsys, tmp_path):
    """With --json nothing else is on stdout; the remedy is tried that is asked for, by the phase's own findings."""
    monkeypatch.setattr(measuring, "profile_requests", lambda *args, **options: (profile, tmp_path))
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
    assert "no finding of requests" in capsys.readouterr().err
