"""Tests that commands measure at the place of the study or the command line, with a fake executor.

Tests of the sites of this machine: its GPUs, or disjoint shares of its CPUs.

Tests of different sites: each has its share of the replicates, is judged alone, and is never pooled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorameter.errors import UsageError
from lorameter.machine.nvml import VisibleGpu
from lorameter.machine.reading import Reading, missing_reading
from lorameter.records import store
from lorameter.run.sites import gpus
from lorameter.run.sites.gpus import local_sites
from lorameter.studies.study_file import read_study
from lorameter.verdicts.ab import attribute_difference, build_report
from lorameter.verdicts.validity import run_validity
from tests.run.sites.conftest import sites_of_whole


def sites_of(run):
    return {record.site for record in run.records}


def document(output):
    """Return the JSON document that a command printed."""
    return json.JSONDecoder().raw_decode(output[output.index("{") :])[0]


def truncate(run, *, keep):
    """Truncate the run to its first `keep` lines."""
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (run.path / "trials.jsonl").write_text("".join(lines[:keep]))
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))


def test_a_study_names_its_sites(placed, run):
    """The study alone sets the sites, and the manifest records them."""
    _, first, _ = run("run", placed('sites = ["0", "1"]'))
    assert sites_of_whole(first) == {"cpus-0", "cpus-1"}
    assert first.manifest.study["protocol"]["sites"] == ["0", "1"]


def test_a_slower_site_is_named_in_the_report(placed, run, pretended, monkeypatch):
    """The third of three sites is slower by half."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6})
    pretended(slow=[("6", "", 1.5)])
    _, last, output = run("run", placed('sites = ["0", "1", "2"]', replicates=3))
    assert sites_of(last) == {"cpus-0", "cpus-1", "cpus-2"}
    for text in (output, run("report", last.manifest.run)[2]):
        assert "cpus-2 +31" in text


def test_an_invalid_place_is_refused_before_anything_is_created(placed, run):
    """The error names file and key, or the option, and nothing is created."""
    code, last, output = run("run", placed('on = "slurm:nodes=2"'))
    assert (code, last) == (2, None)
    assert "small.toml, [protocol]: on = 'slurm:nodes=2': 'nodes' is not known" in output
    code, last, output = run("run", placed(""), "--sites", "0,x")
    assert (code, last) == (2, None)
    assert "sites = '0,x': numbers" in output


def test_both_sides_of_an_ab_are_measured_on_each_site(placed, run):
    """Base, control and candidate of a replicate run on one site, also after a resume, so that pairs are within a
    site."""
    sides = ("--base", sys.executable, "--candidate", sys.executable)
    code, first, output = run(
        "ab",
        placed('sites = ["0", "1"]'),
        *sides,
        "--variant",
        "small",
        "--phase",
        "train",
        "--replicates",
        "2",
        "--json",
    )
    assert code in (0, 3), output
    assert sites_of_whole(first) == {"cpus-0", "cpus-1"}
    for record in first.records:
        arm = record.side if record.role == "variant" else "control"
        assert (first.path / record.log).read_text() == f"{arm} {'45'[int(record.site[-1])]} {sys.executable}\n"
    assert first.manifest.sides["candidate"]["kind"] == "interpreter"
    (comparison,) = (one for one in document(output)["comparisons"] if one["metric"] == "step_time_s")
    assert comparison["ratio"] == pytest.approx(1.0)
    truncate(first, keep=1)
    code, resumed, output = run("ab", "--resume", first.manifest.run)
    assert code in (0, 3), output
    assert sites_of_whole(resumed) == {"cpus-0", "cpus-1"}


def test_a_calibration_on_a_cluster_is_refused(placed, run):
    """A calibration is of the machine on which it starts."""
    code, _, output = run("calibrate", placed('on = "slurm"'), "--replicates", "6", "--inject-rows", "8")
    assert code == 2
    assert "on = 'slurm': a calibration is of the machine that it is started on" in output


