"""Tests of replicates in SLURM jobs; scripts that start local processes replace SLURM's commands.

Tests of replicates on a Ray cluster of three real nodes on this machine, whose nodes and driver are killed during
real trials (make proof-long), and of how a cluster's description becomes sites.

Attacks on a folder of runs that a group may write, each by a real process with another user id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.run.sites import slurm
from lorameter.run.sites.slurm import divide_nodes, sbatch_options
from lorameter.studies.protocol import read_slurm
from tests.run.sites.conftest import sites_of_whole

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
    code, last, output = run("run", placed('on = "slurm:sites=2,partition=p"'), "--if-busy", "share")
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
    code, last, output = run("run", placed('on = "slurm"'))
    assert code == 0, output
    assert {record.replicate for record in last.records} == {0, 1}
    sites_of_whole(last)
    (notice,) = (one for one in last.manifest.notices if one.code == "site-lost")
    assert "cancelled" in notice.message.lower()


def test_options_of_sbatch_are_passed_on():
    """A job without a GPU takes a whole node, unless `exclusive` says otherwise."""
    on = "slurm:partition=p,nodelist=n[1-2],gres=gpu:1,gpus_per_node=1,time=7,comment=two words,exclusive=user"
    assert sbatch_options(read_slurm(on)[1])[4:] == [
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
    assert "on = 'slurm': no sbatch on this machine" in " ".join(capsys.readouterr().err.split())
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


GROUP, OTHER = 60000, 1
"""The shared group, and the user id of its other member."""
FORGE = """if "/jobs/" in log:
    folder, forged = os.path.dirname(log), {forged!r}
    with open(forged, "w") as file:  # a study and its trials are no secret
        file.write(open(folder + "/order.json").read().replace({python!r}, {program!r}))
    os.chmod(forged, 0o644)
    subprocess.run(["/bin/sh", "-c", {attack!r}, "sh", folder, forged], user={user}, group={group}, extra_groups=[])
"""
JOBS = 'umask 0; cd "$1"/../.. && mv jobs old && mkdir -p jobs/0000 && cp "$2" jobs/0000/order.json'
RUN = 'umask 0; cd "$1"/../../.. && run=$(basename "$(dirname "$(dirname "$1")")") && mv "$run" old'
IN_RUN = f'{RUN} && mkdir -p "$run"/jobs/0000 && cp "$2" "$run"/jobs/0000/order.json'
LINK = f'{RUN} && mkdir -p own/jobs/0000 && cp "$2" own/jobs/0000/order.json && ln -s own "$run"'


@pytest.fixture
def shared(monkeypatch):
    """A folder of runs that a group may write, in which new files are also the group's."""
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, -1, GROUP)
    folder.chmod(0o2775)
    monkeypatch.setenv("LORAMETER_RUNS", str(folder))
    umask = os.umask(0o002)
    yield folder
    os.umask(umask)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
@pytest.mark.parametrize(("attack", "replaced"), [(JOBS, False), (IN_RUN, True), (LINK, True)])
def test_an_order_of_another_user_is_not_executed(placed, run, queue, shared, tmp_path, attack, replaced):
    """A run whose folder is replaced ends with one sentence; with any umask, nobody else replaces a folder in it."""
    program, ran = shared / "python", shared / "ran"
    program.write_text(f'#!/bin/sh\nid -u > {ran}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    forge = FORGE.format(
        forged=str(shared / "forged"), python=sys.executable, program=str(program), attack=attack, user=OTHER,
        group=GROUP,
    )  # fmt: skip
    sbatch = SBATCH.replace("number = len", f"{forge}number = len", 1).replace("{python}", sys.executable)
    (tmp_path / "bin" / "sbatch").write_text(sbatch.replace("{queue!r}", repr(str(queue))))
    sides = ("--base", sys.executable, "--candidate", sys.executable)
    words = ("ab", placed('on = "slurm"'), *sides, "--phase", "train", "--replicates", "2", "--json")
    code, _, output = run(*words)
    assert not ran.exists(), f"as user {ran.read_text()}"
    assert code in ((2,) if replaced else (0, 3)), output
    assert ("it is not the order that was submitted" in output) == replaced


ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(3600)


def node(name, number, *, alive=True, **resources):
    """Return a node as Ray lists it."""
    return {
        "NodeID": f"{number:056x}", "Alive": alive, "NodeName": name, "NodeManagerHostname": f"host{number}",
        "NodeManagerAddress": "10.0.0.1", "Resources": resources,
    }  # fmt: skip


def test_a_site_is_a_node_with_cpus_and_all_of_them_are_reserved():
    """Sites are ordered by name; a dead node and a node without a CPU are not sites."""
    nodes = [node("b", 1, CPU=4.0), node("a", 2, CPU=8.0), node("c", 3, CPU=4.0, alive=False), node("d", 4)]
    assert [(one.site, one.cpus, one.gpus) for one in divide_nodes(nodes)] == [("a", 8.0, 0), ("b", 4.0, 0)]


