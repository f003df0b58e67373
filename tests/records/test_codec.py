"""Tests that the codec is strict in both directions."""

import math

import pytest

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.record import Notice, PartialRecord
from lorameter.studies.variant import AnyVariant


def test_nan_is_named_not_written_as_json():
    """NaN is written as a string, and a float field reads it back."""
    text = codec.dumps(PartialRecord(values={"loss": math.nan}))
    assert "NaN" in text
    assert '"NaN"' in text
    assert math.isnan(codec.from_json(PartialRecord, {"values": {"loss": "NaN"}}, "test").values["loss"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rr": 8}, ["here", "rr", "unknown key", "Did you mean r?"]),
        ({"r": "8"}, ["here", "r = '8'", "int is expected"]),
        ({"r": True}, ["r = True", "int is expected"]),
        ({"quantization": "nf5"}, ["quantization", "nf5", "nf4"]),
        ({"target_modules": "q_proj"}, ["target_modules", "a list is expected"]),
        ({"lora_dropout": None}, ["lora_dropout", "float is expected"]),
    ],
)
def test_wrong_input_is_refused_by_name(data, words):
    """For unknown keys and wrong types the error has the place, the key, the value and a valid replacement."""
    with pytest.raises(UsageError) as caught:
        codec.from_json(AnyVariant, data, "here", strict=True)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_key_is_named():
    """The error names the missing key, which has no default."""
    with pytest.raises(UsageError, match="here: remedy is missing"):
        codec.from_json(Notice, {"code": "a", "message": "b"}, "here")
