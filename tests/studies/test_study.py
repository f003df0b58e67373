"""Tests that studies are read strictly: an invalid study is refused with file, key, value and remedy."""

import dataclasses
import re

import pytest

from lorameter.errors import UsageError
from lorameter.studies.study_file import builtin_studies, load_study, load_variant
from lorameter.studies.variant import LoraVariant

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
    """Two axes with two values give four variants whose names contain the values."""
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
        ("[[variant]]\nname='a'\n[[variant]]\nname='a-isolated'\nr=8", ["mine.toml", "'a-isolated'", "isolated"]),
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
    """The error has the fault, its place and the remedy."""
    with pytest.raises(UsageError) as caught:
        load_study(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_study_names_the_nearest():
    """The error suggests the nearest name."""
    with pytest.raises(UsageError, match="lora-or-qlora"):
        load_study("lora-or-qora")


@pytest.mark.parametrize("name", list(builtin_studies()))
def test_built_in_studies_load(name):
    """Every built-in study is valid."""
    assert load_study(name).variants


SWEPT = """
reference = "middle"
[controls]
r = 16
lora_dropout = 0.1
[sweeps]
r = [8, 16, 32]
lora_dropout = [0.0, 0.1]
[profile.cpu]
devices = ["cpu"]
notes = ["on a CPU"]
[profile.cpu.workload]
batch_size = 1
[profile.cpu.controls]
optimizer = "adamw"
[profile.big]
devices = ["H100", "H200"]
[profile.other.workload]
batch_size = 9
"""


def test_sweeps_change_one_field_at_a_time(tmp_path):
    """The common setting of all sweeps is one variant with the reference's name."""
    study = load_study(write(tmp_path, SWEPT))
    names = [variant.name for variant in study.variants]
    assert names == ["middle", "r=8", "r=32", "lora_dropout=0.0"]
    assert study.levels("r") == ((8.0, "r=8"), (16.0, "middle"), (32.0, "r=32"))
    assert study.levels("lora_dropout") == ((0.0, "lora_dropout=0.0"), (0.1, "middle"))


SIZES = """
[workload]
batch_size = 2
[controls]
r = 8
[[variant]]
name = "two"
[[variant]]
name = "four"
workload.batch_size = 4
[[variant]]
name = "four-r16"
r = 16
workload.batch_size = 4
[[variant]]
name = "other"
workload = { model = "smollm2-135m" }
"""


def test_variants_may_be_measured_on_other_workloads(tmp_path):
    """A workload field is an axis like a variant field; a variant that differs in two fields is on neither axis."""
    study = load_study(write(tmp_path, SIZES))
    assert study.levels("workload.batch_size") == ((2.0, "two"), (4.0, "four"))
    assert study.levels("workload.model") == (("tiny-llama", "two"), ("smollm2-135m", "other"))
    assert study.levels("r") == ((8.0, "two"),)
    assert study.axes == ("workload.batch_size", "r", "workload.model")
    assert study.own_workloads["four"] == dataclasses.replace(study.workload, batch_size=4)
    assert study.with_overrides(data="x.json").own_workloads["four"].data == "x.json"


@pytest.mark.parametrize("table", ["sweeps", "axes"])
def test_a_sweep_may_be_of_the_workload(tmp_path, table):
    """The value of the study's workload is the reference's and is not another workload."""
    text = f"[workload]\nbatch_size = 2\n[controls]\nr = 8\n[{table}]\nworkload.batch_size = [2, 4, 8]\n"
    study = load_study(write(tmp_path, text))
    assert [level for level, _ in study.levels("workload.batch_size")] == [2.0, 4.0, 8.0]
    assert len(study.own_workloads) == 2
    assert study.reference not in study.own_workloads


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('workload.batch_siz = 4', "workload.batch_siz = 4: unknown key. Did you mean batch_size?"),
        ('workload.data = "x.json"', "workload.data = 'x.json': equal for all variants"),
        ("workload.batch_size = 0", "too small"),
        ('workload.batch_size = "four"', "int is expected"),
        ("workload.batch_size = 2", "same configuration"),
    ],
)  # fmt: skip
def test_a_workload_that_no_variant_can_have_is_refused(tmp_path, line, said):
    """The error names it before the measurement."""
    with pytest.raises(UsageError, match=re.escape(said)):
        load_study(write(tmp_path, SIZES.replace("workload.batch_size = 4", line, 1)))


