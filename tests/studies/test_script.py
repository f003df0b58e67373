"""Tests of variants that are commands: their content and refusals, and that all other variants are unchanged.

Tests of studies about engines: content, refusals, and a script with its difference in braces.

Tests of several ranks in a study: refusals before anything starts, and defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import make_plan
from lorameter.studies.claim import ENGINE
from lorameter.studies.commands import split_braces, study_of_command, study_of_engine
from lorameter.studies.script import name_of_words, split_command
from lorameter.studies.study import Study
from lorameter.studies.study_file import builtin_studies, load_study
from lorameter.studies.variant import ScriptVariant
from lorameter.studies.workload import Workload

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
    assert study.form.executor == "script"
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
    ("fields", "message"),
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
def test_an_invalid_command_is_refused(fields, message):
    """Each error has the key and the remedy, before anything is started."""
    with pytest.raises(UsageError) as refused:
        ScriptVariant(name="one", **fields)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOML + '\n[[variant]]\nname = "other"\nr = 8\n', "'other' is LoRA in its short form"),
        (TOML + "\n[workload]\nbatch_size = 8\n", "batch_size = 8: the variant is a command"),
        (TOML + "\n[protocol]\nepochs = 1.0\n", "whose data is not known"),
        (TOML.replace('"liger"', '"plain"'), "used twice"),
        (TOML + "\n[controls]\nr = 8\n", "r = 8: the variant is a command"),
        ('[[variant]]\nname = "one"\ncwd = "/x"\n', "cwd = '/x': the variant is LoRA"),
    ],
)
def test_a_study_of_commands_refuses_settings_of_the_scripts(tmp_path, text, message):
    """The error names file and key."""
    with pytest.raises(UsageError, match=r"scripts\.toml") as refused:
        load_study(write(tmp_path, text))
    assert message in str(refused.value)


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
    assert name_of_words(split_command("command", command)) == name
    assert study_of_command(command).variants[0].name == name


ENGINES = ("compile", "flash-attention", "fused-optimizer", "gradient-checkpointing", "liger-kernel", "packing")
TOML_ENGINE = """
[engine]
title = "the compiler"
variant = "compiled"
ENGINE
[engine.proof]
compile = true
[[variant]]
name = "eager"
[[variant]]
name = "compiled"
compile = true
[[claim]]
id = "1"
says = "faster"
parts = [{ PART }]
"""
PART = 'rule = "faster", axis = "engine", metric = "step_time_s"'


@pytest.fixture
def read(tmp_path):
    """A function that reads a study of an engine."""

    def read(engine="", part=PART, text=TOML_ENGINE):
        path = tmp_path / "mine.toml"
        path.write_text(text.replace("ENGINE", engine).replace("PART", part))
        return load_study(str(path))

    return read


@pytest.mark.parametrize(
    ("command", "without", "with_it"),
    [
        ("python train.py {--flag}", "python train.py", "python train.py --flag"),
        ("python train.py {--a 1} -x {--b 2}", "python train.py -x", "python train.py --a 1 -x --b 2"),
        ("python train.py --optim {one|two}", "python train.py --optim one", "python train.py --optim two"),
        ("python 'my train.py' {--flag}", "python 'my train.py'", "python 'my train.py' --flag"),
        ("python {train|faster}.py", "python train.py", "python faster.py"),
        (
            """python t.py --c '{{"r": 8}}' {--f}""",
            """python t.py --c '{"r": 8}'""",
            """python t.py --c '{"r": 8}' --f""",
        ),
    ],
)
def test_braces_give_the_difference_of_two_commands(command, without, with_it):
    """The test covers several braces, two alternatives, quoted words, and doubled braces of the script."""
    assert split_braces(command) == (without, with_it)


OTHER_BRACES = "braces that hold neither {text} nor {without|with}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python train.py", ["nothing differs", "'python train.py {--flag}'"]),
        ("python train.py {  }", ["nothing differs"]),
        ("python train.py {a|a}", ["nothing differs"]),
        ("python train.py {}", [OTHER_BRACES]),
        ("python train.py {--flag", [OTHER_BRACES]),
        ("python train.py --flag}", [OTHER_BRACES]),
        ("python train.py {--a {--b}}", [OTHER_BRACES]),
        ("python train.py {a|}", [OTHER_BRACES]),
        ("python train.py {a|b|c}", [OTHER_BRACES]),
        ("""python train.py --cfg '{"r": 8}' {--flag}""", [OTHER_BRACES, "{{ and }}"]),
        ("python train.py --out ${HOME}/out {--flag}", [OTHER_BRACES]),
        ("python train.py {{--flag}}", ["nothing differs"]),
        ("python train.py 'x {--flag}", ["Close the quote"]),
        ("python train.py | tee {log}", ["for a shell"]),
        ("{python train.py}", ["no program in it"]),
        ("", ["no program in it"]),
    ],
)
def test_an_invalid_pair_of_commands_is_refused(command, words):
    """The error has the command and a correct form."""
    with pytest.raises(UsageError) as caught:
        split_braces(command)
    for word in ["--command", *words]:
        assert word in str(caught.value)


def test_a_script_takes_the_place_of_both_variants(read):
    """Names, claims and engine stay; model, data and requirements are the script's."""
    study = study_of_engine(read(), "python train.py {--compile}", cwd="/data")
    assert [(one.name, one.command, one.cwd) for one in study.variants] == [
        ("eager", "python train.py", "/data"), ("compiled", "python train.py --compile", "/data"),
    ]  # fmt: skip
    assert (study.reference, study.workload.model, study.protocol.phases) == ("eager", "script", ("train",))
    assert study.claims == read().claims
    assert codec.from_json(Study, codec.to_json(study), "manifest") == study