@pytest.mark.parametrize(("lost", "code"), [(["5"], 0), (["4", "5"], 4)])
def test_a_site_that_loses_its_jobs_leaves_its_replicates_to_another(placed, run, pretended, lost, code):
    """A notice gives the reason; without another site the remaining replicates are not run."""
    pretended(lost=lost, turn_s=0.2)
    ended, last, output = run("run", placed('sites = ["0", "1"]'))
    assert ended == code, output
    assert "its zygote is gone" in output
    if code == 0:
        assert sites_of_whole(last) == {"cpus-0"}
        assert {notice.code for notice in last.manifest.notices} >= {"site-lost"}
    else:
        assert {record.status for record in last.records} <= {"interrupted", "not_run"}


def test_a_stop_ends_the_trials_under_way_on_all_sites(placed, run, pretended, tmp_path):
    """Running trials are interrupted, and the others are not run."""
    pretended(hangs=True)

    def stop():
        while len(list(tmp_path.glob("runs/*/jobs/*/*/manifest.json"))) < 2:
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, last, output = run("run", placed('sites = ["0", "1"]'))
    assert (code, last.manifest.status) == (4, "interrupted"), output
    states = [(record.status, record.site) for record in last.records]
    assert {site for status, site in states if status == "interrupted"} == {"cpus-0", "cpus-1"}
    assert {status for status, site in states if not site} == {"not_run"}
    assert not (last.path / "jobs").exists()


def test_a_site_that_differs_from_the_first_ends_the_run(placed, run, pretended):
    """The error names the site and the difference; the run keeps none of its records, also when it is resumed."""
    pretended(peft={"5": "0.0.1"}, turn_s=0.3)
    code, last, output = run("run", placed('sites = ["0", "1"]'))
    assert code == 4
    assert "libraries.peft is '" in output
    assert "is unlike the first" in output
    unlike = output.partition("site ")[2].partition(" is unlike")[0]
    assert unlike in ("cpus-0", "cpus-1")
    assert unlike not in {record.site for record in last.records}


def test_results_of_a_killed_processs_jobs_are_kept(placed, pretended, run, tmp_path, monkeypatch):
    """Resuming the run merges the results of the jobs and measures the rest."""
    pretended(turn_s=0.5)
    study = placed('sites = ["0", "1"]', replicates=3)
    runs = tmp_path / "runs"
    words = [sys.executable, "-m", "lorameter.cli", "run", str(study)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], *filter(None, sys.path)]))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 100
        while not list(runs.glob("*/manifest.json")):
            assert time.monotonic() < deadline
            assert killed.poll() is None
            time.sleep(0.05)
        killed.kill()
    pretended()
    (path,) = runs.iterdir()
    before = {record.trial for record in store.read_run(str(path), runs).records}
    code, last, output = run("run", "--resume", path.name)
    assert code == 0, output
    sites_of_whole(last)
    assert before <= {record.trial for record in last.records}
    assert not (path / "jobs").exists()


def test_a_site_of_two_ranks_uses_the_cpus_of_both_shares(placed, run):
    """Such a site uses the CPUs of both shares; a site with a single share is refused before anything is started."""
    study = placed("")
    study.write_text(study.read_text().replace("[workload]", '[workload]\nranks = 2\nstrategy = "ddp"'))
    code, last, output = run("run", study, "--sites", "0,1")
    assert (code, last) == (2, None)
    assert "has ranks = 2. Write 0+1 for a site, 0+1,2+3 for two" in output
    code, last, output = run("run", study, "--sites", "0+1")
    assert {record.status for record in last.records} == {"ok"}, output
    assert (last.path / last.records[0].log).read_text().strip() == "4,5"


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch):
    """Replace the machine's CPUs by four, each a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr(gpus, "physical_cores", lambda cpus: [(cpu,) for cpu in sorted(cpus)])


def show_gpus(monkeypatch, *names, limits=(700.0,) * 4, entries=range(4), boards=None):
    """Replace the visible GPUs."""
    found = tuple(
        VisibleGpu(
            entry=entry, board=Reading(value=str(entry) if boards is None else boards[number]),
            name=missing_reading("it is gone") if name is None else Reading(value=name),
            power_limit_w=missing_reading("not reported") if limit is None else Reading(value=limit),
        )
        for number, (entry, name, limit) in enumerate(zip(entries, names, limits, strict=False))
    )  # fmt: skip

    def visible(environment=None):
        named = (environment or {}).get("CUDA_VISIBLE_DEVICES")
        by_entry = {str(card.entry): card for card in found}
        return Reading(value=found if named is None else tuple(by_entry[entry] for entry in named.split(",")))

    monkeypatch.setattr(gpus, "visible_gpus", visible)


@pytest.mark.parametrize("entries", [(2, 3), ("GPU-aaaa", "GPU-bbbb")])
def test_sites_of_a_gpu_machine_are_its_visible_gpus(machine, monkeypatch, entries):
    """Sites use CUDA's numbers; each site sees its own GPU, by its name in CUDA_VISIBLE_DEVICES."""
    show_gpus(monkeypatch, "H100", "H100", entries=entries)
    there = dataclasses.replace(machine, device="cuda")
    sites = local_sites(("0", "1"), there)
    assert list(sites) == ["gpu-0", "gpu-1"]
    assert [site.environment["CUDA_VISIBLE_DEVICES"] for site in sites.values()] == [str(entry) for entry in entries]
    assert list(local_sites(("1",), there)) == ["gpu-1"]


