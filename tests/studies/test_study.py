"""Tests that studies are read strictly: an invalid study is refused with file, key, value and remedy.

Tests that a study which extends another with one line is that study with this line, for every machine profile.

Tests of the errors for mistakes in a study file: they suggest the right key and report a missing file as such.

Tests of the bounds of study values: a typing error is refused with key, value and remedy.

Tests of the workload's column and loss settings, which are shown only where they differ from their defaults.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.machine import provenance
from lorameter.records import codec
from lorameter.run.feasibility import check_feasible
from lorameter.studies.study import Target
from lorameter.studies.study_file import builtin_studies, list_keys, load_study, load_variant
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import DataColumns, Workload

CPU = Target(kind="cpu", dtype="bfloat16", why="a test")
H100 = Target(kind="NVIDIA H100 80GB HBM3", dtype="bfloat16", why="a test")
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
        ("request_batch = [1, 2]", "request_batch = [1, 2]: int is expected"),
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
        ({}, "", 4), ({"target": CPU}, "cpu", 1), ({"target": H100}, "big", 4),
        ({"target": dataclasses.replace(H100, kind="NVIDIA L4")}, "", 4),
        ({"profile": "other", "target": CPU}, "other", 9),
    ],
)  # fmt: skip
def test_a_profile_fits_the_study_to_the_machine(tmp_path, options, profile, batch):
    """The device selects the profile unless an option does; a device without a profile gets the study unchanged."""
    study = load_study(write(tmp_path, SWEPT), **options)
    assert (study.profile, study.workload.batch_size) == (profile, batch)


@pytest.mark.parametrize(
    ("options", "minutes"),
    [
        ({}, 2.5), ({"data": "synthetic"}, 2.5), ({"model": "smollm2-135m"}, None), ({"replicates": 12}, None),
        ({"effort": "rigorous"}, None), ({"precision": 0.05}, None), ({"model": "tiny-llama", "max_minutes": 9}, 9),
    ],
)  # fmt: skip
def test_a_studys_own_time_limit_is_for_the_study_as_it_is(tmp_path, options, minutes):
    """Another amount of work lifts it, and a study that extends it has none."""
    study = load_study("lora-or-qlora", target=CPU)
    assert study.with_overrides(**options).protocol.max_minutes == minutes
    extending = load_study(write_study_extends(tmp_path, "", "lora-or-qlora"), target=CPU)
    assert extending.protocol.max_minutes is None


def test_every_deviation_is_named(tmp_path):
    """The list has each value that a profile or an option replaced, with the original value."""
    study = load_study(write(tmp_path, SWEPT), target=CPU).with_overrides(model="smollm2-135m", data="/a/b/c.jsonl")
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
    assert (
        load_variant(alone)[1]
        == load_variant(f"{alone}:one")[1]
        == LoraVariant(r=4, dtype="auto", compute_dtype="auto")
    )
    with pytest.raises(UsageError, match=r"lora-r16, .*lora-or-qlora:lora-r16"):
        load_variant("lora-or-qlora")


ORIGINAL = "llama2-lora-parameters"
SAME_SWEEP = {"lora-parameters-other-size": "llama2-13b", "lora-parameters-other-model": "mistral-7b"}


def write_study_extends(tmp_path, text, base=ORIGINAL):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "{base}"\n{text}')
    return str(path)


@pytest.mark.parametrize(("name", "model"), SAME_SWEEP.items())
def test_a_profile_does_not_replace_the_studys_model(name, model):
    """On any machine the study uses its own model, with random weights where the profile says so."""
    for profile in tomllib.loads(builtin_studies()[ORIGINAL].read_text())["profile"]:
        study = load_study(name, profile=profile)
        assert study.workload.model == (f"random:{model}" if profile == "random" else model)
        assert not any("SmolLM2" in note for note in study.notes)
    assert load_study(ORIGINAL, profile="random").workload.model == "random:llama2-7b"
    assert load_study(ORIGINAL, target=CPU).workload.model == "smollm2-135m"


def test_other_keys_of_an_inherited_profile_still_apply(tmp_path):
    """Only keys of the extending study override an inherited profile."""
    study = load_study(
        write_study_extends(tmp_path, "[workload]\nbatch_size = 2\n[controls]\ntf32 = false\n"), target=CPU
    )
    assert study.workload.batch_size == 2
    assert (study.workload.model, study.workload.sequence_length) == ("smollm2-135m", 128)
    assert {(variant.optimizer, variant.attention, variant.tf32) for variant in study.variants} == {
        ("adamw", "sdpa", False)
    }


def test_its_own_profile_takes_precedence_over_its_own_key(tmp_path):
    """A profile of the extending study applies to its machine."""
    text = '[workload]\nmodel = "mistral-7b"\n[profile.cpu.workload]\nmodel = "tiny-llama"\n'
    assert load_study(write_study_extends(tmp_path, text), target=CPU).workload.model == "tiny-llama"
    assert load_study(write_study_extends(tmp_path, text), profile="a100").workload.model == "mistral-7b"


ONE = "[[variant]]\nname = 'b'\n"


@pytest.fixture
def answer(tmp_path, capsys):
    """A function that returns exit code and message of a dry run of a study file."""

    def ask(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        code = main(["run", str(path), "--dry-run", "--runs-dir", str(tmp_path / "runs")])
        return code, capsys.readouterr().err.strip()

    return ask


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[controls]\nlr = 1e-4\n{ONE}", "[controls]: lr = 0.0001: unknown key. Did you mean learning_rate?"),
        (f"[controls]\nlora_r = 8\n{ONE}", "[controls]: lora_r = 8: unknown key. Did you mean r?"),
        (f"{ONE}rank = 8", "variant 'b': rank = 8: unknown key. Did you mean r?"),
        (f"[controls]\nalpha = 8\n{ONE}", "Did you mean lora_alpha?"),
        (f"[controls]\nload_in_4bit = true\n{ONE}", "load_in_4bit = True: unknown key. Did you mean quantization"),
        (f"[controls]\nbatch_size = 8\n{ONE}", "batch_size = 8: unknown key here. batch_size is a key of [workload]."),
        (f"{ONE}batch_size = 8", "unknown key here. batch_size is a key of [workload]."),
        (f"[workload]\nlr = 1e-4\n{ONE}", "unknown key here. learning_rate is a key of [controls] and [[variant]]."),
        (f"[protocol]\nmax_length = 64\n{ONE}", "unknown key here. sequence_length is a key of [workload]."),
        (f"seed = 1\n{ONE}", "mine.toml: seed = 1: unknown key here. seed is a key of [protocol]."),
        (f"[controls]\npeft_type = 'VERA'\n{ONE}", "peft_type = 'VERA': unknown key. Did you mean peft?"),
        (f"[controls]\nuse_vera = true\n{ONE}", "use_vera = True: unknown key. Did you mean peft?"),
        ("[axes]\nlr = [1e-4, 2e-4]", "[axes]: lr = [0.0001, 0.0002]: unknown key. Did you mean learning_rate?"),
        ("[sweeps]\nrank = [8, 16]", "[sweeps]: rank = [8, 16]: unknown key. Did you mean r?"),
        ("[axes]\nworkload.batchsize = [1, 2]", "workload.batchsize = [1, 2]: unknown key. Did you mean batch_size?"),
        (
            "[axes]\nworkload.ranks = [1, 2]",
            "workload.ranks = [1, 2]: equal for all variants. Write one value in [workload].",
        ),
        (f"[profile.a.controls]\nlr = 1\n{ONE}", "[profile.a.controls]: lr = 1: unknown key. Did you mean"),
        (f"[controls]\nxyzzy = 8\n{ONE}", "[controls]: xyzzy = 8: unknown key. `lorameter list keys` prints all keys."),
        (f"xyzzy = 8\n{ONE}", "mine.toml: xyzzy = 8: unknown key. `lorameter list keys` prints all keys."),
        (f"{ONE}r = -1", "mine.toml, variant 'b': r = -1: too small, or not a finite number. Use 1 or more"),
        (f"[protocol]\nreplicates = 0\n{ONE}", "mine.toml, [protocol]: replicates = 0: too small"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_one(answer, text, said):
    """The error is one line, without a list of all keys and without repeating the place."""
    code, found = answer(text)
    assert code == 2
    assert said in found
    assert len(found) < 250
    assert found.count("variant 'b'") <= 1


@pytest.mark.parametrize("name", ["./missing.toml", "missing.toml", "folder/missing", "."])
def test_a_missing_study_file_is_reported_as_missing(tmp_path, monkeypatch, capsys, name):
    """The error says that the file is missing, and lists no built-in studies."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"study {name!r}: file not found" in said
    assert "training-step" not in said


