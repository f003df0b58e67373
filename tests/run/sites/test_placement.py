"""Commands measure where the study or the command line says, with an executor that only pretends."""

from __future__ import annotations

import collections
import json
import os
import signal
import threading

import pytest

from lorameter.errors import InvalidRunError
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.executors import WorkerLostError
from tests.run.sites.wholeness import sites_of_whole


def sites_of(run):
    return {record.site for record in run.records}


def document(said):
    """The JSON document that a command has printed."""
    return json.JSONDecoder().raw_decode(said[said.index("{") :])[0]


def break_off(run, *, keep):
    """The run as if it had ended after its first `keep` lines."""
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (run.path / "trials.jsonl").write_text("".join(lines[:keep]))
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))


def test_a_study_says_its_sites_and_a_run_is_gone_on_with_there(placed, run):
    """Without a word on the command line; the manifest holds them."""
    _, first, _ = run("run", placed('sites = ["0", "1"]'), meeting=2)
    assert sites_of_whole(first) == {"cpus-0", "cpus-1"}
    assert first.manifest.study["protocol"]["sites"] == ["0", "1"]
    break_off(first, keep=1)
    _, again, _ = run("run", "--resume", first.manifest.run, meeting=2)
    assert sites_of_whole(again) == {"cpus-0", "cpus-1"}


def test_the_command_line_wins_and_another_place_goes_on(placed, run):
    """One device in place of two sites, and two in place of one."""
    _, first, _ = run("run", placed('sites = ["0", "1"]'), "--on", "here")
    assert sites_of(first) == {""}
    assert "sites" not in first.manifest.study["protocol"]
    break_off(first, keep=1)
    _, again, _ = run("run", "--resume", first.manifest.run, "--sites", "0,1", meeting=2)
    assert sites_of_whole(again) == {"cpus-0", "cpus-1"}


def test_how_sites_differ_is_said_by_whatever_shows_the_run(placed, run, pretended):
    """The command that measures, the report, and its document: with what each site is, and by how much."""
    pretended.SLOW[("cpus-1", "")] = 1.08
    _, last, told = run("run", placed('sites = ["0", "1"]', replicates=4), "--json", meeting=2)
    assert "differ by 5.4%" in told
    for words in ((), ("--json",)):
        _, _, said = run("report", last.manifest.run, *words)
        assert "replicates were spread over 2 sites, which differ by 5.4%" in said
        assert "cpus-0 -3.8%, cpus-1 +3.9%" in said
        assert "site cpus-" not in said  # of two nobody can say which is unlike its like


