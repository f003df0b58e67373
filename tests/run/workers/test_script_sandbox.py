"""Tests of a script's sandbox: copied, linked and omitted files, its environment, and settings that cannot be
isolated."""

from __future__ import annotations

import os
import sys

import pytest

from lorameter.errors import UsageError
from lorameter.records.fileio import scratch_folder
from lorameter.run.workers import script_sandbox
from lorameter.run.workers.script_sandbox import (
    resolve_command,
    script_environment,
    shared_notices,
    take_snapshot,
)
from lorameter.studies.script import check_side
from lorameter.studies.variant import ScriptVariant


@pytest.fixture
def project(tmp_path):
    """A typical project folder."""
    folder = tmp_path / "project"
    for name in (
        "data/rows.jsonl",
        "train.py",
        ".git/HEAD",
        "env/pyvenv.cfg",
        "__pycache__/x.pyc",
        "out/old/model.bin",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "link").symlink_to("data/rows.jsonl")
    os.mkfifo(folder / "pipe")
    return folder


def test_each_process_has_its_own_copy(project, tmp_path):
    """Writes in a copy change neither another copy nor the original; a link keeps its target."""
    first, second = (take_snapshot(project, tmp_path / name) for name in ("first", "second"))
    (first / "out" / "old" / "model.bin").write_text("trained")
    (first / "train.py").write_text("edited")
    assert (
        (second / "out/old/model.bin").read_text() == (project / "out/old/model.bin").read_text() == "out/old/model.bin"
    )
    assert (project / "train.py").read_text() == "train.py"
    assert (first / "link").read_text() == "data/rows.jsonl"


def test_repositories_and_environments_are_linked_and_not_copied(project, tmp_path):
    """Repositories and environments are linked and not copied."""
    copy = take_snapshot(project, tmp_path / "copy")
    assert (copy / ".git").is_symlink()
    assert (copy / "env").is_symlink()
    assert sorted(path.name for path in copy.iterdir()) == [".git", "data", "env", "link", "out", "train.py"]


def test_a_copy_does_not_include_temporary_folders_of_runs(project, monkeypatch):
    """If TMPDIR is in the folder, no run's temporary folder is copied into the copy."""
    monkeypatch.setattr("tempfile.tempdir", str(project))
    with scratch_folder() as other, scratch_folder() as scratch:
        copy = take_snapshot(project, scratch / "snapshot-0")
        assert not {other.name, scratch.name} & {path.name for path in copy.iterdir()}
        assert (copy / "train.py").is_file()
    inside = take_snapshot(project, project / "inside")
    assert "inside" not in {path.name for path in inside.iterdir()}


def test_large_files_are_linked_with_a_notice(project, tmp_path, monkeypatch):
    """Large files are not copied, so that a script that writes into them changes the original."""
    monkeypatch.setattr(script_sandbox, "LARGE_BYTES", 10)
    copy = take_snapshot(project, tmp_path / "copy")
    assert (copy / "data" / "rows.jsonl").is_symlink()
    codes = {
        notice.code: notice.message
        for notice in shared_notices(ScriptVariant(name="a", command="python train.py"), project)
    }
    assert "data/rows.jsonl" in codes["files-shared"]


LINKS = {
    "to-file": "data/rows.jsonl",
    "data/self": "..",
    "loop-a": "loop-b",
    "loop-b": "loop-a",
    "absolute": "{folder}/data",
    "away": "../elsewhere",
    "away-dangling": "../missing/file.txt",
    "away-by-a-link": "away/kept.txt",
}


@pytest.fixture
def linked(project):
    """The project with links of every kind, and a folder next to it."""
    (project.parent / "elsewhere").mkdir()
    (project.parent / "elsewhere" / "kept.txt").write_text("kept")
    for name, target in LINKS.items():
        (project / name).symlink_to(target.format(folder=project))
    return project


def test_a_link_that_leads_outside_is_shared_with_a_notice(linked, tmp_path):
    """The notice names links to outside targets, also missing ones, but no links within the folder."""
    copy = take_snapshot(linked, tmp_path / "snapshot")
    assert (copy / "away" / "kept.txt").read_text() == (copy / "away-by-a-link").read_text() == "kept"
    (notice,) = shared_notices(ScriptVariant(name="a", command="python train.py"), linked)
    assert notice.code == "files-shared"
    assert "away, away-by-a-link, away-dangling are not copied" in notice.message


def test_a_folder_that_holds_too_much_is_refused(project, monkeypatch):
    """The error has the remedy and comes before the copy."""
    monkeypatch.setattr(script_sandbox, "MAX_FILES", 2)
    with pytest.raises(UsageError, match="Name the script's own folder as cwd"):
        list(shared_notices(ScriptVariant(name="a", command="python train.py"), project))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("python train.py --output_dir /data/out", "writes-outside"),
        ("python train.py --save_dir=/data/out", "writes-outside"),
        ("python train.py output_dir=~/out", "writes-outside"),
        ("python train.py --output_dir out --data /data/rows.jsonl", None),
        ("python train.py --log_level info --save_steps 10 run_name=x --output_dir", None),
    ],
)
def test_output_outside_of_the_folder_has_a_notice(project, command, code):
    """The output path is read from the command, as far as it is visible there."""
    variant = ScriptVariant(name="a", command=command)
    found = [notice.code for notice in shared_notices(variant, project)]
    assert found == ([code] if code else [])


