"""Where a script works: what is copied, linked or left out, what its environment says, what cannot be kept apart."""

from __future__ import annotations

import os
import sys

import pytest

from harness.errors import UsageError
from harness.run.executors import workplace
from harness.run.executors.workplace import copy_snapshot, shared_notices, take_snapshot, variables_of, words_of
from harness.studies.variant import Variant


@pytest.fixture
def project(tmp_path):
    """A folder as projects are."""
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


def test_each_process_has_a_copy_of_its_own(project, tmp_path):
    """What is written there is in no other copy and not in the original; a link still leads to what it led to."""
    first, second = (copy_snapshot(take_snapshot(project, tmp_path / f"s{n}"), tmp_path / f"c{n}") for n in (1, 2))
    (first / "out" / "old" / "model.bin").write_text("trained")
    (first / "train.py").write_text("edited")
    assert (
        (second / "out/old/model.bin").read_text() == (project / "out/old/model.bin").read_text() == "out/old/model.bin"
    )
    assert (project / "train.py").read_text() == "train.py"
    assert (first / "link").read_text() == "data/rows.jsonl"


def test_what_is_only_read_is_linked_and_what_tools_keep_is_left_out(project, tmp_path):
    """Repositories and environments are not copied."""
    copy = take_snapshot(project, tmp_path / "copy")
    assert (copy / ".git").is_symlink()
    assert (copy / "env").is_symlink()
    assert sorted(path.name for path in copy.iterdir()) == [".git", "data", "env", "link", "out", "train.py"]


def test_large_files_are_linked_and_said(project, tmp_path, monkeypatch):
    """They are not copied for each process, so what is written into them is written into the original."""
    monkeypatch.setattr(workplace, "LARGE_BYTES", 10)
    copy = take_snapshot(project, tmp_path / "copy")
    assert (copy / "data" / "rows.jsonl").is_symlink()
    codes = {
        notice.code: notice.message for notice in shared_notices(Variant(name="a", command="python train.py"), project)
    }
    assert "data/rows.jsonl" in codes["files-shared"]


def test_a_folder_that_holds_too_much_is_refused(project, monkeypatch):
    """Before anything is copied, with the remedy."""
    monkeypatch.setattr(workplace, "MOST_FILES", 2)
    with pytest.raises(UsageError, match="Name the script's own folder as cwd"):
        list(shared_notices(Variant(name="a", command="python train.py"), project))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("python train.py --output_dir /data/out", "writes-outside"),
        ("python train.py --save-path=../models", "writes-outside"),
        ("accelerate launch --main_process_port 29500 train.py", "port-shared"),
        ("python train.py --output_dir out --data /data/rows.jsonl", None),
        ("accelerate launch --main_process_port 0 train.py", None),
    ],
)
def test_what_cannot_be_kept_apart_is_said_before_the_start(project, command, code):
    """As far as the command tells: output outside of its folder, a port that all of its processes would listen on."""
    (project / "accelerate").write_text("#!/bin/sh\n")
    (project / "accelerate").chmod(0o755)
    variant = Variant(name="a", command=command.replace("accelerate ", "./accelerate "))
    found = [notice.code for notice in shared_notices(variant, project)]
    assert found == ([code] if code else [])


def test_the_environment_publishes_nothing_and_shares_no_cache(tmp_path):
    """Trackers are off, caches and the port are its own, threads are one unless somebody says otherwise."""
    variant = Variant(name="a", command="python t.py", env={"OMP_NUM_THREADS": "4", "MINE": "1"})
    found = variables_of(
        variant, {"HOME": "/h", "MKL_NUM_THREADS": "3"}, scratch=tmp_path, threads=1, port=5, socket="/s"
    )
    assert (found["WANDB_MODE"], found["MASTER_PORT"], found["MINE"], found["HOME"]) == ("disabled", "5", "1", "/h")
    assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"]) == ("4", "3")
    assert found["TRITON_CACHE_DIR"].startswith(str(tmp_path))
    assert found["LORAMETER_TURNS"] == "/s"
    assert found["LORAMETER_FOLLOWER"] == "harness.attach.turns:Turns"


def test_the_word_python_is_the_interpreter_that_is_meant(project):
    """That of the side, or of the variant; what is no program or no file is refused."""
    plain = Variant(name="a", command="python train.py --r 8")
    assert words_of(plain, "/side/python", {}, project) == ["/side/python", "train.py", "--r", "8"]
    own = Variant(name="a", command="python3 train.py", python=sys.executable)
    assert words_of(own, "/side/python", {}, project)[0] == sys.executable
    for command, said in (("python other.py", "no file 'other.py'"), ("nobody train.py", "no program 'nobody'")):
        with pytest.raises(UsageError, match=said):
            words_of(Variant(name="a", command=command), "/side/python", {"PATH": "/nowhere"}, project)
    with pytest.raises(UsageError, match="no folder"):
        list(shared_notices(Variant(name="a", command="python train.py", cwd="missing"), project))