def test_a_study_without_an_engine_has_nothing_to_ask_a_script():
    """The error lists the studies about engines and the command for two scripts."""
    for name in ("training-step", "llama2-lora-parameters"):
        with pytest.raises(UsageError, match=r"it has no claim about an engine.*lorameter ab"):
            study_of_engine(load_study(name), "python train.py {--flag}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engine": 'flags = "-x"'}, ["[engine]", "flags", "Did you mean flag?"]),
        ({"engine": 'needs = "tpu"'}, ["needs", "'tpu'"]),
        ({"part": PART.replace("engine", "r")}, ["2 expected", 'axis = "engine"']),
        ({"part": PART.replace("step_time_s", "tokens_per_s")}, ["'tokens_per_s': not known for this rule"]),
        ({"part": PART.replace("step_time_s", "peak_memory")}, ["'peak_memory': not known for this rule"]),
        ({"part": PART.replace("faster", "lowers") + ", by = 1.0"}, ["by = 1.0"]),
        ({"part": PART + ", by = 0.0"}, ["by = 0.0"]),
        ({"text": TOML_ENGINE.replace('"compiled"\nENGINE', '"compild"')}, ["'compild'", "Did you mean 'compiled'?"]),
        ({"text": TOML_ENGINE.replace('"compiled"\nENGINE', '"eager"')}, ["'eager'", "the reference"]),
        (
            {"text": TOML_ENGINE.replace("compile = true\n[[", "compile = false\n[[", 1)},
            ["compile = False", '"not false"'],
        ),
        ({"text": TOML_ENGINE.replace("compile = true\n[[", "[[", 1)}, ["nothing would show that the engine runs"]),
        ({"text": TOML_ENGINE[TOML_ENGINE.index("[[variant]]") :]}, ["axis = 'engine'", "Add [engine]"]),
    ],
)
def test_an_invalid_engine_is_refused(read, given, words):
    """The error has the file, the fault and a correct form."""
    with pytest.raises(UsageError) as caught:
        read(**given)
    for word in ["mine.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ENGINES)
def test_claims_of_a_built_in_study_have_an_address_and_a_date(name):
    """Every claim has an address and the date of reading, and is about the engine only."""
    study = load_study(name)
    assert study.engine is not None
    assert study.protocol.phases == ("train",)
    for claim in study.claims:
        assert claim.source.startswith("https://")
        assert "read 2026-" in claim.source
        assert claim.original
        assert {part.axis for part in claim.parts} == {ENGINE}
    found = [one for one in builtin_studies() if load_study(one).engine is not None]
    assert found == list(ENGINES)


DDP = {"ranks": 2, "strategy": "ddp"}
FSDP2 = {"ranks": 2, "strategy": "fsdp2"}


def refusal(**changes):
    with pytest.raises(UsageError) as raised:
        Workload(**changes)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 2}, 'Write strategy = "ddp" or "fsdp2"'),
        ({"strategy": "ddp"}, "there is one rank"),
        ({**DDP, "batch_size": 3}, "batch_size = 3, ranks = 2: the batch is that of all ranks"),
        ({**DDP, "repair": "quant_state"}, 'it is for strategy = "fsdp2"'),
        ({"ranks": 0}, "ranks"),
    ],
)
def test_a_workload_that_ranks_cannot_share_is_refused(changes, words):
    """The error has the key, its value and the remedy."""
    assert words in refusal(**changes)


