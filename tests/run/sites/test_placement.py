"""Tests that commands measure at the place of the study or the command line, with a fake executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorameter.records import store
from tests.run.sites.wholeness import sites_of_whole


def sites_of(run):
    return {record.site for record in run.records}


def document(output):
    """Return the JSON document that a command printed."""
    return json.JSONDecoder().raw_decode(output[output.index("{") :])[0]


def break_off(run, *, keep):
    """Truncate the run to its first `keep` lines."""
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (run.path / "trials.jsonl").write_text("".join(lines[:keep]))
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))


def test_a_study_names_its_sites_and_a_run_is_resumed_there(placed, run):
    """The study alone sets the sites, and the manifest records them."""
    _, first, _ = run("run", placed('sites = ["0", "1"]'))
    assert sites_of_whole(first) == {"cpus-0", "cpus-1"}
    assert first.manifest.study["protocol"]["sites"] == ["0", "1"]
    break_off(first, keep=1)
    _, again, _ = run("run", "--resume", first.manifest.run)
    assert sites_of_whole(again) == {"cpus-0", "cpus-1"}


def test_a_slower_site_is_named_in_the_report(placed, run, pretended, monkeypatch):
    """The third of three sites is slower by half."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6})
    pretended(slow=[("6", "", 1.5)])
    _, last, output = run("run", placed('sites = ["0", "1", "2"]'))
    assert sites_of(last) == {"cpus-0", "cpus-1", "cpus-2"}
    for text in (output, run("report", last.manifest.run)[2]):
        assert "site cpus-2 is 50% slower than the median of its like" in text
    assert [notice["code"] for notice in document(run("report", last.manifest.run, "--json")[2])["notices"]].count(
        "node-mismatch"
    ) == 1


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
    break_off(first, keep=1)
    code, again, output = run("ab", "--resume", first.manifest.run)
    assert code in (0, 3), output
    assert sites_of_whole(again) == {"cpus-0", "cpus-1"}


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
    pretended(peft={"5": "0.0.1"}, turn_s=1.0)
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
    study = placed('sites = ["0", "1"]', replicates=6)
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
