"""Tests of replicates in SLURM jobs; scripts that start local processes replace SLURM's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorameter.cli import main
from lorameter.run.sites import slurm
from lorameter.run.sites.slurm import sbatch_options
from lorameter.studies.placement import read_slurm
from tests.run.sites.wholeness import sites_of_whole

SBATCH = """#!{python}
import os, re, subprocess, sys
queue = {queue!r}
(log,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--output="))
number = len(os.listdir(queue)) + 1
with open(log, "wb") as file:
    environment = dict(os.environ, SLURMD_NODENAME="n%d" % (number % 2))
    job = subprocess.Popen(["/bin/sh", "-c", sys.stdin.read()], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                           start_new_session=True, env=environment)
with open(os.path.join(queue, str(number)), "w") as file:
    file.write(str(job.pid))
print(number)
"""
COMMON = """#!{python}
import os, signal, sys
queue = {queue!r}
def pids():
    for name in sorted(os.listdir(queue)):
        pid = int(open(os.path.join(queue, name)).read())
        try:
            if open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[0] != "Z":
                yield name, pid
        except OSError:
            pass
"""
SQUEUE = COMMON + "for name, pid in pids(): print(name)\n"
SCANCEL = COMMON + "for name, pid in pids():\n    if name in sys.argv: os.kill(pid, signal.SIGTERM)\n"
SACCT = "#!/bin/sh\necho CANCELLED\n"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The folder of the queue, with a file for each job that holds the id of its process."""
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    queue.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("sacct", SACCT)):
        (programs / name).write_text(text.replace("{python}", sys.executable).replace("{queue!r}", repr(str(queue))))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "QUEUE_POLL_S", 0.2)
    monkeypatch.setattr(slurm, "SETTLE_S", 1.0)
    return queue


def wait_for(condition):
    """Wait until the condition returns a value, and return it."""
    deadline = time.monotonic() + 100
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_replicates_are_spread_over_jobs(placed, run, queue):
    """Each job measures one replicate, two jobs run concurrently, and the sites are their nodes."""
    code, last, output = run("run", placed('on = "slurm:sites=2,partition=p"', replicates=2), "--if-busy", "share")
    assert code == 0, output
    assert sites_of_whole(last) == {"n0", "n1"}
    assert len(list(queue.iterdir())) == 1 + 2  # the first job describes its node
    assert set(last.manifest.site_facts) == {"n0", "n1"}
    assert not (last.path / "jobs").exists()


def test_a_job_that_is_lost_is_run_again(placed, run, pretended, queue):
    """Its replicate is measured again from the start, and a notice gives the reason."""
    pretended(turn_s=0.2)

    def cancel():
        wait_for(lambda: len(list(queue.iterdir())) == 2)
        time.sleep(0.3)
        os.kill(int((queue / "2").read_text()), signal.SIGKILL)

    threading.Thread(target=cancel, daemon=True).start()
    code, last, output = run("run", placed('on = "slurm"', replicates=2))
    assert code == 0, output
    assert {record.replicate for record in last.records} == {0, 1}
    sites_of_whole(last)
    (notice,) = (one for one in last.manifest.notices if one.code == "site-lost")
    assert "cancelled" in notice.message.lower()


def test_options_of_sbatch_are_passed_on():
    """A job without a GPU takes a whole node, unless `exclusive` says otherwise."""
    on = "slurm:partition=p,nodelist=n[1-2],gres=gpu:1,gpus_per_node=1,time=7,comment=two words,exclusive=user"
    assert sbatch_options(read_slurm(on).parameters)[4:] == [
        "--exclusive=user", "--time=7", "--partition=p", "--nodelist=n[1-2]", "--gres=gpu:1", "--gpus-per-node=1",
        "--comment=two words",
    ]  # fmt: skip
    assert sbatch_options({})[4:] == ["--exclusive", "--time=60"]
    assert sbatch_options({"gres": "gpu:1"})[4:] == ["--time=60", "--gres=gpu:1"]


def test_a_refusal_of_sbatch_is_reported(placed, run, queue, tmp_path):
    """The error has sbatch's message, and no run is left."""
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    code, last, output = run("run", placed('on = "slurm:partition=p"'))
    assert (code, last) == (2, None)
    assert "no job was submitted: sbatch: error: invalid partition" in output
    assert not list((tmp_path / "runs").iterdir())


def test_without_sbatch_it_is_refused_before_anything_is_made(capsys, tmp_path, monkeypatch):
    """The error is one sentence with the alternative."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "training-step", "--on", "slurm", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "on = 'slurm': this machine has no sbatch" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("HEAD", "a revision is checked out on this machine only"),
        ("python3", "it may be another Python on each node. Name its path, such as /"),
        ("no-such-thing", "not an interpreter"),
        ("peft @ https://me:secret@host/peft.whl", "what may be a credential"),
    ],
)
def test_a_side_that_depends_on_the_machine_is_refused(placed, run, queue, tmp_path, base, words):
    """The error comes before a job is submitted."""
    for git in (["init", "-q"], ["-c", "user.name=n", "-c", "user.email=e@e", "commit", "-q", "--allow-empty", "-mx"]):
        subprocess.run(["git", *git], cwd=tmp_path, check=True)
    code, last, output = run("ab", placed(""), "--base", base, "--candidate", sys.executable, "--on", "slurm:sites=2")
    assert (code, last) == (2, None)
    assert words in output
    assert not list(queue.iterdir())
