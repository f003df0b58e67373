"""A profile taken for real, of a quantised variant: every part of it was measured, and the file holds all of it."""

from __future__ import annotations

import json

import pytest

from lorameter.profile import accounting
from lorameter.profile.evidence import evidence_of
from lorameter.profile.facts import Profile
from lorameter.profile.measure import DOCUMENT, TRACE, profile_variant
from lorameter.profile.rules import diagnose
from lorameter.records import codec
from lorameter.records.activity import STEP_PHASES
from lorameter.report.profile import describe_profile
from lorameter.report.terminal import console_for, show
from lorameter.run.workers import open_executor

pytestmark = pytest.mark.selftest


@pytest.fixture(scope="module")
def taken(small_study, tmp_path_factory):
    """The profile of the 4-bit variant, and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    return profile_variant(small_study, small_study.variant("nf4"), open_executor(), runs=folder)


def test_a_step_is_divided_into_phases_and_categories(taken):
    """Phases of every pair, what ran in each of them by category, and the profiler's own slow-down."""
    profile, _ = taken
    step = accounting.step_account(profile)
    assert set(step.phases) == set(STEP_PHASES)
    assert step.pairs >= 8
    assert sum(span.value for span in step.phases.values()) == pytest.approx(step.step.value - step.remainder.value)
    assert step.remainder.low <= step.remainder.value <= step.remainder.high
    assert step.profiler_slowdown.value > 0
    found = accounting.categories_s(profile, step)
    assert found["matmul"]["forward"] > 0
    assert found["dequantize"]["backward"] > 0
    assert found["optimizer"]["update"] > 0
    assert not profile.activity.missing


def test_its_memory_is_counted_next_to_the_estimate(taken):
    """A step has the kinds of its memory, what no kind explains, and what was expected."""
    profile, _ = taken
    account = profile.memory
    for kind in ("activations", "optimizer_state", "linear_weights"):
        assert account.kinds[kind] > 0
    assert account.unexplained_bytes == account.peak_bytes - sum(account.kinds.values())
    assert sum(profile.estimates.values()) == pytest.approx(account.peak_bytes, rel=0.25)


def test_it_is_judged_and_shown_from_its_file(taken, capsys):
    """The file gives the same findings and ceilings as the profile; the trace is next to it."""
    profile, folder = taken
    again = codec.from_json(Profile, json.loads((folder / DOCUMENT).read_text(encoding="utf-8")), DOCUMENT)
    assert again == profile
    assert (folder / TRACE).stat().st_size > 0
    step, tokens = accounting.step_account(again), accounting.token_shares(again)
    ceilings = accounting.ceilings(again, step.step)
    assert 0 < ceilings.train.mfu.value <= ceilings.train.hfu.value < 1
    findings = diagnose(evidence_of(again, step, tokens, ceilings))
    show(describe_profile(again, step, tokens, ceilings, findings), console_for())
    shown = capsys.readouterr().out
    for words in ("remainder", "activations kept for backward", "unexplained", "MFU", "6N"):
        assert words in shown
