"""Replicates in jobs of a real SLURM: slurmctld and two slurmd on this machine, started without systemd, whose jobs are
cancelled and at the end of their time, and whose driver is killed, with real trials (make proof-long)."""

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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


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
    (path,) = (one for one in runs.iterdir() if one.is_dir() and not one.name.startswith("."))
    return store.read_run(str(path), runs)


def lines(runs):
    """What has been written so far."""
    return [json.loads(line) for path in runs.glob("*/trials.jsonl") for line in path.read_text().splitlines()]


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
    run(study(replicates=2), "--on", "slurm:sites=2,partition=main,time=30", "--if-busy", "share", runs=there)
    assert not said("squeue", "-h", "-t", "running,pending")
    run(study(replicates=2), runs=here)
    spread, local = only_run(there), only_run(here)
    assert [results_of(record) for record in spread.records] == [results_of(record) for record in local.records]
    assert spread.manifest.fingerprint == local.manifest.fingerprint
    assert spread.manifest.tokens == local.manifest.tokens
    assert sites_of_whole(spread) == {"n1", "n2"}


def test_a_job_that_is_cancelled_is_run_again(study, tmp_path):
    """What had ended stays, and a notice says that a job was lost."""
    runs = tmp_path / "runs"
    with driving(study(replicates=3, turns=8), "--on", "slurm", "--if-busy", "share", runs=runs) as driver:
        before = wait_for(lambda: {line["trial"]: line["started_unix_s"] for line in lines(runs)}, driver)
        name = wait_for(lambda: said("squeue", "-h", "-t", "running", "-o", "%i").strip(), driver)
        subprocess.run(["scancel", name], check=True)
        driver.wait(1800)
    assert driver.returncode == 0, runs.with_name("said").read_text()
    ended = only_run(runs)
    sites_of_whole(ended)
    assert before.items() <= {record.trial: record.started_unix_s for record in ended.records}.items()
    assert notices(ended, "site-lost")


def test_a_driver_that_is_killed_is_resumed(study, tmp_path):
    """What had been written is kept; its jobs are cancelled."""
    runs = tmp_path / "runs"
    with driving(study(replicates=3, turns=4), "--on", "slurm", "--if-busy", "share", runs=runs) as driver:
        wait_for(lambda: lines(runs) and measuring(), driver)
        driver.send_signal(signal.SIGKILL)
    before = {line["trial"]: line["started_unix_s"] for line in lines(runs)}
    run("--resume", only_run(runs).manifest.run, "--on", "slurm", "--if-busy", "share", runs=runs)
    ended = only_run(runs)
    sites_of_whole(ended)
    assert before.items() <= {one.trial: one.started_unix_s for one in ended.records}.items()
    wait_for(lambda: not said("squeue", "-h"))
    assert not measuring()
