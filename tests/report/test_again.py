"""How to repeat a run: with the versions that trained, by a command that is taken and means the same."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from harness.cli import main, parser
from harness.records import codec, store
from harness.records.document import write_document
from harness.report.again import how_to_repeat
from harness.studies.script_study import study_of_command
from harness.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
KEPT = [
    *(ROOT / "tests" / "golden" / "runs").iterdir(),
    *(path for path in (ROOT / "reports").iterdir() if (path / "trials.jsonl").is_file()),
]


def typed(run):
    """The options of the line that measures the run again."""
    (line,) = (line for line in how_to_repeat(run).splitlines() if line.startswith("lorameter "))
    return parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_line_of_every_run_is_a_command(path):
    """Of an A/B that does not say by which words its sides were named there is none, and that is said."""
    run = store.read_run(str(path), path.parent, newer=True)
    if run.manifest.sides:
        assert "does not say by which words" in how_to_repeat(run)
    else:
        assert typed(run).command.__name__ == "run_study"


def test_what_the_command_line_gave_is_given_again(write_run):
    """Model, data and limits that are not the study's own; what a profile replaces is the profile's."""
    study = load_study("lora-or-qlora").with_overrides(
        model="random:smollm2-135m", data="mine.jsonl", precision=0.02, max_minutes=7.5, allow_disturbed=True
    )
    path = write_run("given", {"lora-r16": [1.0, 1.1]}, study=study)
    options = typed(store.read_run("given", path.parent))
    assert (options.study, options.model, options.data) == ("lora-or-qlora", "random:smollm2-135m", "mine.jsonl")
    assert (options.precision, options.max_minutes, options.allow_disturbed) == (0.02, 7.5, True)
    assert options.replicates == study.protocol.replicates
    profiled = load_study("lora-or-qlora", profile="card")
    path = write_run("profiled", {"lora-r16": [1.0, 1.1]}, study=profiled)
    options = typed(store.read_run("profiled", path.parent))
    assert (options.profile, options.model, options.data, options.max_minutes) == ("card", None, None, None)


def test_the_place_is_given_again(write_run):
    """As the options have it; on a machine without a word there is none."""
    study = load_study("lora-or-qlora").with_overrides(on="ray", sites="n1,n2", mixed=True)
    path = write_run("placed", {"lora-r16": [1.0, 1.1]}, study=study)
    options = typed(store.read_run("placed", path.parent))
    assert (options.on, options.sites, options.mixed) == ("ray", "n1,n2", True)
    path = write_run("plain", {"lora-r16": [1.0, 1.1]}, study=load_study("lora-or-qlora"))
    options = typed(store.read_run("plain", path.parent))
    assert (options.on, options.sites, options.mixed) == (None, None, False)


def side(kind, spec, *, commit=None, rows=0):
    return {
        "kind": kind, "spec": spec, "label": f"{spec} (label)", "worker": "1", "injected_rows": rows,
        "facts": {"packages": {}, "git": {"commit": commit, "dirty": False}},
    }  # fmt: skip


@pytest.fixture
def ab(write_run):
    """A function that writes an A/B of two sides; gives the run as it is read back."""

    def write(base, candidate, **options):
        path = write_run("ab", {next(iter(options["study"].variants)).name: [1.0, 1.1]}, **options)
        data = codec.to_json(store.read_manifest(path)) | {"sides": {"base": base, "candidate": candidate}}
        write_document(path / "manifest.json", data)
        return store.read_run("ab", path.parent)

    return write


def test_an_ab_is_repeated_as_an_ab(ab):
    """A revision by its commit, since its branch may have moved; requirements as they were written."""
    study = load_study("training-step")
    options = typed(ab(side("revision", "main", commit="a" * 40), side("requirements", "peft==0.21.2"), study=study))
    assert options.command.__name__ == "run_ab"
    assert (options.study, options.base, options.candidate) == ("training-step", "a" * 40, "peft==0.21.2")
    planted = typed(ab(side("present", ""), side("present", "", rows=24), study=study))
    assert (planted.command.__name__, planted.inject_rows) == ("run_calibrate", 24)


def test_commands_are_repeated_as_commands(ab):
    """Two against each other, or one on two sides, in the folder in which they ran."""
    study = study_of_command("python train.py", name="train", cwd="work")
    study = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, turns=3, steps_per_turn=4))
    two = typed(ab(side("command", "python train.py"), side("command", "python train.py --x"), study=study))
    assert (two.base_command, two.candidate_command) == ("python train.py", "python train.py --x")
    one = typed(ab(side("requirements", "trl==1.0"), side("requirements", "trl==1.1"), study=study))
    assert (one.study, one.script, one.base, one.candidate) == (None, "python train.py", "trl==1.0", "trl==1.1")
    for options in (one, two):
        assert (options.cwd, options.steps) == ("work", 12)


def test_the_page_of_an_ab_ends_with_how_to_repeat_it(ab, tmp_path, capsys):
    """As that of any other run."""
    run = ab(
        side("requirements", "peft==0.20.0"), side("requirements", "peft==0.21.2"), study=load_study("training-step")
    )
    page = tmp_path / "page.html"
    assert main(["report", str(run.path), "--html", str(page), "--json"]) in (0, 1, 3, 4)
    json.loads(capsys.readouterr().out)
    assert "lorameter ab training-step --base peft==0.20.0" in page.read_text(encoding="utf-8").replace("&#x27;", "")


def test_versions_are_those_that_scripts_tell(write_run):
    """Of what their processes had in one version; where they had several no line could bring them all."""

    def tell(record):
        return record.replaced(software={"python": "3.12.1", "torch": "3.0", "peft": f"1.{record.replicate}"})

    path = write_run("one", {"plain": [1.0, 1.1]}, change=tell, facts={"libraries": {"torch": "1.0", "peft": "0.1"}})
    python, install, *_ = how_to_repeat(store.read_run("one", path.parent)).splitlines()
    assert python.startswith("# Python 3.12.1;")
    assert install == "pip install torch==3.0"


@pytest.mark.parametrize("sided", [False, True])
def test_what_a_foreign_run_says_of_itself_runs_no_command(sided, write_run, tmp_path):
    """The block is pasted into a shell; a field of the run with a line end in it stays a comment or a quoted word."""
    evil = f"1\ntouch {tmp_path}/made; $(touch {tmp_path}/made) `touch {tmp_path}/made` ' \""
    facts = {
        "python": evil, "git": {"commit": evil, "dirty": True}, "libraries": {"torch": evil, "peft": evil},
    }  # fmt: skip
    path = write_run("foreign", {"plain": [1.0, 1.1]}, facts=facts)
    manifest = codec.to_json(store.read_manifest(path))
    study = manifest["study"] | {"name": evil.replace("\n", " "), "profile": evil}
    sides = {
        name: {"label": evil, "spec": evil, "kind": evil, "worker": "", "facts": {}} for name in ("base", "candidate")
    }
    changed = {"study": study, "selection": [evil], "sides": sides if sided else {}, "policy": {evil: evil}}
    write_document(path / "manifest.json", manifest | changed)
    lines = how_to_repeat(store.read_run("foreign", path.parent))
    script = f"pip() {{ :; }}; lorameter() {{ :; }}\n{lines}\n"
    done = subprocess.run(["bash", "-c", script], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "made").exists()
