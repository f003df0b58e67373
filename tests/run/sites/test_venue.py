"""Commands measure where the study or the command line says, with an executor that only pretends."""

from __future__ import annotations

import argparse
import json
import os

import pytest

from harness.run.sites.venue import Venue


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
    assert sites_of(first) == {"cpus-0", "cpus-1"}
    assert first.manifest.study["protocol"]["sites"] == ["0", "1"]
    break_off(first, keep=1)
    _, again, _ = run("run", "--resume", first.manifest.run, meeting=2)
    assert sites_of(again) == {"cpus-0", "cpus-1"}
    assert {record.status for record in again.records} == {"ok"}


def test_the_command_line_wins_and_another_place_goes_on(placed, run):
    """One device in place of two sites, and two in place of one."""
    _, first, _ = run("run", placed('sites = ["0", "1"]'), "--on", "here")
    assert sites_of(first) == {""}
    assert "sites" not in first.manifest.study["protocol"]
    break_off(first, keep=1)
    _, again, _ = run("run", "--resume", first.manifest.run, "--sites", "0,1", meeting=2)
    assert sites_of(again) == {"cpus-0", "cpus-1"}
    assert {record.status for record in again.records} == {"ok"}


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
        "site-unlike"
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


def test_sites_of_a_cpu_share_its_memory(pretended):
    """What is free is divided by those who measure at once."""
    from harness.run.sites.local import local_sites

    grounds = local_sites(("0", "1"), pretended.MACHINE)
    assert Venue(grounds=grounds).free_bytes == Venue().free_bytes // 2
    assert not Venue(grounds=grounds[:1]).is_spread


def test_both_sides_of_an_ab_stand_on_each_site(placed, run, pretended, two_pythons):
    """Base, control and candidate of a replicate on one, each in the interpreter of its side and on the CPUs of its
    site; the pairs are within a site."""
    sides = ("--base", "/a/python", "--candidate", "/b/python")
    words = ("--sites", "0,1", "--variant", "small", "--phase", "train", "--json")
    code, last, said = run("ab", placed(""), *sides, *words, meeting=2)
    assert code in (0, 3), said
    assert sites_of(last) == {"cpus-0", "cpus-1"}
    of_one = {}
    for record in last.records:
        of_one.setdefault(record.replicate, set()).add(record.site)
    assert all(len(sites) == 1 for sites in of_one.values())
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
    assert sites_of(again) == {"cpus-0", "cpus-1"}
    assert {record.status for record in again.records} == {"ok"}
    assert len(again.records) == len(first.records)


def test_a_calibration_takes_sites_of_this_machine_and_no_cluster(placed, run):
    """It says what the machine that it is started on can see."""
    words = ("--replicates", "6", "--inject-rows", "8")
    _, last, _ = run("calibrate", placed(""), "--sites", "0,1", *words, meeting=2)
    assert sites_of(last) == {"cpus-0", "cpus-1"}
    code, _, said = run("calibrate", placed('on = "slurm"'), *words)
    assert code == 2
    assert "on = 'slurm': a calibration is of the machine that it is started on" in said


def test_commands_of_one_device_measure_on_one(placed, pretended):
    """Whatever the study says."""
    from harness.commands.ab import read_study

    names = ("effort", "replicates", "model", "data", "max_minutes")
    options = argparse.Namespace(**dict.fromkeys(names), allow_disturbed=False, study=str(placed('sites = ["0", "1"]')))
    assert read_study(options, "cpu").protocol.place.is_plain
