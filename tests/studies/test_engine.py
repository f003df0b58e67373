"""Tests of studies about engines: content, refusals, and a script with its difference in braces."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.studies.claim import ENGINE
from lorameter.studies.script_study import split_braces, study_of_engine
from lorameter.studies.study import Study
from lorameter.studies.study_file import builtin_studies, load_study

ENGINES = ("compile", "flash-attention", "fused-optimizer", "gradient-checkpointing", "liger-kernel", "packing")
TOML = """
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

    def read(engine="", part=PART, text=TOML):
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
        ("python train.py --set {{a}} {--f}", "python train.py --set '{a}'", "python train.py --set '{a}' --f"),
        ("python t.py {--json '{{\"a\": 1}}'}", "python t.py", "python t.py --json '{\"a\": 1}'"),
        ("python 'my train.py' {--flag}", "python 'my train.py'", "python 'my train.py' --flag"),
        ("python {train|faster}.py", "python train.py", "python faster.py"),
    ],
)
def test_braces_give_the_difference_of_two_commands(command, without, with_it):
    """The test covers several braces, two alternatives, quoted words, and braces of the script itself."""
    assert split_braces(command) == (without, with_it)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python train.py", ["nothing differs", "'python train.py {--flag}'"]),
        ("python train.py {}", ["an empty brace"]),
        ("python train.py {  }", ["an empty brace"]),
        ("python train.py {--flag", ["without its partner. Close it"]),
        ("python train.py --flag}", ["without its partner"]),
        ("python train.py {--a {--b}}", ["without its partner"]),
        ("python train.py {--flag}}", ["without its partner. Close it"]),
        ("python train.py {a|}", ["not two alternatives", "{without|with}"]),
        ("python train.py {a|b|c}", ["not two alternatives"]),
        ("python train.py {a|a}", ["nothing differs"]),
        ("python train.py 'x {--flag}", ["Close the quote"]),
        ("python train.py | tee {log}", ["for a shell"]),
        ("{python train.py}", ["no program in it"]),
        ("""python train.py --cfg '{"r": 8}' {--flag}""", ["the script's own", "{{ and }}"]),
        ("python train.py --out ${HOME}/out {--flag}", ["a shell's"]),
        ("python train.py {{{--flag}}}", ["three braces in a row", "a blank between them"]),
        ("", ["nothing differs"]),
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
        with pytest.raises(UsageError, match=r"it claims nothing of an engine.*lorameter ab"):
            study_of_engine(load_study(name), "python train.py {--flag}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engine": 'flags = "-x"'}, ["[engine]", "flags", "Did you mean flag?"]),
        ({"engine": 'needs = "tpu"'}, ["needs", "'tpu'"]),
        ({"part": PART.replace("engine", "r")}, ["the rule is about a pair", 'axis = "engine"']),
        ({"part": PART.replace("step_time_s", "tokens_per_s")}, ["no time"]),
        ({"part": PART.replace("step_time_s", "peak_memory")}, ["'peak_memory': not known for this rule"]),
        ({"part": PART.replace("faster", "lowers") + ", by = 1.0"}, ["by = 1.0"]),
        ({"part": PART + ", by = 0.0"}, ["by = 0.0"]),
        ({"text": TOML.replace('"compiled"\nENGINE', '"compild"')}, ["'compild'", "Did you mean 'compiled'?"]),
        ({"text": TOML.replace('"compiled"\nENGINE', '"eager"')}, ["'eager'", "the reference"]),
        ({"text": TOML.replace("compile = true\n[[", "compile = false\n[[", 1)}, ["compile = False", '"not false"']),
        ({"text": TOML.replace("compile = true\n[[", "[[", 1)}, ["nothing would show that the engine runs"]),
        ({"text": TOML[TOML.index("[[variant]]") :]}, ["axis = 'engine'", "Add [engine]"]),
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
