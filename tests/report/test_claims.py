"""What `lorameter claims` prints, in text and as JSON, and its exit codes."""

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.variant import LoraVariant

STEPS = {"plain": [1.0, 1.1, 0.9, 1.2], "r8": [1.0, 1.14, 0.93, 1.2]}


@pytest.fixture
def study(small_study):
    """Two levels of r, a claim of one part and one of two, and a deviation."""
    return dataclasses.replace(
        small_study,
        variants=(LoraVariant(name="plain", r=4), LoraVariant(name="r8", r=8)),
        claims=(
            Claim(
                id="1", says="step time rises with r", original="33 min at r 4, 35 min at r 8",
                parts=(ClaimPart(rule="trend-up", axis="r", metric="step_time_s"),),
            ),
            Claim(
                id="2", says="more [parameters], equal time",
                parts=(
                    ClaimPart(rule="rises", axis="r", metric="trainable_parameters"),
                    ClaimPart(rule="equal", axis="r", metric="step_time_s"),
                ),
            ),
        ),
        notes=("the original ran each setting once",),
        replaced={"workload.model": "llama2-7b"},
    )  # fmt: skip


@pytest.fixture
def claims(write_run, study, tmp_path, capsys):
    """A function: write a run, `lorameter claims` it; the exit code and the output, a document with --json."""

    def run(*options, steps=STEPS, **written):
        name = write_run("mine", steps, **{"study": study} | written).name
        code = main(["claims", name, "--runs-dir", str(tmp_path / "runs"), *options])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if "--json" in options and printed.out else printed.out + printed.err

    return run


def counted(record):
    return record.replaced(values={"trainable_parameters": 921600.0 * (1 + (record.name == "r8"))})


def test_the_text_says_what_was_claimed_found_and_changed(claims):
    """Claim, original, estimate, verdict and reason; then the control, deviations and notes; nothing cut, no colour."""
    code, text = claims(change=counted)
    assert code == 0
    flat = " ".join(text.replace("│", " ").split())
    for words in (
        "1 step time rises with r", "33 min at r 4, 35 min at r 8", "8 / 4", "inconclusive", "supported",
        "more [parameters], equal time", "trainable_parameters: by r, 921,600 at 4, 1,843,200 at 8",
        "no level differs", "run mine: 4 replicates; trials: 12 planned, 12 ok",
        "step time: 1.000 [0.986, 1.014] equivalent", "workload.model = 'tiny-llama' in place of 'llama2-7b'",
        "the original ran each setting once",
    ):  # fmt: skip
        assert words in flat
    assert "\x1b" not in text
    assert "Length of the answers" not in text


def test_any_verdict_is_a_pass(claims):
    """Refuted and not judged claims end with 0: they are findings."""
    code, document = claims("--json", steps={"plain": [1.0] * 3, "r8": [1.5] * 3}, change=counted)
    assert (code, [one["verdict"] for one in document["claims"]]) == (0, ["supported", "refuted"])
    code, document = claims("--json", steps={name: times[:1] for name, times in STEPS.items()})
    assert (code, {one["verdict"] for one in document["claims"]}) == (0, {"not judged"})


def test_a_failed_control_is_an_exit_status(claims):
    """The reference differs from itself: exit 4, and the text says what to do."""
    code, text = claims(control=1.3)
    assert code == 4
    assert text.startswith("INVALID: the reference differs from itself: its control in step time")
    assert claims("--json", control=1.3)[0] == 4


def test_a_run_without_a_trial_that_is_ok_is_an_exit_status(claims):
    """Nothing to judge by: exit 4."""
    code, text = claims(change=lambda record: record.replaced(status="crashed"))
    assert code == 4
    assert "there is nothing to judge by" in text


def test_a_study_without_claims_is_a_usage_error(claims, small_study):
    """Exit 2, on stderr, with what to add."""
    code, text = claims("--json", study=small_study, steps={"plain": [1.0, 1.1], "nf4": [1.0, 1.1]})
    assert code == 2
    assert "claims nothing. Add [[claim]]" in text
