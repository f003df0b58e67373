"""An A/B on other machines: a side that would not be the same there is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.run.executors import open_executor
from lorameter.run.sites.sides import write_sides


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with one commit."""
    for words in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e@e", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("HEAD", "a revision is checked out on this machine only"),
        ("python3", "it may be another Python on each node. Name its path, such as /"),
        ("no-such-thing", "not an interpreter"),
        ("peft @ https://me:secret@host/peft.whl", "what may be a credential"),
    ],
)
def test_what_is_not_the_same_on_another_machine_is_refused(repository, spec, words):
    """With what can be."""
    with pytest.raises(UsageError, match=words):
        write_sides({"base": spec}, repository, "on = 'ray'")


def test_an_interpreter_by_path_and_requirements_can_be_elsewhere(repository):
    """A path may be there and not here."""
    there, here, asked = write_sides(
        {"base": "/env/bin/python", "candidate": sys.executable, "": "peft==0.19.1"}, repository, "on = 'ray'"
    )
    assert (there.kind, there.spec) == ("interpreter", "/env/bin/python")
    assert (here.kind, here.spec) == ("interpreter", sys.executable)
    assert (asked.kind, asked.spec) == ("requirements", "peft==0.19.1")


def test_a_revision_is_refused_before_anything_waits_in_a_queue(study, repository, pretended, capsys):
    """By the command as well."""
    words = ["ab", str(study()), "--base", "HEAD", "--candidate", "HEAD", "--on", "slurm:sites=2"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "on = 'slurm:sites=2', --base HEAD: a revision is checked out" in said
    assert not (repository / "runs").exists()
    assert isinstance(open_executor(), pretended.Fake)
