"""Families of transformers, counted from their modules: the program on a few of them, and on planted errors."""

import pytest

FAMILIES = ("bloom", "gemma3_text", "phi")


@pytest.fixture
def counting(program):
    return program("counted_families")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_counted_is_what_a_step_multiplies(counting, name):
    """One layer for three operands, heads that are normed and wider than the model, two layers beside each other."""
    found = [one for one in counting.causal() if one.name == name]
    if not found:
        pytest.skip(f"this transformers has no {name}")
    result = counting.examine(found[0])
    assert set(result.errors) == set(counting.WAYS), result.left_out
    assert not result.off(0.01), result.errors


def test_a_family_that_is_off_is_a_fault_unless_it_is_named(counting, monkeypatch):
    """With its reason; and one that is named and right is a fault as well. What was not counted is none."""

    def result(family, **errors):
        return counting.Result(family=family, errors=errors, left_out={})

    monkeypatch.setattr(counting, "EXCEPTIONS", {"scans": "a scan is not counted"})
    right, off, scans, none = (
        result("a", adapter=0.01),
        result("b", adapter=-0.2),
        result("scans", adapter=-0.4),
        result("c"),
    )
    assert list(counting.faults_in([right, off, scans, none], 0.05)) == ["b is off"]
    assert list(counting.faults_in([result("scans", adapter=0.0)], 0.05)) == ["scans is no exception any more"]
