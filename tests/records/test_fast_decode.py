"""Texts are read fast, and not otherwise than the codec reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.fast_decode import MOST_SHARED, Reader
from lorameter.records.record import Failure, Notice, PartialRecord, TrialRecord
from lorameter.records.store import Manifest, Resumption
from lorameter.records.trial_lines import WrittenRecord
from lorameter.records.validation import check_record, check_tokens
from tests.constructed import FOLDER

ROOT = Path(__file__).parents[2]
patient = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
names = st.text(max_size=4)
integers = st.integers(-codec.MOST_INTEGER, codec.MOST_INTEGER)
plain = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
tables = st.dictionaries(names, plain, max_size=2)
numbers = st.dictionaries(names, st.floats(), max_size=2)
common: dict[str, Any] = {
    "samples": st.dictionaries(names, st.lists(st.floats(), max_size=4).map(tuple), max_size=2),
    "values": numbers,
    "memory": st.dictionaries(names, integers, max_size=2),
    "notices": st.lists(st.builds(Notice, code=names, message=names, remedy=names), max_size=2).map(tuple),
    "tokens": tables,
    "failure": st.none() | st.builds(Failure, phase=names, kind=names, message=names),
    "status": st.sampled_from(("ok", "invalid", "oom", "not_run")),
}
of_trial: dict[str, Any] = {
    "schema": st.integers(1, 5),
    "trial": names,
    "name": names,
    "variant": names,
    "role": st.sampled_from(("variant", "control")),
    "replicate": st.integers(0, 9),
    "position": integers,
    "interleaving": st.sampled_from(("lockstep", "replicates")),
    "seed": integers,
    "started_unix_s": st.floats(),
    "wall_time_s": st.floats(),
    "turn_lengths": st.lists(integers, max_size=3).map(tuple),
}
checks = st.lists(tables, max_size=3).map(tuple)
instances = st.one_of(
    st.builds(TrialRecord, **common, **of_trial, checks=checks),
    st.builds(WrittenRecord, **common, **of_trial, checks=st.lists(names, max_size=3).map(tuple)),
    st.builds(PartialRecord, **common, checks=checks),
    st.builds(
        Manifest,
        run=names,
        study=tables,
        phases=st.lists(names, max_size=2).map(tuple),
        interleaving=names,
        order=st.lists(names, max_size=3).map(tuple),
        seed=integers,
        created_unix_s=st.floats(),
        provenance=tables,
        fingerprint=names,
        stopped=st.none() | names,
        resumed=st.lists(st.builds(Resumption, unix_s=st.floats(), harness=names, commit=st.none()), max_size=2).map(
            tuple
        ),
    ),
)
ODD = (
    None, True, 1.0, -0.0, 10**25, 10**400, "NaN", "Infinity", "-Infinity", "nan", math.nan, math.inf, [], {}, [[]],
    {"a": 1}, "ok", "fine", "\ud800", "\u00e9\u2028", [1, "NaN", 2.5], ["NaN", None], -1, "1",
)  # fmt: skip


def told(read, *arguments: Any) -> tuple[str, str]:
    """What came of reading: the value in all digits, or the kind of error and its words."""
    try:
        return "read", repr(read(*arguments))
    except (UsageError, codec.NotJsonError) as error:
        return type(error).__name__, str(error)


def slowly(cls: type, text: str) -> Any:
    """The one reader of both, as it reads what people write."""
    return codec.from_json(cls, codec.parse(text), "here")


def slowly_held(cls: type, text: str) -> Any:
    """The same, and then held to the form of a record."""
    value = slowly(cls, text)
    check_record(value, "here")
    return value


def as_the_codec(cls: type, text: str, reader: Reader[Any] | None = None) -> None:
    assert told((reader or Reader(cls)).read, text, "here") == told(slowly, cls, text)


@patient
@given(instances)
def test_a_good_text_is_read_as_the_codec_reads_it(value):
    """Equal to the last bit, types and numbers that are none included, and so is the same text again."""
    text, reader = codec.dumps(value), Reader(type(value))
    for _ in range(2):
        as_the_codec(type(value), text, reader)
    assert codec.dumps(reader.read(text, "here")) == text


@patient
@given(instances, st.data())
def test_one_odd_value_is_read_or_refused_as_the_codec_does(value, data):
    """Wherever it stands: the same value comes of it, or the same words."""
    tree = json.loads(codec.dumps(value))
    path = []
    inner = tree
    while isinstance(inner, (dict, list)) and inner and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner)))))
        inner = inner[path[-1]]
    at = tree
    for key in path[:-1]:
        at = at[key]
    kind = data.draw(st.sampled_from(("replaced", "removed", "added")))
    if kind == "removed":
        del at[path[-1]]
    elif kind == "added" and isinstance(at, dict):
        at["step_tme_s"] = data.draw(st.sampled_from(ODD))
    else:
        at[path[-1]] = data.draw(st.sampled_from(ODD))
    as_the_codec(type(value), json.dumps(tree, ensure_ascii=data.draw(st.booleans())))


@patient
@given(st.builds(WrittenRecord, **common, **of_trial), st.data())
def test_what_no_trial_could_leave_is_refused_as_if_it_were_asked_of_each(value, data):
    """Numbers beyond all bounds, tokens that are none: by the struct, the part, or the codec, in the same words."""
    tree = json.loads(codec.dumps(value))
    numbers = st.sampled_from(("NaN", "-Infinity", 1e15, 1.1e15, -1e16, 1e308, 10**18, 2.5))
    for key, drawn in (
        ("samples", st.dictionaries(st.sampled_from(("a", "natural_tokens")), st.lists(numbers, max_size=2))),
        ("values", st.dictionaries(names, numbers, max_size=2)),
        ("tokens", st.dictionaries(st.sampled_from(("hash", "answer_0", "answer_x", "x")), st.sampled_from(ODD))),
        ("wall_time_s", numbers),
    ):
        if data.draw(st.booleans()):
            tree[key] = data.draw(drawn)
    text = json.dumps(tree)
    reader = Reader(WrittenRecord, check_record, {"tokens": check_tokens})
    for _ in range(2):
        assert told(reader.read, text, "here") == told(slowly_held, WrittenRecord, text)


@patient
@given(instances, st.data())
def test_a_damaged_text_is_read_or_refused_as_the_codec_does(value, data):
    """Cut short, or with characters lost, changed or put in."""
    text = codec.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    lost = data.draw(st.integers(0, 3) | st.just(len(text)))
    put = data.draw(st.text(alphabet='{}[]",:0123456789eE+-.\\untrfalsNIy \t\n\x00\ud800é', max_size=3))
    as_the_codec(type(value), text[:at] + put + text[at + lost :])


@pytest.mark.parametrize("text", [
    "", "null", "[]", "1", '"a"', "{", '{"schema": 4} {}', "\ufeff{}", "[" * 100_000, '{"a": ' * 100_000,
    '{"values": {"loss": "N\\u0061N"}}',
    '{"values": {"NaN": "-Infinity"}, "samples": {"a": ["Infinity", 1.0, 2]}, "tokens": {"a": "NaN"}}',
    '{"values": {"loss": NaN}}', '{"values": {"loss": -0}}', '{"values": {"loss": 1e999}}', '{"values": {"loss": 01}}',
    '{"values": {"loss": %s}}' % ("9" * 400), '{"memory": {"b": %s}}' % ("9" * 5000), '{"memory": {"b": 1.0}}',
    '{"tokens": {"a": %s}}' % ("[" * 100_000), '{"tokens": {"a": "\\ud800"}}', '{"status": "ok", "status": "oom"}',
    '{"tokens": {"a": 1, "a": 2}}', '{"st\\u0061tus": "oom"}', '{"checks": [{"a": 1}, null]}', '{"checks": null}',
    '{"failure": null}', '{"failure": {"phase": "a"}}', '{"notices": [{"code": 1}]}', '{"samples": {"a": [1, 2.5]}}',
])  # fmt: skip
def test_what_no_generator_finds(text):
    """Numbers without end, depths without end, keys said twice, other ways to write the same."""
    as_the_codec(PartialRecord, text)


@pytest.mark.parametrize(
    "path", sorted([*FOLDER.glob("*/*/trials.jsonl"), *ROOT.glob("reports/*/trials.jsonl")]),
    ids=lambda path: path.parent.name,
)  # fmt: skip
def test_committed_runs_are_read_as_the_codec_reads_them(path):
    """Every line of every run of an earlier schema, the damaged ones too."""
    reader = Reader(TrialRecord)
    for line in path.read_text(encoding="utf-8").splitlines():
        as_the_codec(TrialRecord, line, reader)


def test_what_is_equal_in_many_texts_is_held_once():
    """The checks of a thousand records are one object each, and texts without end are not kept."""
    reader = Reader(PartialRecord)
    first, second = (reader.read(f'{{"checks": [{{"path": "a"}}, {{"path": "{other}"}}]}}', "") for other in "bc")
    assert first.checks[0] is second.checks[0]
    for number in range(MOST_SHARED + 10):
        assert reader.read(f'{{"tokens": {{"a": {number}}}}}', "").tokens == {"a": number}
    assert len(reader._shared["tokens"]) == MOST_SHARED