def test_each_gpu_of_a_cluster_is_a_site():
    """Each GPU is a site with its share of the node's CPUs; a head without a GPU is not a site."""
    shares = divide_nodes([node("head", 1, CPU=4.0), node("a", 2, CPU=9.0, GPU=2.0)])
    assert [(one.site, one.cpus, one.gpus, one.share, one.shares) for one in shares] == [
        ("a-gpu-0", 4.0, 1, 0, 2),
        ("a-gpu-1", 4.0, 1, 1, 2),
    ]


def test_a_site_of_several_ranks_has_a_gpu_for_each():
    """The GPUs of a site are on one node; a node with fewer is not a site, and a cluster without a large enough node is
    refused."""
    shares = divide_nodes([node("small", 1, CPU=4.0, GPU=1.0), node("a", 2, CPU=9.0, GPU=5.0)], ranks=2)
    assert [(one.site, one.cpus, one.gpus, one.share, one.shares) for one in shares] == [
        ("a-gpu-0-1", 4.0, 2, 0, 2),
        ("a-gpu-2-3", 4.0, 2, 1, 2),
    ]
    with pytest.raises(UsageError, match=r"ranks = 2: no node of the Ray cluster has so many GPUs"):
        divide_nodes([node("small", 1, CPU=4.0, GPU=1.0)], ranks=2)
    assert [one.site for one in divide_nodes([node("a", 1, CPU=2.0)], ranks=2)] == ["a"]


def test_nodes_are_chosen_by_name_and_one_that_is_not_there_is_refused():
    """The error lists the existing nodes."""
    nodes = [node("a", 1, CPU=1.0), node("b", 2, CPU=1.0)]
    assert [one.site for one in divide_nodes(nodes, ["b"])] == ["b"]
    with pytest.raises(UsageError, match=r"no node 'c'. It has a, b"):
        divide_nodes(nodes, ["a", "c"])
    with pytest.raises(UsageError, match="no node with a CPU"):
        divide_nodes([node("a", 1)])


@pytest.mark.parametrize(
    ("on", "words"), [("kubernetes", "not known. Use here, ray, ray://HOST:PORT"), ("ray", r"Install lorameter\[ray\]")]
)
def test_an_unusable_place_is_refused_with_the_remedy(on, words, capsys, monkeypatch):
    """The error names the option and the remedy, before anything else is read."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "training-step", "--on", on]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert words.replace("\\", "") in output
    assert f"on = {on!r}" in output


class Nodes:
    """A Ray cluster on this machine."""

    def __init__(self, cluster):
        self.cluster, self.by_name = cluster, {}

    def add(self, name, **env_vars):
        options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_name": name}
        self.by_name[name] = self.cluster.add_node(**options, env_vars=env_vars)

    def kill(self, name):
        """Kill a node at once, as in a power failure."""
        with contextlib.redirect_stderr(None):
            self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)


@contextlib.contextmanager
def three_nodes(**head):
    """Start the nodes alpha (the head), beta and gamma."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install lorameter[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "PYTHONPATH",
            os.pathsep.join(filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH")])),
        )
        from ray.cluster_utils import Cluster

        head |= {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False, "node_name": "alpha"}
        cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        try:
            made = Nodes(cluster)
            made.add("beta")
            made.add("gamma")
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield made
        finally:
            cluster.shutdown()


@pytest.fixture
def nodes():
    """Three nodes on this machine."""
    with three_nodes() as made:
        yield made


@pytest.mark.selftest
def test_a_killed_node_loses_only_its_replicate_under_way(nodes, study, tmp_path):
    """Completed replicates are kept, the interrupted one is measured elsewhere from the start, and a notice names the
    node."""
    runs, begun = tmp_path / "runs", {}
    words = ["run", str(study(replicates=5, turns=10)), "--on", "ray", "--runs-dir", str(runs), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "lorameter.cli", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as driver:
        while not begun:
            assert driver.poll() is None, "the driver has ended"
            time.sleep(0.1)
            lines = [line for path in runs.glob("*/trials.jsonl") for line in path.read_text().splitlines()]
            begun = {record["trial"]: record["started_unix_s"] for record in map(json.loads, lines)}
        nodes.kill("gamma")
        driver.communicate(timeout=1800)
    assert driver.returncode == 0
    (path,) = (one for one in runs.iterdir() if one.is_dir())
    ended = store.read_run(str(path), runs)
    sites_of_whole(ended)
    assert begun.items() <= {record.trial: record.started_unix_s for record in ended.records}.items()
    assert any(notice.code == "site-lost" and "site gamma" in notice.message for notice in ended.manifest.notices)
