"""Sites that are jobs: what is asked of the batch system, and who can write into the folder of the jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import socket
import sys
import threading

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import codec, locks
from lorameter.run.sites import slurm
from lorameter.run.sites.batch import check_here, sbatch_parameters
from lorameter.run.sites.file_queue import (
    DRIVER,
)
from lorameter.run.sites.private import make_private
from lorameter.run.sites.slurm import FOLDER, OWNER, Owner, clear_dead
from lorameter.studies.placement import read_asked


def test_submitit_takes_all_that_is_passed_on(tmp_path, monkeypatch):
    """And writes it into the script that sbatch reads."""
    submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    executor = submitit.SlurmExecutor(folder=tmp_path)
    on = "slurm:partition=p,account=a,qos=q,reservation=r,constraint=c,nodelist=n[1-2],exclude=n3,gres=gpu:1,"
    on += "gpus_per_node=1,cpus_per_task=2,mem=4G,time=7,comment=two words,exclusive=user"
    executor.update_parameters(**sbatch_parameters(read_asked(on).parameters))
    text = executor._make_submission_file_text("command", "0")
    for flag in (
        "--partition=p", "--account=a", "--qos=q", "--reservation=r", "--constraint=c", "--nodelist='n[1-2]'",
        "--exclude=n3", "--gres=gpu:1", "--gpus-per-node=1", "--cpus-per-task=2", "--mem=4G", "--time=7",
        "--comment='two words'", "--exclusive=user", "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {flag}\n" in text


def test_without_sbatch_it_is_refused_before_anything_is_made(capsys, tmp_path, monkeypatch):
    """In one sentence, with what works here."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "training-step", "--on", "slurm", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "on = 'slurm': this machine has no sbatch" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_without_submitit_and_with_sites_of_this_machine_it_is_refused(capsys, tmp_path, monkeypatch):
    """With the remedy."""
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert main(["run", "training-step", "--on", "submitit-local", "--sites", "0,1", *runs]) == 2
    assert "Write sites=N in it" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"Install lorameter\[slurm\]"):
        check_here(read_asked("submitit-local"))
    assert not (tmp_path / "runs").exists()


def own(folder, **changes):
    """A folder of a driver."""
    folder.mkdir(parents=True)
    owner = Owner(host=socket.gethostname(), boot=slurm._boot(), silent_s=60)
    (folder / OWNER).write_text(codec.dumps(dataclasses.replace(owner, **changes)))
    (folder / DRIVER).touch()
    return folder


def test_of_dead_drivers_the_jobs_are_cancelled_and_the_folders_removed(tmp_path, monkeypatch):
    """Here by the lock, elsewhere by silence in the file server's time; the living keep theirs."""
    cancelled = []
    monkeypatch.setattr(slurm, "cancel_jobs", lambda *ids: cancelled.extend(ids))
    home = tmp_path / FOLDER
    own(home / "dead", array="7")
    own(home / "far-dead", host="elsewhere", array="8_3")
    os.utime(home / "far-dead" / DRIVER, (1, 1))
    far = own(home / "far", host="elsewhere", array="9")
    (home / "beginning").mkdir()
    live = own(home / "live", array="10")
    with locks.alone(live / OWNER, ""):
        clear_dead(home)
    assert sorted(path.name for path in home.iterdir()) == ["beginning", "far", "live"]
    assert sorted(cancelled) == ["7", "8_3"]
    assert far.is_dir()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


@contextlib.contextmanager
def planting(runs, marker):
    """Meanwhile another user who can write into the folder of the jobs replaces their pickles."""
    ended = threading.Event()

    def plant():
        while not ended.wait(0.002):
            for path in runs.glob(f"{FOLDER}/*/jobs/*_submitted.pkl"):
                draft = path.with_suffix(".draft")
                draft.write_bytes(pickle.dumps(Planted(marker)))
                draft.replace(path)

    thread = threading.Thread(target=plant)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    "way", ["the folder is writable", "the folder is a link", "the folder is another user's", "its parent is writable"]
)
def test_no_pickle_is_loaded_from_a_folder_that_others_can_write(way, tmp_path, capsys):
    """The command names the folder and what to do, and submits nothing."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    runs, marker = tmp_path / "runs", tmp_path / "marker"
    runs.mkdir()
    home = runs / FOLDER
    if way == "the folder is a link":
        (tmp_path / "theirs").mkdir()
        home.symlink_to(tmp_path / "theirs")
    elif way == "the folder is writable":
        home.mkdir()
        home.chmod(0o770)
    elif way == "the folder is another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder to another user")
        home.mkdir()
        os.chown(home, 65534, 65534)
    else:
        runs.chmod(0o777)
    command = ["run", "training-step", "--on", "submitit-local:start_minutes=0.05", "--runs-dir", str(runs)]
    with planting(runs, marker):
        code = main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert not marker.exists()
    assert code == 2
    assert str(runs if way == "its parent is writable" else home) in said
    assert "--runs-dir" in said
    assert not list(runs.glob(f"{FOLDER}/*"))


def test_the_folder_of_jobs_may_lie_in_a_shared_one_with_the_sticky_bit(tmp_path):
    """As /tmp is; each user has a folder of their own there, that others cannot rename or write into."""
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o1777)
    make_private(runs / FOLDER)
    assert (runs / FOLDER).stat().st_mode & 0o777 == 0o700


def test_no_option_is_given_to_scancel_for_a_job(tmp_path, monkeypatch, capsys):
    """An id that is read from a file is a number, or it goes nowhere."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {told}\nexit 1\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    runs = tmp_path / "runs"
    array = Owner(host=socket.gethostname(), boot=slurm._boot(), silent_s=60, array="12")
    for name, text in (("a", codec.dumps(array)), ("b", codec.dumps(array).replace('"12"', '"--user=root"'))):
        own(runs / FOLDER / name)
        (runs / FOLDER / name / OWNER).write_text(text)
    assert main(["run", "training-step", "--on", "slurm", "--runs-dir", str(runs)]) == 2
    assert "no job was submitted" in " ".join(capsys.readouterr().err.split())
    cancelled = [line for line in told.read_text().splitlines() if line.startswith("scancel")]
    assert cancelled == ["scancel 12"]
