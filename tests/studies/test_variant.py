"""Tests that variants refuse impossible values and have a stable identity.

Tests that a study refuses claims whose rule and fields do not match.

Tests of which serving modes apply to a variant.

Tests of where replicates are measured: options of a study or the command line, and refused values.

Tests of how the data of a workload is resolved from its name and the existing files, without opening them.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.studies.form import form_keys
from lorameter.studies.protocol import Protocol, read_slurm
from lorameter.studies.request import base_key, serving_modes
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload, make_absolute, resolve


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, ["r = 0", "Use 1 or more"]),
        ({"lora_dropout": 1.5}, ["lora_dropout = 1.5", "below 1"]),
        ({"lora_alpha": 0}, ["lora_alpha = 0"]),
        ({"learning_rate": -1.0}, ["learning_rate"]),
        ({"gradient_accumulation": 0}, ["gradient_accumulation"]),
        ({"quantization": "nf4", "init_lora_weights": "pissa"}, ["init_lora_weights", "nf4"]),
        ({"prepare_for_kbit": True}, ["prepare_for_kbit", "quantization"]),
        ({"attention": "flash_attention_2", "dtype": "float32"}, ["attention", "float32", "bfloat16"]),
        (
            {"attention": "flash_attention_2", "dtype": "float32", "autocast": "bfloat16"},
            ["attention", "without autocast", "bfloat16"],
        ),
        ({"init_lora_weights": "orthogonal", "r": 3}, ["orthogonal", "even"]),
    ],
)
def test_impossible_values_are_refused(fields, words):
    """The message names the variant, the key, the value and the remedy."""
    with pytest.raises(UsageError) as caught:
        LoraVariant(name="v", **fields)
    for word in ["'v'", *words]:
        assert word in str(caught.value)


def test_every_field_that_is_read_changes_the_identity():
    """No two different configurations share an id."""
    base = LoraVariant(quantization="nf4")
    others = {
        "r": 8, "lora_alpha": 3.0, "lora_dropout": 0.5, "target_modules": ("q_proj",), "bias": "all",
        "use_rslora": True, "use_dora": True, "init_lora_weights": "gaussian", "dtype": "float32",
        "quantization": "fp4", "double_quant": False, "compute_dtype": "float32", "prepare_for_kbit": True,
        "adapter_dtype": "bfloat16", "attention": "eager", "gradient_checkpointing": True, "autocast": "bfloat16",
        "tf32": True, "compile": True, "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "linear",
        "warmup_ratio": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.0, "gradient_accumulation": 2,
        "liger_kernel": True, "merge_adapter": True, "kv_cache": "static", "copy_head_input": True,
        "optimizer_args": {"betas": [0.8, 0.9]},
    }  # fmt: skip
    assert set(others) == set(form_keys(LoraVariant)) - {"name"}
    ids = {dataclasses.replace(base, **{key: value}).id for key, value in others.items()} | {base.id}
    assert len(ids) == len(others) + 1


def test_fields_that_are_not_read_do_not_split_a_variant():
    """Without 4 bits, the options of 4-bit quantisation are ignored."""
    assert LoraVariant(double_quant=True).id == LoraVariant(double_quant=False).id


STUDY = """
[controls]
r = 16
lora_dropout = 0.1
[sweeps]
r = [16, 32]
lora_dropout = [0.0, 0.1]
[[claim]]
id = "1"
says = "a sentence"
parts = [{ PART }]
"""


@pytest.fixture
def parts_of(tmp_path):
    """A function that reads a study with one claim of this part."""

    def read(part):
        path = tmp_path / "mine.toml"
        path.write_text(STUDY.replace("PART", part))
        return load_study(str(path)).claims[0].parts

    return read


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ('rule = "rising", axis = "r", metric = "step_time_s"', ["rising", "trend-up"]),
        ('rule = "equal", axis = "r", metric = "speed"', ["'equal'", "'speed'", "step_time_s"]),
        ('rule = "rises", axis = "r", metric = "step_time_s"', ["'rises'", "trainable_parameters"]),
        ('rule = "differs", axis = "r", metric = "step_time_s", levels = [16]', ["levels = [16.0]: 2 expected"]),
        ('rule = "differs", axis = "r", metric = "step_time_s", levels = [16, 16]', ["the same level twice"]),
        ('rule = "highest", axis = "r", metric = "step_time_s", levels = [64]', ["level 64 of r", "16, 32"]),
        ('rule = "best", axis = "r", metric = "step_time_s", levels = [16]', ["give metrics (with weights)"]),
        ('rule = "equal", axis = "lora_alpha", metric = "step_time_s"', ["'lora_alpha'", "fewer than two"]),
        ('rule = "largest-effect", axis = "r", metric = "step_time_s"', ["against = []"]),
        ('rule = "largest-effect", axis = "r", metric = "step_time_s", against = ["r"]', ["contains the axis itself"]),
        ('rule = "trend-up", axis = "lora_dropout", metric = "step_time_s"', ["level 0 has no logarithm", "linear"]),
        (
            'rule = "equal", axis = "r", metric = "step_time_s", margin = 1',
            ["'equal'", "margin = 1.0: not a fraction"],
        ),
        (
            'rule = "trend-up", axis = "r", metric = "step_time_s", tolerance = -0.1',
            ["tolerance = -0.1: not a fraction"],
        ),
    ],
)
def test_an_invalid_part_of_a_claim_is_refused(parts_of, part, words):
    """The error has the study's file, the claim or part, and a valid replacement."""
    with pytest.raises(UsageError) as caught:
        parts_of(part)
    for word in ["mine.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["tolerance", "margin", "by"])
@pytest.mark.parametrize(("rule", "own"), [
    ("trend-up", "tolerance"), ("no-trend", "margin"), ("faster", "by"), ("largest-effect", ""),
])  # fmt: skip
def test_a_limit_of_another_rule_is_refused(parts_of, rule, own, name):
    """A limit of another rule would have no effect. The error names it and the rule's own limit, which is accepted."""
    rest = {"largest-effect": ', against = ["lora_dropout"], scale = "linear"'}.get(rule, "")
    part = f'rule = "{rule}", axis = "{"engine" if own == "by" else "r"}", metric = "step_time_s"{rest}, {name} = 0.2'
    if name == own and own != "by":
        assert parts_of(part)[0].limit == (own, 0.2)
        return
    with pytest.raises(UsageError) as caught:
        parts_of(part)
    message = str(caught.value)
    if name == own:  # the error says instead that the study is not about an engine
        assert "does not use it" not in message
        return
    assert f"mine.toml, claim number 1: {name} = 0.2: rule '{rule}' " in message
    assert (f"its limit is '{own}'" if own else "has no limit") in message


NF4 = [
    "unmerged, nf4", "no adapter, nf4", "merged into nf4", "unmerged, nf4, asked again", "merged, nf4 dequantised",
    "unmerged, bfloat16", "merged into bfloat16",
]  # fmt: skip
IN_4_BITS = ["unmerged, nf4", "merged into nf4"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"quantization": "nf4"}, NF4),
        ({"quantization": "nf4", "dtype": "float32"}, NF4),
        ({"quantization": "fp4"}, [name.replace("nf4", "fp4") for name in NF4]),
        ({"quantization": "int8"}, [*(name.replace("nf4", "int8") for name in NF4), *IN_4_BITS]),
        ({"dtype": "float16"}, [*(name.replace("nf4", "float16") for name in NF4[:4]), *IN_4_BITS]),
        ({"dtype": "float32"}, [*(name.replace("nf4", "float32") for name in NF4[:4]), *NF4[5:], *IN_4_BITS]),
    ],
)
def test_a_variant_is_served_in_each_applicable_mode_once(fields, names):
    """A variant is served on its own base, in 16 bits and in 4 bits, once each, with two merges of a quantised base and
    the controls."""
    ways = [way for group in serving_modes(LoraVariant(**fields)) for way in group]
    assert [way.name for way in ways] == names
    assert [way.name for way in ways if way.is_control] == [names[1], names[3]]