TWO = '[[variant]]\nname = "a"\nr = 4\n[[variant]]\nname = "b"\nr = 8\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "request_batch = [1, 2]",
            "request_batch = [1, 2]: one value is expected. Write workload.request_batch = [ ... ] in [axes].",
        ),
        (
            'adapters = 2\nranks = 2\nstrategy = "ddp"',
            "adapters = 2, ranks = 2: several adapters are measured in requests",
        ),
        ("request_bach = 8", "unknown key. Did you mean request_batch?"),
        ('data = ["a"]', "data = ['a']: str is expected"),
    ],
)
def test_an_invalid_workload_is_refused(tmp_path, line, said):
    """The error has the name and a valid replacement, before the measurement."""
    with pytest.raises(UsageError, match=re.escape(said)):
        load_study(write(tmp_path, f"[workload]\n{line}\n{TWO}"))


@pytest.mark.parametrize(
    ("options", "profile", "batch"),
    [
        ({}, "", 4), ({"device": "cpu"}, "cpu", 1), ({"device": "NVIDIA H100 80GB HBM3"}, "big", 4),
        ({"device": "NVIDIA L4"}, "", 4), ({"profile": "other", "device": "cpu"}, "other", 9),
    ],
)  # fmt: skip
def test_a_profile_fits_the_study_to_the_machine(tmp_path, options, profile, batch):
    """The device selects the profile unless an option does; a device without a profile gets the study unchanged."""
    study = load_study(write(tmp_path, SWEPT), **options)
    assert (study.profile, study.workload.batch_size) == (profile, batch)


def test_every_deviation_is_named(tmp_path):
    """The list has each value that a profile or an option replaced, with the original value."""
    study = load_study(write(tmp_path, SWEPT), device="cpu").with_overrides(model="smollm2-135m", data="/a/b/c.jsonl")
    assert study.deviations == (
        "workload.batch_size = 1 in place of 4",
        "controls.optimizer = 'adamw' in place of 'adamw_fused'",
        "workload.model = 'smollm2-135m' in place of 'tiny-llama'",
        "workload.data = 'c.jsonl' in place of 'synthetic'",
    )
    assert study.notes == ("on a CPU",)
    assert load_study(write(tmp_path, SWEPT)).deviations == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SWEPT.replace("r = 16", "r = 12"), ["[sweeps]", "r = [8, 16, 32]", "r = 12", "add the value"]),
        (SWEPT.replace('devices = ["cpu"]', "device = 3"), ["profile.cpu.device = 3", "Did you mean devices?"]),
        (SWEPT + "[[variant]]\nname='a'", ["[sweeps] and [[variant]]"]),
        (SWEPT + "[[claim]]\nid='1'\nsays='x'\nparts=[{rule='trend-up',axis='lora_alpha',metric='step_time_s'}]",
         ["claim '1'", "lora_alpha", "fewer than two"]),
        (SWEPT + "[[claim]]\nid='1'\nsays='x'\nparts=[{rule='highest',axis='r',metric='step_time_s',levels=[9]}]",
         ["claim '1'", "level 9", "8, 16, 32"]),
        (SWEPT + "[[claim]]\nid='1'\nsays='x'\nparts=[{rule='rises',axis='r',metric='step_time_s'}]",
         ["'step_time_s'", "trainable_parameters"]),
        ("extends='mine'\n", ["extends = 'mine'", "built-in"]),
    ],
)  # fmt: skip
def test_bad_sweeps_profiles_and_claims_are_refused(tmp_path, text, words):
    """The error lists the known names, before anything runs."""
    with pytest.raises(UsageError) as caught:
        load_study(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_variant_is_named_by_its_study_or_alone_in_it(tmp_path):
    """A variant is STUDY:NAME, or a file with a single variant; a file with several gives the list of names."""
    study, variant = load_variant("lora-or-qlora:qlora-nf4-r16")
    assert (study.name, variant.quantization) == ("lora-or-qlora", "nf4")
    alone = write(tmp_path, "[[variant]]\nname = 'one'\nr = 4")
    assert load_variant(alone)[1] == load_variant(f"{alone}:one")[1] == LoraVariant(r=4)
    with pytest.raises(UsageError, match=r"lora-r16, .*lora-or-qlora:lora-r16"):
        load_variant("lora-or-qlora")
