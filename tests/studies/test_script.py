"""Tests of variants that are commands: their content and refusals, and that all other variants are unchanged."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.studies.script import name_of_command
from lorameter.studies.script_study import study_of_command
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import ScriptVariant

TOML = """
[[variant]]
name = "plain"
command = "python train.py"

[[variant]]
name = "liger"
command = "python train.py --use_liger_kernel 'a b'"
cwd = "/data/project"
env = { OMP_NUM_THREADS = "2" }
python = "/opt/venv/bin/python"
"""


def write(folder, text):
    path = folder / "scripts.toml"
    path.write_text(text)
    return str(path)


def test_a_study_of_commands_needs_nothing_else(tmp_path):
    """Model, data and phases are filled in, and all else is as in any study."""
    study = load_study(write(tmp_path, TOML))
    assert study.of_scripts
    assert study.protocol.phases == ("train",)
    assert study.workload.model == study.workload.data == "script"
    assert study.variant("liger").env == {"OMP_NUM_THREADS": "2"}
    assert codec.from_json(Study, codec.to_json(study), "manifest") == study


def test_every_field_of_a_command_is_part_of_its_identity():
    """Another argument, folder, variable or interpreter is another variant; another name is not."""
    one = ScriptVariant(name="a", command="python train.py")
    others = [
        ScriptVariant(name="b", command="python train.py --r 64"),
        ScriptVariant(command="python train.py", cwd="/x"),
        ScriptVariant(command="python train.py", env={"A": "1"}),
        ScriptVariant(command="python train.py", python="/x/python"),
    ]
    assert len({variant.id for variant in (one, *others)}) == 5
    assert ScriptVariant(name="c", command="python train.py").id == one.id
    assert one.differences(others[2]) == ("env",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"command": "python 'train.py"}, "Close the quote"),
        ({"command": "  "}, "no program in it"),
        ({"command": "cd x && python train.py"}, "'&&' is for a shell"),
        ({"command": "CUDA_VISIBLE_DEVICES=1 python train.py"}, "env = "),
        ({"command": "python t.py", "env": {"A B": "1"}}, "env.A B"),
        ({"command": "python t.py", "env": {"HF_TOKEN": "hf_x"}}, "written into the run"),
        ({"command": "x" * 5000}, "too long"),
        ({"command": "python \udcff.py"}, r"command = 'python \udcff.py': too long, no UTF-8"),
        ({"command": "python t.py", "cwd": "\udcff"}, "no UTF-8"),
        ({"command": "python t.py", "env": {"A": "\udcff"}}, "no UTF-8"),
    ],
)
def test_an_invalid_command_is_refused(fields, said):
    """Each error has the key and the remedy, before anything is started."""
    with pytest.raises(UsageError) as refused:
        ScriptVariant(name="one", **fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TOML + '\n[[variant]]\nname = "other"\nr = 8\n', "'other' has no command and others have one"),
        (TOML + "\n[workload]\nbatch_size = 8\n", "batch_size = 8: the variants are commands"),
        (TOML + '\n[protocol]\nphases = ["train", "cold"]\n', "of which training is measured and nothing else"),
        (TOML + "\n[protocol]\nepochs = 1.0\n", "whose data is not known"),
        (TOML.replace('"liger"', '"plain"'), "used twice"),
        (TOML + "\n[controls]\nr = 8\n", "r = 8: the variant is a command"),
        ('[[variant]]\nname = "one"\ncwd = "/x"\n', "cwd = '/x': only a variant that is a command has it"),
    ],
)
def test_a_study_of_commands_refuses_settings_of_the_scripts(tmp_path, text, said):
    """The error names file and key."""
    with pytest.raises(UsageError, match=r"scripts\.toml") as refused:
        load_study(write(tmp_path, text))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py --r 64", "train"),
        ("accelerate launch src/fine_tune.py", "fine_tune"),
        ("trl sft --model x", "trl"),
        ("python -m axolotl.cli.train config.yml", "axolotl.cli.train"),
        ("/opt/venv/bin/python3.12 'my script.py'", "my-script"),
    ],
)
def test_a_command_is_named_by_its_script(command, name):
    """The name is valid in file names."""
    assert name_of_command(command) == name
    assert study_of_command(command).variants[0].name == name
