"""Studies are read strictly: whatever cannot be is refused with file, key, value and remedy."""

import pytest

from harness.errors import UsageError
from harness.study_file import builtin_studies, load_study

GOOD = """
title = "t"
[workload]
sequence_length = 64
[controls]
lora_alpha = 32
[axes]
r = [8, 16]
lora_dropout = [0.0, 0.1]
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_axes_make_every_combination(tmp_path):
    """Two axes of two values are four variants with names that say their values."""
    study = load_study(write(tmp_path, GOOD))
    assert [variant.name for variant in study.variants] == [
        "r=8-lora_dropout=0.0", "r=8-lora_dropout=0.1", "r=16-lora_dropout=0.0", "r=16-lora_dropout=0.1",
    ]  # fmt: skip
    assert {variant.lora_alpha for variant in study.variants} == {32.0}
    assert study.reference == "r=8-lora_dropout=0.0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[variant]]\nname='a'\nr=0", ["mine.toml", "'a'", "r = 0", "Use 1 or more"]),
        ("[[variant]]\nname='a'\nlora_dropout=1.5", ["mine.toml", "lora_dropout = 1.5"]),
        ("[[variant]]\nname='a'\nrank=8", ["mine.toml", "rank", "unknown key"]),
        ("[[variant]]\nr=8", ["mine.toml", "name is missing"]),
        ("[[variant]]\nname='a b'", ["mine.toml", "'a b'"]),
        ("[[variant]]\nname='a-control'", ["mine.toml", "'a-control'", "A/A control"]),
        ("[[variant]]\nname='a'\n[[variant]]\nname='a'\nr=4", ["mine.toml", "used twice"]),
        ("[[variant]]\nname='a'\n[[variant]]\nname='b'", ["mine.toml", "'a'", "'b'", "same configuration"]),
        ("reference='z'\n[[variant]]\nname='a'", ["mine.toml", "reference = 'z'"]),
        ("repeats=3\n[[variant]]\nname='a'", ["mine.toml", "repeats", "unknown key"]),
        ("[protocol]\nreplicates=0\n[[variant]]\nname='a'", ["mine.toml", "replicates = 0"]),
        ("[workload]\nsequence_length=2\n[[variant]]\nname='a'", ["mine.toml", "sequence_length = 2"]),
        ("[axes]\nr=8", ["mine.toml", "r = 8", "list"]),
        ("[axes]\nr=[8]\n[[variant]]\nname='a'", ["mine.toml", "both"]),
        ("title=", ["mine.toml", "not a TOML file"]),
        ("", ["mine.toml", "no variants"]),
        ("allow_fallback='yes'\n[[variant]]\nname='a'", ["allow_fallback", "bool"]),
    ],
)
def test_bad_studies_are_refused(tmp_path, text, words):
    """Each with what is wrong, where, and what to do."""
    with pytest.raises(UsageError) as caught:
        load_study(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_study_names_the_nearest():
    """A typo gets the name that was meant."""
    with pytest.raises(UsageError, match="lora-or-qlora"):
        load_study("lora-or-qora")


@pytest.mark.parametrize("name", list(builtin_studies()))
def test_built_in_studies_load(name):
    """What ships is valid."""
    assert load_study(name).variants


def test_effort_sets_the_replicates():
    """One dial: quick 3, standard 8, rigorous 12."""
    study = load_study("lora-or-qlora")
    assert [study.with_overrides(effort=e).protocol.replicates for e in ("quick", "standard", "rigorous")] == [3, 8, 12]