def test_a_group_is_served_from_one_base_and_merges_last():
    """The merge is last in a group, because it changes the base for all later requests."""
    for group in serving_modes(LoraVariant(quantization="int8")):
        assert len({(base_key(way.variant, Workload()), way.dequantised) for way in group}) == 1
        assert not any(way.merged for way in group[:-1])


STUDY_PLACEMENT = """
title = "t"
[protocol]
{protocol}
[[variant]]
name = "plain"
"""


def written(tmp_path, protocol, more=""):
    path = tmp_path / "small.toml"
    path.write_text(STUDY_PLACEMENT.format(protocol=protocol) + more)
    return str(path)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ('on = "slurm:nodes=2"', r"small.toml, \[protocol\]: .*on = 'slurm:nodes=2': 'nodes' is not known"),
        ('on = "k8s"', "on = 'k8s': not known. Use here, ray"),
        ('on = ""', "on = '': not known"),
        ('on = "slurm:sites=2"\nsites = ["0"]', "Write sites=N in it"),
        ('sites = ["a"]', "sites = 'a': numbers .* are expected"),
        ("sites = [0]", r"sites\[0\] = 0: str is expected"),
        ('sites = ["0", "0"]', "sites = '0,0': one is named twice"),
        ('on = "ray"\nsites = ["n1", "n1"]', "sites = 'n1,n1': one is named twice"),
        ('on = "ray"\nsites = [""]', "has no name"),
        ('sites = ["0,1"]', "sites = '0,1': numbers"),
        ('sites = ["0+"]', r"sites = '0\+': numbers"),
        ('sites = ["0+1", "1+2"]', r"sites = '0\+1,1\+2': one is named twice"),
    ],
)
def test_invalid_places_are_refused_on_reading(tmp_path, protocol, words):
    """The error names file, key, value and remedy before anything is started."""
    with pytest.raises(UsageError, match=words):
        load_study(written(tmp_path, protocol))


