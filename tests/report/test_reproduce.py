"""Tests of the reproduction steps of a run: the versions that trained, and a valid command with the same meaning.

Tests that the committed reports are those of the runs next to them; `make reports` updates them.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.report.reproduce import reproduction_steps
from lorameter.studies.study_file import load_study
from tests.constructed import RUNS

ROOT = Path(__file__).parents[2]
STORED_RUNS = [
    *RUNS.iterdir(),
    *(path for path in (ROOT / "reports").iterdir() if (path / "trials.jsonl").is_file()),
]


def parse_command(run):
    """Return the parsed options of the command that measures the run again."""
    (line,) = (line for line in reproduction_steps(run).splitlines() if line.startswith("lorameter "))
    return build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("path", STORED_RUNS, ids=lambda path: path.name)
def test_the_line_of_every_run_is_a_command(path):
    """An A/B that does not record the arguments of its sides has no command, and the report says so."""
    run = store.read_run(str(path), path.parent)
    if run.manifest.sides:
        assert "does not record the arguments of its sides" in reproduction_steps(run)
    else:
        assert parse_command(run).calls == "run:run_study"


def side(kind, spec, *, commit=None, rows=0):
    return {
        "kind": kind, "spec": spec, "label": f"{spec} (label)", "worker": "1", "slowdown_rows": rows,
        "facts": {"packages": {}, "git": {"commit": commit, "dirty": False}},
    }  # fmt: skip


@pytest.fixture
def ab(write_run):
    """A function that writes an A/B of two sides and returns the run as read back."""

    def write(base, candidate, **options):
        path = write_run("ab", {next(iter(options["study"].variants)).name: [1.0, 1.1]}, **options)
        data = codec.to_json(store.read_manifest(path)) | {"sides": {"base": base, "candidate": candidate}}
        write_document(path / "manifest.json", data)
        return store.read_run("ab", path.parent)

    return write


def test_an_ab_is_repeated_as_an_ab(ab):
    """A revision is given by its commit, since its branch may have moved; requirements stay as written."""
    study = load_study("training-step")
    options = parse_command(
        ab(side("revision", "main", commit="a" * 40), side("requirements", "peft==0.21.2"), study=study)
    )
    assert options.calls == "run:run_ab"
    assert (options.study, options.base, options.candidate) == ("training-step", "a" * 40, "peft==0.21.2")
    planted = parse_command(ab(side("present", ""), side("present", "", rows=24), study=study))
    assert (planted.calls, planted.inject_rows) == ("calibrate:run_calibrate", 24)


@pytest.mark.parametrize("sided", [False, True])
def test_fields_of_a_foreign_run_cannot_run_a_command(sided, write_run, tmp_path):
    """The steps can be pasted into a shell: a field of the run with a line end stays a comment or a quoted argument."""
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
    lines = reproduction_steps(store.read_run("foreign", path.parent))
    script = f"pip() {{ :; }}; lorameter() {{ :; }}\n{lines}\n"
    done = subprocess.run(["bash", "-c", script], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "made").exists()


REPORTS = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "reports").glob("2*/manifest.json"))


@pytest.mark.parametrize("run", REPORTS, ids=lambda path: path.name)
def test_a_committed_report_is_current(run, monkeypatch, tmp_path, capsys):
    """Text, page and Markdown are equal to the last character."""
    monkeypatch.chdir(ROOT)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert main(["report", str(run), "--markdown"]) == 0
    made = {"txt": text, "md": capsys.readouterr().out, "html": page.read_text(encoding="utf-8")}
    for ending, found in made.items():
        assert (run / f"report.{ending}").read_text(encoding="utf-8") == found, ending
