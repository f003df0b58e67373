"""Tests of replicates on a Ray cluster of three real nodes on this machine, whose nodes and driver are killed during
real trials (make proof-long), and of how a cluster's description becomes sites."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.run.sites.ray import shares_of
from tests.run.sites.wholeness import sites_of_whole

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
    assert [(one.site, one.cpus, one.gpus) for one in shares_of(nodes)] == [("a", 8.0, 0), ("b", 4.0, 0)]


def test_each_gpu_of_a_cluster_is_a_site():
    """Each GPU is a site with its share of the node's CPUs; a head without a GPU is not a site."""
    shares = shares_of([node("head", 1, CPU=4.0), node("a", 2, CPU=9.0, GPU=2.0)])
    assert [(one.site, one.cpus, one.gpus, one.share, one.shares) for one in shares] == [
        ("a-gpu-0", 4.0, 1, 0, 2),
        ("a-gpu-1", 4.0, 1, 1, 2),
    ]


def test_a_site_of_several_ranks_has_a_gpu_for_each():
    """The GPUs of a site are on one node; a node with fewer is not a site, and a cluster without a large enough node is
    refused."""
    shares = shares_of([node("small", 1, CPU=4.0, GPU=1.0), node("a", 2, CPU=9.0, GPU=5.0)], ranks=2)
    assert [(one.site, one.cpus, one.gpus, one.share, one.shares) for one in shares] == [
        ("a-gpu-0-1", 4.0, 2, 0, 2),
        ("a-gpu-2-3", 4.0, 2, 1, 2),
    ]
    with pytest.raises(UsageError, match=r"ranks = 2: no node of the Ray cluster has so many GPUs"):
        shares_of([node("small", 1, CPU=4.0, GPU=1.0)], ranks=2)
    assert [one.site for one in shares_of([node("a", 1, CPU=2.0)], ranks=2)] == ["a"]


def test_nodes_are_chosen_by_name_and_one_that_is_not_there_is_refused():
    """The error lists the existing nodes."""
    nodes = [node("a", 1, CPU=1.0), node("b", 2, CPU=1.0)]
    assert [one.site for one in shares_of(nodes, ["b"])] == ["b"]
    with pytest.raises(UsageError, match=r"no node 'c'. It has a, b"):
        shares_of(nodes, ["a", "c"])
    with pytest.raises(UsageError, match="no node with a CPU"):
        shares_of([node("a", 1)])


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
def test_a_node_that_is_killed_loses_its_replicate_under_way_and_no_other(nodes, study, tmp_path):
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