def test_training_is_the_only_phase_of_a_study_of_ranks(tmp_path):
    """Its only phase is training, and any other phase is refused."""
    path = tmp_path / "two.toml"
    path.write_text('[workload]\nranks = 2\nstrategy = "ddp"\n[[variant]]\nname = "plain"\n')
    study = load_study(str(path))
    assert study.protocol.phases == ("train",)
    assert {measure for slot in make_plan(study, phases=("train",)).slots for measure in slot.measures} == {
        "steps", "peaks",
    }  # fmt: skip
    with pytest.raises(UsageError, match="training is measured and nothing else"):
        make_plan(study, phases=("train", "generate"))


def of_ranks(study, **changes):
    variants = tuple(dataclasses.replace(one, **changes) for one in study.variants[:1])
    workload = dataclasses.replace(study.workload, **FSDP2)
    protocol = dataclasses.replace(study.protocol, phases=("train",))
    return dataclasses.replace(study, workload=workload, protocol=protocol, variants=variants)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "int8"}, "FSDP2 does not shard the weights of LLM.int8"),
        ({"optimizer": "paged_adamw_32bit"}, "take no sharded parameters"),
        ({"compile": True}, "ranks are measured without it"),
        ({"init_lora_weights": "olora"}, "it rewrites the base"),
    ],
)
def test_a_variant_that_ranks_cannot_train_is_refused(small_study, machine, changes, words):
    """The error comes before a model is loaded."""
    with pytest.raises(UsageError, match=words):
        check_feasible(of_ranks(small_study, **changes), machine)


def test_more_ranks_than_gpus_are_refused(small_study, machine, monkeypatch):
    """Two ranks on one GPU would disturb each other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match=r"ranks = 2: 1 GPU is available here"):
        check_feasible(of_ranks(small_study), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize(
    ("torch", "can"), [("2.11.0+cu130", False), ("2.12.0", True), ("2.13.0+cpu", True), ("3.0", True)]
)
def test_four_bits_need_a_torch_that_shards_integers(small_study, machine, torch, can, monkeypatch):
    """The error comes before a model is loaded and names the needed version; every torch version shards float
    weights."""
    monkeypatch.setattr("lorameter.run.feasibility.library_version", {"torch": torch}.get)
    check_feasible(of_ranks(small_study), machine)
    with (
        contextlib.nullcontext()
        if can
        else pytest.raises(UsageError, match=r"shards no integers.*torch 2\.12 or later")
    ):
        check_feasible(of_ranks(small_study, quantization="nf4"), machine)