def test_the_environment_publishes_nothing_and_shares_no_cache(tmp_path):
    """Trackers are disabled, conflicting caches and ports are separate, and the thread count is one unless the user or
    the variant sets another."""
    variant = ScriptVariant(name="a", command="python t.py", env={"OMP_NUM_THREADS": "4", "MINE": "1"})
    found = script_environment(
        variant, {"HOME": "/h", "MKL_NUM_THREADS": "3"}, scratch=tmp_path, threads=1, port=5, socket="/s"
    )
    assert (found["WANDB_MODE"], found["MASTER_PORT"], found["MINE"], found["HOME"]) == ("disabled", "5", "1", "/h")
    assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"]) == ("4", "3")
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert "HF_DATASETS_CACHE" not in found


def test_python_is_the_interpreter_of_the_side_or_variant(project):
    """The interpreter is that of the side or of the variant; a missing program or file is refused."""
    plain = ScriptVariant(name="a", command="python train.py --r 8")
    assert resolve_command(plain, "/side/python", {}, project, origin=project) == [
        "/side/python",
        "train.py",
        "--r",
        "8",
    ]
    own = ScriptVariant(name="a", command="python3 train.py", python=sys.executable)
    assert resolve_command(own, "/side/python", {}, project, origin=project)[0] == sys.executable
    for command, message in (("python other.py", "no file 'other.py'"), ("nothing train.py", "no program 'nothing'")):
        with pytest.raises(UsageError, match=message):
            resolve_command(
                ScriptVariant(name="a", command=command), "/side/python", {"PATH": "/nowhere"}, project, origin=project
            )
    with pytest.raises(UsageError, match="no folder"):
        list(shared_notices(ScriptVariant(name="a", command="python train.py", cwd="missing"), project))


@pytest.mark.parametrize(
    ("lines", "of_python"),
    [
        ("#!/other/bin/python3\nprint()\n", True),
        ("#!/bin/sh\n'''exec' \"/a long path/bin/python\" \"$0\" \"$@\"\n' '''\n", True),
        ("#!/bin/sh\nexec python $@\n", False),
        ("\x7fELF python", False),
    ],
)
def test_a_launcher_of_another_environment_runs_in_the_interpreter_of_the_side(tmp_path, lines, of_python):
    """The launcher's shebang would start the other environment's interpreter. A program that is not a Python script is
    searched on the side's PATH."""
    for name in ("side", "other"):
        (tmp_path / name).mkdir()
    launcher, side = tmp_path / "other" / "launch", str(tmp_path / "side" / "python")
    launcher.write_text(lines)
    launcher.chmod(0o755)
    variant = ScriptVariant(name="a", command="launch train.py")
    found = script_environment(
        variant, {"PATH": str(launcher.parent)}, scratch=tmp_path, threads=1, port=5, socket="/s", side=side
    )
    words = resolve_command(variant, side, found, tmp_path, origin=tmp_path, side=side)
    assert words == [*([side] if of_python else []), str(launcher), "train.py"]
    assert resolve_command(variant, "/python", found, tmp_path, origin=tmp_path) == [str(launcher), "train.py"]
    own = launcher.rename(tmp_path / "side" / "launch")
    assert resolve_command(variant, side, found, tmp_path, origin=tmp_path, side=side) == [str(own), "train.py"]


def test_a_command_with_its_own_interpreter_is_refused_for_a_side(project):
    """Both sides would be equal; the word python means the interpreter of the side."""
    own = {"command": "env/bin/python3 train.py"}, {"command": "python t.py", "python": "/p/python"}
    for fields in own:
        with pytest.raises(UsageError, match="runs in this interpreter on both sides"):
            check_side(ScriptVariant(name="a", **fields))
    for command in ("python train.py", "accelerate launch train.py", "./train.sh"):
        check_side(ScriptVariant(name="a", command=command))


@pytest.mark.parametrize(
    ("word", "leads"),
    [
        ("../data/rows.jsonl", "{}/data/rows.jsonl"),
        ("--data=../data", "--data={}/data"),
        ("data.path=../data", "data.path={}/data"),
        ("../missing", "../missing"),
        ("--out=../data", "--out=../data"),
        ("--output_dir ../data", "--output_dir ../data"),
        ("--data ../data", "--data {}/data"),
        ("..", "{}"),
    ],
)
def test_paths_to_the_parent_folder_work_in_the_copy(tmp_path, word, leads):
    """Input paths become absolute; an output path stays next to the copy and is removed with the trial."""
    for name in ("data/rows.jsonl", "project/train.py", "scratch/copy/train.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    origin, copy = tmp_path / "project", tmp_path / "scratch" / "copy"
    variant = ScriptVariant(name="a", command=f"python train.py {word}")
    found = resolve_command(variant, "/python", {}, copy, origin=origin)
    assert found == ["/python", "train.py", *leads.format(tmp_path).split()]
