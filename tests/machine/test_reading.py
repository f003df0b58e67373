"""A reading has a value or a reason, and files of the kernel that surprise us are missing values, not errors."""

from __future__ import annotations

import pytest

from harness.machine.reading import Reading, count_of, missing, read_file


def test_a_reading_has_a_value_or_a_reason():
    """Both or neither is a defect of a meter; a zero is a value."""
    for arguments in ({}, {"value": 1, "reason": "why"}):
        with pytest.raises(ValueError, match="a value or a reason"):
            Reading(**arguments)
    assert Reading(value=0).known
    assert not missing("why").known


def test_conversions_keep_what_is_missing_missing():
    """The reason survives."""
    assert Reading(value=2).then(lambda value: value * 1e6) == Reading(value=2e6)
    assert missing("why").then(lambda value: value * 1e6) == missing("why")


def test_a_file_is_read_or_said_to_be_missing(tmp_path):
    """Not there, not readable as such, not understood."""
    path = tmp_path / "counter"
    assert read_file(path, int, "no such counter").reason == "no such counter"
    path.write_text("12\n")
    assert read_file(path, int, "no such counter").value == 12
    path.write_text("many\n")
    assert "says 'many" in read_file(path, int, "no such counter").reason
    assert "Is a directory" in read_file(tmp_path, int, "no such counter").reason


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "1e999", "nan", "-inf", ""])
def test_what_is_no_number_is_missing(text, tmp_path):
    """Nor is a number that no kernel counts to."""
    path = tmp_path / "counter"
    path.write_text(text)
    assert "which is not understood" in read_file(path, count_of, "no such counter").reason
    assert "which is not understood" in read_file(path, float, "no such counter").reason or text.isdigit()


def test_what_has_no_quotient_is_missing(tmp_path):
    """A conversion may divide."""
    (tmp_path / "counter").write_text("0")
    assert "which is not understood" in read_file(tmp_path / "counter", lambda text: 1 / int(text), "none").reason