def test_a_target_that_no_module_has_is_refused(answer):
    """PEFT would refuse the target in every trial; it accepts modules other than linear layers."""
    code, said = answer(f"[controls]\ntarget_modules = ['nothing']\n{ONE}")
    assert code == 2
    assert "target_modules = ['nothing']: the model tiny-llama has no such module" in said
    assert "q_proj" in said
    assert answer(f"[controls]\ntarget_modules = ['self_attn.q_proj', 'lm_head', 'embed_tokens']\n{ONE}")[0] == 0


TWELVE = list_keys()["controls"][:12]
ONE_LIMITS = "[[variant]]\nname = 'x'\n"


def refused(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_study(str(path), target=CPU)
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
    said = refused(tmp_path, f"[{section}]\n{key} = {value}\n{ONE_LIMITS}")
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
        ("extends = [1]\n" + ONE_LIMITS, "extends"),
        (f"[profile.a]\nnotes = 3\n{ONE_LIMITS}", "profile.a.notes = 3: a list is expected"),
        (f"[profile.a]\ndevices = 5\n{ONE_LIMITS}", "profile.a.devices = 5: a list is expected"),
        (f"[profile.a]\nprotocol = 5\n{ONE_LIMITS}", "protocol = 5: a table is expected"),
        (f"[requirements]\nx = 2020-01-01\n{ONE_LIMITS}", "a value is a date"),
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
    path.write_text(f"[requirements]\n{line}\n{ONE_LIMITS}")
    with pytest.raises(UsageError, match=words) as caught:
        check_feasible(load_study(str(path)), machine)
    assert "[requirements]" in str(caught.value)


A_CLAIM = "[controls]\nr = 16\n[sweeps]\nr = [16, 32]\n[[claim]]\nid = '1'\nsays = 's'\n[[claim.parts]]\naxis = 'r'\n"
OF_TIMES = "metric = 'step_time_s'\n"
FRACTIONS = {
    "policy tolerance": (["gate", "base", "other", "--policy", "FILE"], "tolerance = 5"),
    "policy margin": (["compare", "base", "other", "--policy", "FILE"], "margin = 5"),
    "policy limit": (["ab", "--policy", "FILE"], "[[limit]]\nvariant = 'a*'\ntolerance = 5"),
    "precision": (["run", "FILE", "--dry-run"], f"[protocol]\nprecision = 1\n{ONE_LIMITS}"),
    "--precision": (["run", "FILE", "--dry-run", "--precision", "1"], ONE_LIMITS),
    "ab --precision": (["ab", "FILE", "--base", "HEAD", "--candidate", "HEAD", "--precision", "1"], ONE_LIMITS),
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


STUDY = """
[workload]
loss = "answer"
columns = { instruction = "question", response = "answer" }

[[variant]]
name = "plain"
"""


def test_a_study_names_columns_and_the_loss(tmp_path):
    """The settings are part of the workload, survive JSON and can be hashed."""
    path = tmp_path / "mine.toml"
    path.write_text(STUDY)
    workload = load_study(str(path)).workload
    assert workload.columns.parts == {"instruction": "question", "response": "answer"}
    data = codec.to_json(workload)
    assert (data["loss"], data["columns"]["instruction"]) == ("answer", "question")
    assert codec.from_json(Workload, data, "here") == workload
    assert len({workload, codec.from_json(Workload, data, "here"), Workload()}) == 2


def test_labels_are_part_of_the_workload_fingerprint(small_study):
    """Runs with other labels have other workload fingerprints."""

    def fingerprint(**changes):
        study = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, **changes))
        facts = {"workload": provenance._content_of_workloads(study.workload, {})}
        return provenance.fingerprint(facts)

    changed = ({}, {"loss": "answer"}, {"columns": DataColumns(text="body")}, {"columns": DataColumns(text="title")})
    assert len({fingerprint(**changes) for changes in changed}) == 4
    assert fingerprint() == fingerprint(loss="all", columns=DataColumns())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"instruction": "a", "prompt": "b"}, "instruction = 'a', prompt = 'b': parts of different records"),
        ({"text": "a", "response": "b"}, "parts of different records"),
        ({"question": "a"}, "columns.question = 'a': unknown key"),
        ({"text": 3}, "columns.text = 3: str is expected"),
        ("question", "columns = 'question': a table is expected"),
    ],
)
def test_columns_that_make_no_record_are_refused(columns, words):
    """The error occurs when the study is read."""
    with pytest.raises(UsageError, match=words):
        codec.from_json(Workload, {"columns": columns}, "here")


def test_the_hash_of_a_folder_depends_on_its_contents(tmp_path):
    """The hash of a data folder depends on the split and its bytes, not on the path."""
    contents = {}
    for name, train in (("a", "x"), ("b", "x"), ("c", "y")):
        folder = tmp_path / name / "mine"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text(train)
        (folder / "test.txt").write_text("z")
        contents[name] = provenance._content_of(str(folder))
        contents[f"{name}[test]"] = provenance._content_of(f"{folder}[test]")
    assert contents["a"] == contents["b"] != contents["c"]
    assert contents["a"].startswith("mine[train] sha256:")
    assert contents["a[test]"] == contents["c[test]"] != contents["a"]
    assert provenance._content_of(str(tmp_path / "a" / "mine" / "test.txt")).startswith("test.txt sha256:")
    assert provenance._content_of("no such thing") == "no such thing"
