"""The cases that are planted in real requests: each could run, and names rules that there are."""

import pytest

from harness.profile.requests.rules import REQUEST_RULES


@pytest.fixture
def planted(program):
    return program("request_profiles")


def test_every_case_could_run(planted):
    """Its variant and its workload are such as a study takes, one or two fields from the healthy ones."""
    healthy = planted.study_of(planted.CASES[0], "tiny-llama").variants[0]
    for case in planted.CASES:
        study = planted.study_of(case, "tiny-llama")
        assert len(study.variants[0].differences(healthy)) == len(case.variant)
        assert {*case.found, *case.absent} <= set(REQUEST_RULES)
        assert not set(case.found) & set(case.absent)


def test_what_no_case_plants_is_named(planted):
    """Rules of which no field of a variant makes a case, as the program says of itself."""
    rest = set(REQUEST_RULES) - {code for case in planted.CASES for code in case.found}
    assert rest == {
        "between-tokens", "checkpointing-left-on", "new-length", "no-cache", "prompt-logits", "train-mode",
    }  # fmt: skip
