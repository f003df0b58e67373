"""Tests of the bounds of study values: a typing error is refused with key, value and remedy."""

from __future__ import annotations

import re

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.run.feasibility import check_feasible
from lorameter.studies.study_file import KEYS, load_study

TWELVE = KEYS["controls"][:12]
ONE = "[[variant]]\nname = 'x'\n"


def refused(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_study(str(path), device="cpu")
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("protocol", "replicates", "0"),
        ("protocol", "step_timeout_s", "nan"),
        ("protocol", "max_minutes", "inf"),
        ("protocol", "epochs", "inf"),
        ("protocol", "precision", "inf"),
        ("protocol", "memory_limit_bytes", "0"),
        ("protocol", "seed", "-1"),
        ("workload", "sequence_length", "1"),
        ("workload", "train_sequences", "100000000000"),
        ("workload", "data_seed", "-1"),
        ("workload", "model", "'a\tb'"),
        ("controls", "r", "0"),
        ("controls", "learning_rate", "inf"),
        ("controls", "lora_alpha", "nan"),
        ("controls", "lora_dropout", "1.0"),
        ("controls", "target_modules", "['']"),
    ],
)
def test_an_impossible_value_is_refused(tmp_path, section, key, value):
    """The error names file, key and value, before anything of that size is allocated."""
    said = refused(tmp_path, f"[{section}]\n{key} = {value}\n{ONE}")
    assert "mine.toml" in said
    assert key in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[axes]\n" + "".join(f"{key} = [1, 2, 3, 4, 5, 6, 7, 8]\n" for key in TWELVE), "68719476736 combinations"),
        ("[sweeps]\nr = [" + ", ".join(map(str, range(16, 1100))) + "]\n[controls]\nr = 16", "1084 variants"),
        (f"[[variant]]\nname = '{'x' * 300}'", "300 bytes long"),
        (f"[[variant]]\nname = '{'é' * 100}'", "200 bytes long"),
        ('[[variant]]\nname = "a\\u001b[2J"', "variant name"),
        ('[[variant]]\nname = "a\\nb"', "variant name"),
        ("extends = [1]\n" + ONE, "extends"),
        (f"[profile.a]\nnotes = 3\n{ONE}", "profile.a.notes = 3: a list is expected"),
        (f"[profile.a]\ndevices = 5\n{ONE}", "profile.a.devices = 5: a list is expected"),
        (f"[profile.a]\nprotocol = 5\n{ONE}", "protocol = 5: a table is expected"),
        (f"[requirements]\nx = 2020-01-01\n{ONE}", "a value is a date"),
    ],
    ids=lambda value: value[:24],
)
def test_invalid_names_and_values_are_refused_on_reading(tmp_path, text, words):
    """Names that are invalid for files, too many variants, values in place of tables and a date are refused."""
    assert words in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("'no.such.path' = true", "unknown requirement"),
        ("'peft.attached' = 3", "must be true or false"),
        ("attention.backend = 'fused'", "unknown requirement 'attention'"),
    ],
)
def test_a_requirement_that_no_trial_could_check_is_refused(tmp_path, machine, line, words):
    """The requirement is refused once, before all trials would fail."""
    path = tmp_path / "mine.toml"
    path.write_text(f"[requirements]\n{line}\n{ONE}")
    with pytest.raises(UsageError, match=words) as caught:
        check_feasible(load_study(str(path)), machine)
    assert "[requirements]" in str(caught.value)


A_CLAIM = "[controls]\nr = 16\n[sweeps]\nr = [16, 32]\n[[claim]]\nid = '1'\nsays = 's'\n[[claim.parts]]\naxis = 'r'\n"
OF_TIMES = "metric = 'step_time_s'\n"
FRACTIONS = {
    "policy tolerance": (["gate", "base", "other", "--policy", "FILE"], "tolerance = 5"),
    "policy margin": (["compare", "base", "other", "--policy", "FILE"], "margin = 5"),
    "policy limit": (["ab", "--policy", "FILE"], "[[limit]]\nvariant = 'a*'\ntolerance = 5"),
    "precision": (["run", "FILE", "--dry-run"], f"[protocol]\nprecision = 1\n{ONE}"),
    "--precision": (["run", "FILE", "--dry-run", "--precision", "1"], ONE),
    "ab --precision": (["ab", "FILE", "--base", "HEAD", "--candidate", "HEAD", "--precision", "1"], ONE),
    "claim tolerance": (["run", "FILE", "--dry-run"], f"{A_CLAIM}rule = 'trend-up'\n{OF_TIMES}tolerance = 0.9"),
    "claim margin": (["run", "FILE", "--dry-run"], f"{A_CLAIM}rule = 'equal'\n{OF_TIMES}margin = 0.9"),
}


@pytest.mark.parametrize(("arguments", "content"), FRACTIONS.values(), ids=FRACTIONS)
def test_a_percentage_in_place_of_a_fraction_is_refused(tmp_path, capsys, arguments, content):
    """The error has key, value and unit, since a tolerance of 5 would accept every slow-down."""
    path = tmp_path / "mine.toml"
    path.write_text(content)
    arguments = [str(path) if word == "FILE" else word for word in arguments]
    assert main([*arguments, "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"(tolerance|margin|precision) = (5|1|0\.9)(\.0)?: ", said), said
    assert "0.05 is 5 %" in said
