"""The program that simulates runs of known truth and judges their claims, in small."""

import numpy as np
import pytest

from harness.studies.study_file import load_study
from harness.verdicts.claims import judge_claims
from harness.verdicts.series import compare_series, series_of


@pytest.fixture
def null(program):
    return program("claims_null")


@pytest.fixture
def study(null):
    return load_study(null.STUDY, device="cpu")


@pytest.fixture
def judged(null, study):
    """A function: the reports of a few simulated runs of a truth."""

    def reports(truth, draws=3, of=study):
        rng = np.random.default_rng(8)
        return [judge_claims(null.simulated_run(of, truth, rng)) for _ in range(draws)]

    return reports


def test_a_simulated_run_is_one_of_the_study(null, study):
    """Every setting and the control in every replicate, and all that the claims are about."""
    run = null.simulated_run(study, null.NULL, np.random.default_rng(1))
    assert len(run.records) == study.protocol.replicates * (len(study.variants) + 1)
    report = judge_claims(run)
    assert "not judged" not in {claim.verdict for claim in report.claims}
    assert report.answers.requests.value > 0.5
    groups = series_of(run.records)
    control = compare_series(groups[study.reference, "variant"], groups[study.reference, "control"], "held_out_loss")
    assert control.ratio == 1.0


def test_identical_settings_support_no_effect(null, judged):
    """Claims of effects are not supported, claims of equality not refuted; the planted truth is found."""
    assert not any({"either"} & null.errors(report, null.NULL) for report in judged(null.NULL))
    for report in judged(null.PLANTED):
        assert "a verdict is wrong" not in null.errors(report, null.PLANTED)
        found = {claim.id: claim.verdict for claim in report.claims}
        assert [found[key] for key in ("1", "1 train", "2", "4", "12")] == ["supported"] * 5


def test_an_effect_in_a_null_run_is_counted(null, judged):
    """A run in which a setting does something errs by the null's measure, in the kind that it is."""
    there = null.Truth(times=lambda variant: 1.5 if variant.r == 512 else 1.0)
    (report,) = judged(there, 1)
    assert {"an effect is supported", "either"} <= null.errors(report, null.NULL)
    uneven = null.Truth(times=lambda variant: 1.5 if variant.lora_alpha == 64 else 1.0)
    (report,) = judged(uneven, 1)
    assert {"an equality is refuted", "either"} <= null.errors(report, null.NULL)


def test_a_wrong_verdict_is_counted_in_the_planted_set(null, judged):
    """Runs in which nothing is planted have the opposite of what the planted truth says."""
    (report,) = judged(null.NULL, 1)
    assert "a verdict is wrong" in null.errors(report, null.PLANTED)


def test_limits_vanish_in_the_second_set(null, study):
    """Every part has the limit that leaves only its interval; nothing else changes."""
    parts = [part for claim in null.at_the_limit(study).claims for part in claim.parts]
    assert {part.limit[1] for part in parts} == {0.0, 1e-9}
    assert [claim.id for claim in null.at_the_limit(study).claims] == [claim.id for claim in study.claims]


def test_every_claim_of_the_study_has_a_planted_truth(null, study):
    """A claim that is added to the study must be given its truth here."""
    assert set(null.PLANTED.claims) == {claim.id for claim in study.claims}


@pytest.mark.parametrize(
    ("count", "bounds", "holds"),
    [(5, {"most": 0.05}, True), (9, {"most": 0.05}, True), (15, {"most": 0.05}, False),
     (75, {"least": 0.8}, True), (60, {"least": 0.8}, False), (0, {}, True)],
)  # fmt: skip
def test_bounds_are_exact_binomial(null, count, bounds, holds):
    """What chance can do in so many runs is no broken promise; more is."""
    cell = null.Cell("row", count, 100, **bounds)
    assert cell.holds == holds
    assert cell.interval[0] <= cell.share <= cell.interval[1]


def test_a_broken_promise_is_an_exit_status(null, monkeypatch, capsys):
    """Exit 1 with row, share and promise; else 0."""
    bad, good = null.Cell("null: either", 50, 100, most=0.05), null.Cell("null: either", 1, 100, most=0.05)
    monkeypatch.setattr(null, "measure", lambda one, draws: iter([bad]))
    assert null.main([]) == 1
    assert "does not hold: null: either: 50.0% of 100 runs, at most 5% is promised" in capsys.readouterr().out
    monkeypatch.setattr(null, "measure", lambda one, draws: iter([good]))
    assert null.main([]) == 0
    assert "holds: every promise" in capsys.readouterr().out


def test_all_sets_are_measured(null, study):
    """Each set gives its rates, the planted one a row for each claim beside them."""
    rows = {one.name: [cell.row for cell in null.measure(one, 1)] for one in null.sets(study)}
    assert {name: len(cells) for name, cells in rows.items()} == {
        "null": 4, "null, at the limit": 4, "planted": 2 + len(study.claims),
    }  # fmt: skip
