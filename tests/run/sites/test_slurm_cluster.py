"""Replicates in jobs of a real SLURM: slurmctld and two slurmd on this machine, started without systemd, whose jobs are
requeued, preempted, cancelled and at the end of their time, and whose driver is killed, with real trials (make
proof-long)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from lorameter.records import store
from lorameter.run.sites.slurm import FOLDER
from tests.run.sites.wholeness import sites_of_whole

pytestmark = [pytest.mark.selftest, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[3]
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "munged", "munge", "runuser")
CONFIG = """
ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
TaskProlog={folder}/prolog
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""
PROLOG = """#!/bin/sh
if test "$SLURMD_NODENAME" = n2 && test -f {folder}/planted
then echo "export PYTHONPATH=$(cat {folder}/planted):$PYTHONPATH"
fi
"""
"""What SLURM runs before a task, and takes its variables from: the file `planted` names a folder for n2's path."""


def wait_for(condition, driver=None):
    """What it gives when that is something; a `driver` must live meanwhile."""
    deadline = time.monotonic() + 1800
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert driver is None or driver.poll() is None, "the driver has ended"
        time.sleep(0.1)
    return found


def said(*arguments):
    """What a command prints; nothing where it fails."""
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def slurm():
    """The cluster's configuration is in the environment; it ends with the module."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not found. Install SLURM and munge: apt-get install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started as root here, and this is another user")
    pytest.importorskip("submitit", reason="submitit is not installed: pip install lorameter[slurm]")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PROOF": "slurm"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH")])
        )
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("SLURM_CONF", "PYTHONPATH", "PROOF"):
            patch.setenv(name, environment[name])
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=socket.gethostname(), ports=free_ports(3)))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (folder / "prolog").write_text(PROLOG.format(folder=folder))
        (folder / "prolog").chmod(0o755)

        def start(*command):
            log = stack.enter_context((folder / "started.log").open("a"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        if not said("munge", "-n"):
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            start("runuser", "-u", "munge", "--", "munged", "--foreground")
            wait_for(lambda: said("munge", "-n"))
        start("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        wait_for(lambda: said("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        yield folder


@pytest.fixture(autouse=True)
def empty(slurm):
    """Each test begins with an empty queue and two nodes that are idle."""
    subprocess.run(["scancel", "--user=root"], check=False)
    wait_for(lambda: said("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")


def command(*arguments, runs, word="run"):
    return [sys.executable, "-m", "lorameter.cli", word, *map(str, arguments), "--runs-dir", str(runs), "--json"]


def run(*arguments, runs, word="run", codes=(0,)):
    words = command(*arguments, runs=runs, word=word)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in codes, done.stderr
    return done


@contextlib.contextmanager
def driving(*arguments, runs):
    """A driver that is under way; what it says on stderr is in the file `said` beside the runs."""
    with (
        runs.with_name("said").open("w") as errors,
        subprocess.Popen(command(*arguments, runs=runs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors) as driver,
    ):
        try:
            yield driver
        finally:
            if driver.poll() is None:
                driver.terminate()


def only_run(runs):
    (path,) = (one for one in runs.iterdir() if one.is_dir() and one.name != FOLDER)
    return store.read_run(str(path), runs)


def lines(runs):
    """What has been written so far."""
    return [json.loads(line) for path in runs.glob("*/trials.jsonl") for line in path.read_text().splitlines()]


def pending(partition="main"):
    """The id of the job that waits there, which is none until one does."""
    return said("squeue", "-h", "-r", "-p", partition, "-t", "pending", "-o", "%i").strip()


def start_now(name):
    """A job that was requeued, which SLURM itself would hold back for two minutes."""
    subprocess.run(["scontrol", "update", f"JobId={name}", "StartTime=now"], check=True)


def measuring():
    """Measuring processes on this machine that are ours."""
    return [
        one.pid
        for one in psutil.process_iter(["cmdline", "environ"])
        if "lorameter.worker" in (one.info["cmdline"] or []) and (one.info["environ"] or {}).get("PROOF") == "slurm"
    ]


def notices(run, code):
    return [notice.message for notice in run.manifest.notices if notice.code == code]


def test_a_study_is_spread_over_jobs_and_its_records_are_those_of_a_local_run(study, results_of, tmp_path):
    """Seeds, orders and losses are the same to the bit, and no job and no file of one is left."""
    there, here = tmp_path / "there", tmp_path / "here"
    run(study(replicates=2), "--on", "slurm:sites=2,partition=main,time=30", runs=there)
    assert not said("squeue", "-h", "-t", "running,pending")
    run(study(replicates=2), runs=here)
    spread, local = only_run(there), only_run(here)
    assert [results_of(record) for record in spread.records] == [results_of(record) for record in local.records]
    assert spread.manifest.fingerprint == local.manifest.fingerprint
    assert spread.manifest.tokens == local.manifest.tokens
    assert sites_of_whole(spread) == {"n1", "n2"}
    assert not (there / FOLDER).exists()


def began(run):
    """When each of its trials did."""
    return {record.trial: record.started_unix_s for record in run.records}


def test_a_job_that_is_requeued_comes_again_and_measures_what_is_left(study, finished, tmp_path):
    """The run waits for it, as it is in the queue; what had ended stays."""
    runs = tmp_path / "runs"
    with driving(study(replicates=3, turns=8), "--on", "slurm:silent_s=60", runs=runs) as driver:
        before = wait_for(lambda: finished(runs), driver)
        name = said("squeue", "-h", "-t", "running", "-o", "%i").strip()
        subprocess.run(["scontrol", "requeue", name], check=True)
        wait_for(pending, driver)
        start_now(name)
        driver.wait(1800)
    assert driver.returncode == 0, runs.with_name("said").read_text()
    ended = only_run(runs)
    sites_of_whole(ended)
    assert before.items() <= began(ended).items()
    (lost,) = notices(ended, "site-lost")
    assert "its job was cancelled or preempted" in lost
    assert len(notices(ended, "site-joined")) == 1


def test_a_driver_that_is_killed_is_gone_on_with_and_its_jobs_end(study, tmp_path):
    """What had been written is kept; the next driver cancels the jobs of the dead one and removes its folder."""
    runs = tmp_path / "runs"
    with driving(study(replicates=3, turns=4), "--on", "slurm:silent_s=60", runs=runs) as driver:
        wait_for(lambda: len({line["replicate"] for line in lines(runs)}) == 2, driver)
        assert measuring()
        driver.send_signal(signal.SIGKILL)
    before = {line["trial"]: line["started_unix_s"] for line in lines(runs) if line["replicate"] == 0}
    run("--resume", only_run(runs).manifest.run, "--on", "slurm:silent_s=60", runs=runs)
    ended = only_run(runs)
    sites_of_whole(ended)
    assert {one.trial: one.started_unix_s for one in ended.records if one.replicate == 0} == before
    assert not (runs / FOLDER).exists()
    wait_for(lambda: not said("squeue", "-h"))


def test_jobs_whose_driver_is_killed_end_by_themselves(study, tmp_path):
    """When it has been silent for long enough; no process is left."""
    runs = tmp_path / "runs"
    with driving(study(replicates=2, turns=4000), "--on", "slurm:silent_s=10", runs=runs) as driver:
        wait_for(measuring, driver)
        driver.send_signal(signal.SIGKILL)
    wait_for(lambda: not said("squeue", "-h"))
    wait_for(lambda: not measuring())


def test_a_run_that_is_interrupted_cancels_its_jobs(study, tmp_path):
    """What was under way is `interrupted`, what never began `not_run`, and nothing is in the queue."""
    runs = tmp_path / "runs"
    with driving(study(replicates=2, turns=4000), "--on", "slurm", runs=runs) as driver:
        wait_for(lambda: measuring() and list(runs.glob(f"{FOLDER}/*/site-0/1/messages")), driver)
        wait_for(
            lambda: any('"turn"' in path.read_text() for path in runs.glob(f"{FOLDER}/*/site-0/1/messages")), driver
        )
        driver.send_signal(signal.SIGINT)
        driver.wait(1800)
    assert driver.returncode == 4, runs.with_name("said").read_text()
    ended = only_run(runs)
    assert {record.status for record in ended.records} <= {"interrupted", "not_run"}
    assert ended.manifest.status == "interrupted"
    wait_for(lambda: not said("squeue", "-h"))
    assert not measuring()
    assert not (runs / FOLDER).exists()
