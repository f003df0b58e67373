"""The cases that are planted in real requests: each could run, and names rules that there are."""

from types import SimpleNamespace

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


def test_a_cpu_leaves_out_what_it_cannot_do_and_says_so(planted, capsys):
    """Only what multiplies packed weights as they are; the narrow case is for every CPU, and told of by a path."""
    for is_wide, left in ((True, []), (False, ["4-bit weights as they are"])):
        machine = SimpleNamespace(avx512_bf16=is_wide)
        assert [case.name for case in planted.CASES if not planted.is_possible(case, machine)] == left
        assert ("left out: this CPU has no AVX512-BF16" in capsys.readouterr().out) is bool(left)
    narrow = [case.name for case in planted.CASES if "narrow_cpu" in planted.environment(case).get("PYTHONPATH", "")]
    assert narrow == ["4-bit weights"]


def test_what_no_case_plants_is_named(planted):
    """Rules of which no field of a variant makes a case, as the program says of itself."""
    rest = set(REQUEST_RULES) - {code for case in planted.CASES for code in case.found}
    assert rest == {
        "between-tokens", "checkpointing-left-on", "new-length", "no-cache", "prompt-logits", "train-mode",
    }  # fmt: skip