@pytest.mark.parametrize("line", ['protocol.on = "ray"', 'protocol.sites = ["0"]'])
def test_a_profile_cannot_set_the_place(tmp_path, line):
    """A profile cannot set the place, because the device that is found selects the profile."""
    with pytest.raises(UsageError, match=r"\[profile.cpu\]: protocol.(on|sites) = .*Write it in \[protocol\]"):
        load_study(written(tmp_path, "", f'[profile.cpu]\ndevices = ["cpu"]\n{line}\n'))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({}, Protocol(on="ray", sites=("n1", "n2"))),
        ({"sites": "n3, n4"}, Protocol(on="ray", sites=("n3", "n4"))),
        ({"on": "slurm:sites=2"}, Protocol(on="slurm:sites=2")),
        ({"on": "here"}, Protocol()),
        ({"on": "here", "sites": "0,1"}, Protocol(sites=("0", "1"))),
    ],
)
def test_the_command_line_wins(tmp_path, options, place):
    """The command line overrides the study; a new place drops the sites of the old one."""
    study = load_study(written(tmp_path, 'on = "ray"\nsites = ["n1", "n2"]'))
    found = study.with_overrides(**options).protocol
    assert (found.on, found.sites) == (place.on, place.sites)


def test_options_of_slurm_are_keys_and_values():
    """A value may hold commas; unknown keys are passed to sbatch."""
    sites, parameters = read_slurm("slurm:sites=4,partition=gpu,gres=gpu:1,exclude=n1,n2,time=90")
    assert sites == 4
    assert parameters == {"partition": "gpu", "gres": "gpu:1", "exclude": "n1,n2", "time": "90"}
    assert read_slurm("slurm") == read_slurm("slurm:") == (1, {})


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("slurm:nodes=2", "'nodes' is not known. Use KEY=VALUE of sites, partition"),
        ("slurm:gpu", "'gpu' is not known"),
        ("slurm:sites=0", "sites=0: 1 to 999"),
        ("slurm:sites=1000", "1 to 999"),
        ("slurm:partition=", "partition='': a text"),
        ("slurm:partition=a\n", "a text"),
        ("slurm:sites=1,sites=2", "sites is given twice"),
    ],
)
def test_invalid_keys_and_values_are_refused(on, words):
    """The error lists the known keys."""
    with pytest.raises(UsageError, match=words):
        read_slurm(on)


