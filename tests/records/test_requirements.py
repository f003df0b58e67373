"""Tests of required paths: only an active check meets a requirement."""

import pytest

from lorameter.records.record import PartialRecord, find_unmet, judge_required


def check(path, status="active", reason="as made up"):
    return {"path": path, "status": status, "reason": reason}


@pytest.mark.parametrize(
    ("checks", "kind", "said"),
    [
        ([], "RequiredPathNotSeen", "mode: required 'train', no step was watched"),
        ([check("base.bits")], "RequiredPathNotSeen", "no row of the watched step is about it"),
        ([check("mode", "fallback")], "RequiredPathNotActive", "mode: required 'train', as made up"),
        ([check("mode", "unknown")], "RequiredPathNotActive", "as made up"),
    ],
)
def test_an_unmet_requirement_has_its_kind_and_reason(checks, kind, said):
    """A path without a check and a path that is not active are unmet, with different kinds."""
    found = find_unmet(checks, {"mode": "train"})
    assert found.kind == kind
    assert said in found.message


def test_requirements_are_met_if_all_are_active():
    """Other checks do not matter."""
    assert find_unmet([check("mode"), check("base.bits", "fallback")], {"mode": "train"}) is None
    assert find_unmet([], {}) is None


def test_a_fallback_is_allowed_by_a_notice_or_makes_the_trial_invalid():
    """The notice and the failure have the same message."""
    fragment = PartialRecord(checks=(check("mode", "fallback"),))
    strict = judge_required(fragment, {"mode": "train"}, name="r4", allow_fallback=False)
    lenient = judge_required(fragment, {"mode": "train"}, name="r4", allow_fallback=True)
    assert (strict.status, lenient.status) == ("invalid", "ok")
    assert [notice.code for notice in lenient.notices] == ["fallback-allowed"]
    assert strict.failure.message in lenient.notices[0].message
    assert judge_required(fragment, {}, name="r4", allow_fallback=False) is fragment
