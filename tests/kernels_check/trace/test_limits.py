"""The limits on a document follow it through parts of any size, and count what stands in strings for nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_check.trace import file as limits
from kernels_check.trace.file import JsonLimits

json_values = st.recursive(
    st.none()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('a1-"\\\\[]{},: ', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\\\[7', max_size=4), inner, max_size=3),
    max_leaves=12,
)


def levels(value):
    """How deep a value nests, a scalar not at all."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(levels, inner), default=0)


def longest(value, kind):
    """Bytes of the longest string or number as JSON spells it."""
    if isinstance(value, dict):
        return max((max(longest(key, kind), longest(held, kind)) for key, held in value.items()), default=0)
    if isinstance(value, list):
        return max((longest(held, kind) for held in value), default=0)
    text = json.dumps(value)
    if isinstance(value, str):
        return len(text) - 2 if kind == "string" else 0
    return len(text) if kind == "number" and value is not None else 0


def problems(text, size):
    """What is said of a text that is read in parts of one size."""
    followed = JsonLimits()
    found = [followed.problem(text[start : start + size]) for start in range(0, len(text), size)]
    return [problem for problem in found if problem is not None]


@pytest.mark.parametrize(
    ("limit", "says", "measure"),
    [
        ("MOST_LEVELS", "nests deeper", levels),
        ("LONGEST_NUMBER_BYTES", "number", lambda value: longest(value, "number")),
    ],
)
@settings(deadline=None, max_examples=200)
@given(value=json_values, size=st.integers(1, 40))
def test_a_limit_is_met_exactly(limit, says, measure, value, size):
    """Nothing is said at the limit, and something one below it, however the text is cut into parts."""
    text, most = json.dumps(value).encode(), measure(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, limit, most)
        assert problems(text, size) == []
        if most:
            patch.setattr(limits, limit, most - 1)
            assert any(says in problem for problem in problems(text, size))


@settings(deadline=None, max_examples=200)
@given(value=json_values, size=st.integers(1, 40))
def test_a_long_string_is_noticed_while_it_is_read(value, size):
    """One that spans several parts, to within a part; one inside a part is short by that."""
    text, most = json.dumps(value).encode(), longest(value, "string")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "LONGEST_STRING_BYTES", most)
        assert problems(text, size) == []
        if most > 2 * size:
            patch.setattr(limits, "LONGEST_STRING_BYTES", most - size - 1)
            assert any("string" in problem for problem in problems(text, size))
