"""The codec is strict in both directions."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.record import Failure, Notice, PartialRecord
from lorameter.studies.variant import AnyVariant

fragments = st.builds(
    PartialRecord,
    samples=st.dictionaries(st.text(max_size=5), st.lists(st.floats(), max_size=4).map(tuple), max_size=3),
    values=st.dictionaries(st.text(max_size=5), st.floats(), max_size=3),
    memory=st.dictionaries(st.text(max_size=5), st.integers(0, 2**60), max_size=3),
    notices=st.lists(st.builds(Notice, code=st.text(), message=st.text(), remedy=st.text()), max_size=2).map(tuple),
    failure=st.none() | st.builds(Failure, phase=st.text(), kind=st.text(), message=st.text()),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(fragments)
def test_a_fragment_survives_the_pipe(fragment):
    """What is written is read back equal, infinities and NaN included."""
    read = codec.from_json(PartialRecord, __import__("json").loads(codec.dumps(fragment)), "test")
    assert codec.dumps(read) == codec.dumps(fragment)


def test_nan_is_named_not_written_as_json():
    """JSON text never holds NaN, and a float field gets it back."""
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
    """Unknown keys and wrong types name the place, the key, the value and what to write instead."""
    with pytest.raises(UsageError) as caught:
        codec.from_json(AnyVariant, data, "here", strict=True)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_key_is_named():
    """A key without a default cannot be left out."""
    with pytest.raises(UsageError, match="here: remedy is missing"):
        codec.from_json(Notice, {"code": "a", "message": "b"}, "here")