def test_a_site_that_is_unlike_its_like_is_named_in_the_report(placed, run, pretended, monkeypatch):
    """The third of three, which takes half as long again."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6})
    pretended.SLOW[("cpus-2", "")] = 1.5
    _, last, told = run("run", placed('sites = ["0", "1", "2"]'), meeting=3)
    assert sites_of(last) == {"cpus-0", "cpus-1", "cpus-2"}
    for said in (told, run("report", last.manifest.run)[2]):
        assert "site cpus-2 is 50% slower than the median of its like" in said
    assert [notice["code"] for notice in document(run("report", last.manifest.run, "--json")[2])["notices"]].count(
        "node-mismatch"
    ) == 1


def test_a_place_that_is_none_is_refused_before_anything_is_opened(placed, run, pretended):
    """By file and key, or by what the option says; nothing is made."""
    code, last, said = run("run", placed('on = "slurm:nodes=2"'))
    assert (code, last) == (2, None)
    assert "small.toml, [protocol]: on = 'slurm:nodes=2': 'nodes' is not known" in said
    code, last, said = run("run", placed(""), "--sites", "0,x")
    assert (code, last) == (2, None)
    assert "sites = '0,x': numbers" in said
    assert pretended.MADE == []


def test_a_dry_run_plans_for_the_sites_of_the_study(placed, run):
    """More than there are CPUs are refused; nothing is measured."""
    code, last, said = run("run", placed('sites = ["0", "1"]'), "--dry-run", "--json")
    assert (code, last) == (0, None)
    assert '"order"' in said
    code, last, said = run("run", placed('sites = ["0", "1", "2"]'), "--dry-run")
    assert (code, last) == (2, None)
    assert "3 sites and 2 CPUs" in said


def test_both_sides_of_an_ab_stand_on_each_site(placed, run, pretended, two_pythons):
    """Base, control and candidate of a replicate on one, each in the interpreter of its side and on the CPUs of its
    site; the pairs are within a site."""
    sides = ("--base", "/a/python", "--candidate", "/b/python")
    words = ("--sites", "0,1", "--variant", "small", "--phase", "train", "--json")
    code, last, said = run("ab", placed(""), *sides, *words, meeting=2)
    assert code in (0, 3), said
    assert sites_of_whole(last) == {"cpus-0", "cpus-1"}
    started = {one.label: one.host for one in pretended.MADE if hasattr(one, "folder")}
    assert set(started) == {f"{arm}-cpus-{n}" for arm in ("base", "control", "candidate") for n in (0, 1)}
    for label, host in started.items():
        assert host.python == ("/b/python" if label.startswith("candidate") else "/a/python")
        assert host.environment["LORAMETER_CPUS"] == ("4" if label.endswith("0") else "5")
    assert last.manifest.sides["candidate"]["facts"]["packages"] == {"python": "/b/python"}
    (comparison,) = (one for one in document(said)["comparisons"] if one["metric"] == "step_time_s")
    assert comparison["ratio"] == pytest.approx(1.0)


def test_an_ab_is_gone_on_with_on_its_sites(placed, run, two_pythons):
    """Its study says them, and the sides are put up again on each."""
    sides = ("--base", "/a/python", "--candidate", "/b/python")
    _, first, _ = run("ab", placed('sites = ["0", "1"]'), *sides, "--phase", "train", meeting=2)
    break_off(first, keep=1)
    _, again, _ = run("ab", "--resume", first.manifest.run, meeting=2)
    assert sites_of_whole(again) == {"cpus-0", "cpus-1"}


def test_a_calibration_takes_sites_of_this_machine_and_no_cluster(placed, run):
    """It says what the machine that it is started on can see."""
    words = ("--replicates", "6", "--inject-rows", "8")
    _, last, _ = run("calibrate", placed(""), "--sites", "0,1", *words, meeting=2)
    assert sites_of(last) == {"cpus-0", "cpus-1"}
    code, _, said = run("calibrate", placed('on = "slurm"'), *words)
    assert code == 2
    assert "on = 'slurm': a calibration is of the machine that it is started on" in said


@pytest.mark.parametrize(("lost", "code"), [("1", 0), ("01", 4)])
def test_a_lost_site_loses_the_replicate_under_way_and_no_other(placed, run, pretended, monkeypatch, lost, code):
    """Another site measures it, and a notice names the reason; without another site the rest is not run."""

    def launch(self):
        if self.label[-1] in lost:
            raise InvalidRunError("its zygote is gone")
        return self

    monkeypatch.setattr(pretended.Fake, "launch", launch)
    ended, last, said = run("run", placed('sites = ["0", "1"]'))
    assert ended == code, said
    assert "its zygote is gone" in said
    if code == 0:
        assert sites_of_whole(last) == {"cpus-0"}
        assert [notice.code for notice in last.manifest.notices].count("site-lost") == 1
    else:
        assert {record.status for record in last.records} <= {"interrupted", "not_run"}


def test_a_stop_ends_the_trials_under_way_on_all_sites(placed, run, pretended, monkeypatch):
    """They are interrupted and not crashed, although their processes were killed for it; the others are not run."""
    closed, both = collections.defaultdict(threading.Event), threading.Barrier(2)

    def turn(self, command, trial, timeout_s, **arguments):
        if command != "turn":
            return PartialRecord()
        if both.wait(30) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        assert closed[self.label].wait(30)
        raise WorkerLostError("crashed", Failure(phase="turn", kind="ProcessDied", message="killed"))

    monkeypatch.setattr(pretended.Fake, "ask", turn)
    monkeypatch.setattr(pretended.Fake, "close", lambda self: closed[self.label].set())
    code, last, _ = run("run", placed('sites = ["0", "1"]'))
    assert (code, last.manifest.status) == (4, "interrupted")
    states = [(record.status, record.site) for record in last.records]
    assert {site for status, site in states if status == "interrupted"} == {"cpus-0", "cpus-1"}
    assert {status for status, site in states if not site} == {"not_run"}
    assert "crashed" not in {status for status, _ in states}


def test_a_site_of_two_ranks_is_measured_on(placed, run, pretended):
    """On the CPUs of both; one with a single share is refused before anything is opened."""
    study = placed("")
    study.write_text(study.read_text().replace("[workload]", '[workload]\nranks = 2\nstrategy = "ddp"'))
    code, last, said = run("run", study, "--sites", "0,1")
    assert (code, last) == (2, None)
    assert "has ranks = 2. Write 0+1 for a site, 0+1,2+3 for two" in said
    assert not any(hasattr(one, "folder") for one in pretended.MADE)
    code, last, said = run("run", study, "--sites", "0+1")
    assert {record.status for record in last.records} == {"ok"}, said
    (started,) = (one for one in pretended.MADE if hasattr(one, "folder"))
    assert started.host.environment["LORAMETER_CPUS"] == "4,5"
