"""Tests of the validation of requirements and of the rule that makes checks of findings."""

import pytest

from kernels_check.check import PathObservation
from kernels_check.judges.paths import validate


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention.backend", "fast"),
        ("attention.backend", True),
        ("attention.dtype", "torch.bfloat16"),
        ("base.bits", True),
        ("base.bits", 3),
        ("base.bits", 4.0),
        ("base.frozen", "yes"),
        ("base.frozen", 1),
        ("peft.dropout", 1.5),
        ("peft.dropout", False),
        ("optimizer.paged_share", "half"),
        ("optimizer.class", ""),
        ("optimizer.class", "AdamW"),
        ("mode", None),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(path, value):
    """The error names the path and the value."""
    with pytest.raises(ValueError, match=path) as caught:
        validate({path: value})
    assert repr(value) in str(caught.value)


def test_a_class_without_its_package_is_refused_with_the_qualified_name():
    """A bare AdamW is refused, since torch and bitsandbytes each have one; the qualified name is accepted."""
    with pytest.raises(ValueError, match=r"as in 'torch\.optim\.AdamW' or 'bitsandbytes\.optim\.AdamW'"):
        validate({"optimizer.class": "AdamW"})
    validate({"optimizer.class": "torch.optim.AdamW"})


def test_an_unknown_path_is_refused_with_the_known_ones():
    """A misspelt path is an error and not an empty requirement."""
    with pytest.raises(ValueError, match=r"attention\.backened.*attention\.backend"):
        validate({"attention.backened": "flash"})


@pytest.mark.parametrize(
    ("finding", "required", "status"),
    [
        (PathObservation(observed="flash", reason=""), "flash", "active"),
        (PathObservation(observed="math", reason=""), "flash", "fallback"),
        (PathObservation(observed=None, reason="", present=False), "flash", "absent"),
        (PathObservation(observed=False, reason="", present=False), False, "active"),
        (PathObservation(observed="math", reason=""), None, "active"),
        (PathObservation(observed=None, reason="", present=False), None, "not_applicable"),
        (PathObservation(observed=None, reason="", status="unknown"), None, "unknown"),
        (PathObservation(observed=None, reason="", status="unknown"), "flash", "unknown"),
        (PathObservation(observed=0.75, reason="", satisfies=True), 0.5, "active"),
    ],
)
def test_status_follows_from_observation_and_requirement(finding, required, status):
    """Only a satisfied requirement is active; a path without a requirement reports what was observed."""
    assert finding.against("attention.backend", required).status == status