@pytest.mark.parametrize(
    ("data", "name", "config", "split"),
    [
        ("databricks/databricks-dolly-15k", "databricks/databricks-dolly-15k", "", "train"),
        ("openai/gsm8k:main", "openai/gsm8k", "main", "train"),
        ("openai/gsm8k:main[test]", "openai/gsm8k", "main", "test"),
        ("owner/name[dev]", "owner/name", "", "dev"),
    ],
)
def test_a_hub_id_may_have_a_configuration_and_a_split(data, name, config, split):
    """Each id has one spelling, which is also its label."""
    source = resolve(data)
    assert (source.kind, source.name, source.config, source.split) == ("hub", name, config, split)
    assert source.label == f"{data}{'' if '[' in data else '[train]'}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("./nothing.jsonl", "no such file or folder"),
        ("nothing.csv.gz", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("~", "no such file or folder"),
        ("nothing", "no such file or folder, and not an id of the hub"),
        ("a/b/c", "not an id of the hub"),
        ("owner/name[train:100]", "not an id of the hub"),
        ("owner/name:", "not an id of the hub"),
        ("", "not an id of the hub"),
    ],
)
def test_a_data_source_that_does_not_exist_is_refused(data, words, tmp_path, monkeypatch):
    """The error lists the accepted forms."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        resolve(data)
    assert "owner/name:config[split]" in str(caught.value)


def test_existing_files_take_precedence_over_the_hub(tmp_path, monkeypatch):
    """Existing files precede the hub, also a file whose name ends in brackets; a pipe is not a file, and a file has no
    splits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    Path("owner/name/a.jsonl").touch()
    Path("b.txt").touch()
    Path("notes.md").touch()
    os.mkfifo("pipe.jsonl")
    assert resolve("owner/name").kind == "folder"
    assert resolve("owner/name/a.jsonl").files == (Path("owner/name/a.jsonl"),)
    (tmp_path / "x[train]").mkdir()
    Path("x[train]/c.csv").touch()
    assert (resolve("x[train]").name, resolve("x[train]").split) == ("x[train]", "")
    for data, words in (
        ("b.txt[train]", "a file has no splits"),
        ("notes.md", "a file of no known kind"),
        ("pipe.jsonl", "not a regular file"),
        ("owner", "no file in it is of a known kind"),
    ):
        with pytest.raises(UsageError, match=words):
            resolve(data)


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        ("a.jsonl b.jsonl", "", "a.jsonl b.jsonl"),
        ("train.jsonl test.jsonl extra.jsonl", "", "train.jsonl"),
        ("my.train.jsonl.gz my.test.jsonl.gz", "", "my.train.jsonl.gz"),
        ("train-00000-of-00002.parquet train-00001-of-00002.parquet validation-00000-of-00001.parquet", "validation",
         "validation-00000-of-00001.parquet"),
        ("test.csv", "", "test.csv"),
        ("contest.csv trains.csv", "", "contest.csv trains.csv"),
        ("train.jsonl test.csv", "", "train.jsonl"),
    ],
)  # fmt: skip
def test_the_split_is_a_word_of_the_file_name(names, split, taken, tmp_path):
    """The split is a word of the file name; "train" is the default where it exists."""
    for name in names.split():
        (tmp_path / name).touch()
    source = resolve(f"{tmp_path}[{split}]" if split else str(tmp_path))
    assert [path.name for path in source.files] == taken.split()


@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        ("test.jsonl dev.jsonl", "", "files of dev, test are in it. Name the split"),
        ("test.jsonl other.jsonl", "", "files of test, others are in it"),
        ("train.jsonl", "test", "no split 'test'. It has train"),
        ("a.jsonl", "test", "no split 'test'. It has none"),
        ("a.jsonl b.csv", "", r"different kinds are in it: \.csv, \.jsonl"),
        ("notes.md", "", "no file in it is of a known kind"),
    ],
)
def test_a_folder_that_could_be_read_in_two_ways_is_refused(names, split, words, tmp_path):
    """An ambiguous folder needs a split."""
    for name in names.split():
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=words):
        resolve(f"{tmp_path}[{split}]" if split else str(tmp_path))


def test_a_name_is_made_absolute_with_its_split(tmp_path, monkeypatch):
    """A name without an existing file is unchanged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert make_absolute("folder") == str(tmp_path / "folder")
    assert make_absolute("folder[test]") == f"{tmp_path / 'folder'}[test]"
    for data in ("synthetic", "owner/name:config[test]", "./nothing.jsonl"):
        assert make_absolute(data) == data
