"""Tests of the commit and the dirty flag of a folder."""

from __future__ import annotations

import subprocess

import pytest

from lorameter.machine.repository import git_state, run_git


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of one file."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README").write_text("one")
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "one")):
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)
    return folder


def test_a_change_makes_it_dirty_and_bytecode_does_not(repository):
    """A run that only compiled modules still belongs to the commit."""
    commit = run_git(repository, "rev-parse", "HEAD").stdout.strip()
    (repository / "__pycache__").mkdir()
    (repository / "__pycache__" / "a.pyc").write_text("")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "README").write_text("two")
    assert git_state(repository) == {"commit": commit, "dirty": True}


def test_variables_of_a_git_hook_are_ignored(repository, tmp_path, monkeypatch):
    """Git's hooks export GIT_DIR; the state is that of the given folder."""
    state = git_state(repository)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_state(repository) == state