@pytest.mark.parametrize(
    ("names", "limits", "words"),
    [
        (("H100", "H100"), (700.0, 700.0), r"GPU 2: 2 are visible"),
        (("H100", "H100", "A100"), (700.0, 700.0, 400.0), r"different kinds \(A100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, 400.0), r"different kinds \(H100 at 400 W, H100 at 700 W\)"),
        (("H100", "H100", "H100"), (700.0, 700.0, None), r"different kinds \(H100, H100 at 700 W\)"),
        (("H100", "H100", None), (700.0, 700.0, 700.0), r"GPU 2 cannot be identified: it is gone"),
    ],
)
def test_missing_and_different_gpus_are_refused(machine, monkeypatch, names, limits, words):
    """Missing GPUs, different GPUs and GPUs with different or unknown power limits are refused."""
    show_gpus(monkeypatch, *names, limits=limits)
    with pytest.raises(UsageError, match=words):
        local_sites(("0", "2"), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize("mixed", [False, True])
def test_sites_on_two_mig_instances_of_one_gpu_are_refused(machine, monkeypatch, mixed):
    """Measurements on two MIG instances of one GPU would disturb each other; instances of different GPUs are
    accepted."""
    show_gpus(monkeypatch, *["1g.10gb"] * 3, entries=("MIG-a", "MIG-b", "MIG-c"), boards=("one", "one", "two"))
    there = dataclasses.replace(machine, device="cuda")
    with pytest.raises(UsageError, match="MIG-a and MIG-b are parts of one GPU"):
        local_sites(("0", "1", "2"), there, mixed=mixed)
    sites = local_sites(("0", "2"), there)
    assert [site.environment["CUDA_VISIBLE_DEVICES"] for site in sites.values()] == ["MIG-a", "MIG-c"]


def test_each_rank_of_a_site_has_a_gpu_or_a_share_of_the_cpus(machine, monkeypatch):
    """The site lists its GPUs by CUDA's names and locks each of them."""
    ((name, site),) = local_sites(("0+1",), machine).items()
    assert (name, site.environment) == ("cpus-0-1", {"LORAMETER_CPUS": "4,5,6,7"})
    show_gpus(monkeypatch, "H100", "H100", "H100", "H100", "A100", limits=(700.0,) * 5, entries=(1, 2, 3, 0, 4))
    there = dataclasses.replace(machine, device="cuda")
    sites = local_sites(("0+1", "2+3"), there)
    assert list(sites) == ["gpu-0-1", "gpu-2-3"]
    assert [site.environment for site in sites.values()] == [
        {"CUDA_VISIBLE_DEVICES": "1,2", "LORAMETER_CPUS": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "3,0", "LORAMETER_CPUS": "6,7"},
    ]
    monkeypatch.setattr(gpus, "open_executor", lambda name=None, *, host: host.environment["CUDA_VISIBLE_DEVICES"])
    taken = [gpus.executors_of_ranks(site, 2) for site in sites.values()]
    assert taken == [["1", "2"], ["3", "0"]]
    with pytest.raises(
        UsageError, match=r"ranks of one trial would be on GPUs of different kinds \(A100 at 700 W, H100"
    ):
        local_sites(("3+4",), there, mixed=True)


SITES = ("--sites", "0,1", "--mixed")
SIDES = ("--base", sys.executable, "--candidate", sys.executable, "--phase", "train", "--variant", "small")
SECOND = "5"
"""The CPUs of the second site."""


@pytest.fixture
def run_on_two_sites(placed, run, pretended):
    """A function that measures four replicates on two sites, the second of which is slow for some trials."""

    def measure(command, *words, slow=()):
        pretended(slow=slow)
        return run(command, placed("", replicates=4), *SITES, *words)

    return measure


def test_ratios_are_those_of_each_site(run_on_two_sites, run, tmp_path):
    """Each site has the same number of replicates however fast it is. The mean of both ratios, 1.22 here, describes
    neither site, so that commands which would pool sites refuse with each site and its machine."""
    _, last, _ = run_on_two_sites("run", slow=[(SECOND, "large", 1.5)])
    name = last.manifest.run
    assert {record.machine for record in last.records} == {"Test CPU"}
    assert last.manifest.sites == ("cpus-0", "cpus-1")
    code, _, output = run("report", name, "--json")
    tables = document(output)["tables"]
    assert code == 0
    assert [(table["site"], table["title"]) for table in tables] == [
        ("cpus-0", "Training on cpus-0"), ("cpus-1", "Training on cpus-1"),
    ]  # fmt: skip
    ratios = [{row["name"]: row["ratio"] for row in table["rows"]}["large"] for table in tables]
    assert [ratio["ratio"] for ratio in ratios] == pytest.approx([1.0, 1.5])
    assert [ratio["replicates"] for ratio in ratios] == [2, 2]
    assert "the sites are different machines (cpus-0: Test CPU; cpus-1: Test CPU)" in run("report", name)[2]
    assert run("report", name, "--html", tmp_path / "page.html")[0] == 0
    for words in (
        ("compare", name, name), ("gate", name, name), ("accept", name), ("claims", name), ("export", name),
    ):  # fmt: skip
        code, _, output = run(*words)
        assert code == 2, words
        assert "different machines" in output or "claims nothing" in output

    lines = (last.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (last.path / "trials.jsonl").write_text(lines[0])
    for words, refusal in (
        (("--on", "here"), "mixed: there is only one site"), (("--mixed",), "--mixed cannot be given"),
    ):  # fmt: skip
        code, _, output = run("run", "--resume", name, *words)
        assert (code, refusal in output) == (2, True), output
    code, resumed, _ = run("run", "--resume", name)
    assert {record.machine for record in resumed.records} == {"Test CPU"}
    assert {record.status for record in resumed.records} == {"ok"}


def test_a_control_that_fails_on_one_site_fails_the_run(run_on_two_sites):
    """The other site does not matter."""
    code, last, _ = run_on_two_sites("run", slow=[(SECOND, "control", 1.5)])
    validity = run_validity(last, read_study(last))
    assert code == 4
    assert any("regressed in phase 'train on cpus-1'" in fault.message for fault in validity.faults)


def test_a_gate_of_an_ab_fails_where_one_site_regresses(run_on_two_sites, run):
    """The verdict names the site, also in the stored run."""
    code, last, output = run_on_two_sites("ab", *SIDES, slow=[(SECOND, "candidate", 1.5)])
    assert code == 1, output
    rows = {row.site: row for row in build_report(last).comparisons if row.metric == "step_time_s"}
    assert {site: row.verdict for site, row in rows.items()} == {"cpus-0": "equivalent", "cpus-1": "regressed"}
    assert {part.variant for part in attribute_difference(last).parts} == {"small on cpus-0", "small on cpus-1"}
    code, _, output = run("gate", last.manifest.run)
    assert code == 1
    assert "small on cpus-1" in output
