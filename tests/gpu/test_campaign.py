"""Tests of the campaign: it resumes within the time of a call and reports the outcome of each step."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import campaign, loop
from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.loop import GRACE_S
from benchmarks.gpu.steps import STEPS, Step, build_command
from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.machine.provenance import probe_machine
from lorameter.run.plan import build_arms
from lorameter.studies.study_file import load_study, load_variant

ROOT = Path(__file__).parents[2]


def step(name, limit_s=100.0, **more):
    return Step(
        name=name, question="?", arguments=("-c", ""), expected_s=limit_s, limit_s=limit_s, skipped="all", **more
    )


def entry(name, outcome="done", took_s=10.0, **more):
    return Entry(
        step=name, outcome=outcome, code=0, took_s=took_s, begun_unix_s=0.0, gpu_uuid="u", harness="s",
        **({"device": "card"} | more),
    )  # fmt: skip


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


class Call:
    """A call of a given length on a clock that only steps advance; it records the steps that ran and their limits."""

    def __init__(self, steps, journal, left_s, took_s):
        self.ran = []
        self.left_s = left_s

        def run(chosen, limit_s):
            self.ran.append((chosen.name, limit_s))
            needed_s = took_s.get(chosen.name, 10.0)
            self.left_s -= min(needed_s, limit_s)
            return entry(chosen.name, "done" if needed_s <= limit_s else "stopped", min(needed_s, limit_s))

        loop.run_steps(steps, journal, left_s=lambda: self.left_s, run=run)

    @property
    def names(self):
        return [name for name, _ in self.ran]


def test_a_call_starts_only_steps_that_fit_in_its_time(journal, tmp_path):
    """A step that does not fit in the remaining time waits for the next call, and a shorter later step runs first."""
    steps = [step("a"), step("b"), step("long", 300), step("c", 50)]
    first = Call(steps, journal, 350, {"a": 90, "b": 100})
    assert first.names == ["a", "b", "c"]
    assert not loop.is_pending(steps[0], journal)
    again = Journal(tmp_path)
    assert Call(steps, again, 400, {}).names == ["long"]
    assert Call(steps, again, 400, {}).names == []


def test_a_run_that_can_be_resumed_takes_the_rest_of_each_call(journal):
    """A resumable run stops with the call, resumes in the next one, and ends when its total time is used."""
    sweep = step("sweep", 500, resume_command=("-c", ""), total_s=700)
    call = Call([sweep], journal, 300 + GRACE_S, {"sweep": 10_000})
    assert call.ran == [("sweep", 300)]
    assert loop.is_pending(sweep, journal)
    assert Call([sweep], journal, 1000, {"sweep": 10_000}).ran == [("sweep", 400)]
    assert not loop.is_pending(sweep, journal)
    assert Call([sweep], journal, 1000, {}).ran == []


def test_a_timed_out_step_starts_twice_and_a_failed_step_once(journal):
    """A step that reached its limit twice is not started again, and a failed step is repeated only by hand."""
    slow, broken = step("slow"), step("broken")
    journal.add(entry("broken", "failed"))
    assert not loop.is_pending(broken, journal)
    for left in (True, False):
        journal.add(entry("slow", "stopped", 100))
        assert loop.is_pending(slow, journal) is left
    journal.forget(["broken"])
    assert loop.is_pending(broken, journal)


def test_every_step_fits_in_a_call_of_ten_minutes():
    """The limit of each step plus the time to save, judge and write is at most ten minutes; names are unique."""
    for one in STEPS:
        assert one.min_start_s + GRACE_S + loop.REPORT_S < 570, one.name
        assert one.limit_s <= 570, one.name
        assert one.total_s >= one.limit_s or not one.resume_command, one.name
    names = [one.name for one in STEPS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rehearsing", [False, True], ids=["measured", "rehearsed"])
@pytest.mark.parametrize("chosen", STEPS, ids=lambda one: one.name)
def test_the_command_of_every_step_is_valid(chosen, rehearsing, tmp_path):
    """The options, studies, variants and files of each command exist, and no placeholder in braces is left."""
    words = build_command(chosen, python=sys.executable, state=tmp_path, rehearsing=rehearsing)
    assert not [word for word in words if "{" in word]
    check_words(words)
    if chosen.resume_command:
        check_words(build_command(chosen, python=sys.executable, state=tmp_path, resumed_run="some-run"))


@pytest.mark.parametrize("chosen", [one for one in STEPS if "--dry-run" in one.rehearsal], ids=lambda one: one.name)
def test_studies_can_be_planned_without_a_gpu(chosen, tmp_path, capsys):
    """Every study of the campaign can be planned on a CPU, as its rehearsal requires."""
    words = build_command(chosen, python=sys.executable, state=tmp_path, rehearsing=True)
    assert main(words[3:]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)


def check_words(words):
    assert words[1] == "-m"
    if words[2] == "lorameter.cli":
        options = build_parser().parse_args(words[3:])
        assert words[3] == "wrap" or options.json
        if study := getattr(options, "study", None):
            build_arms(load_study(study, profile=getattr(options, "profile", None)), getattr(options, "variant", ()))
        elif variant := getattr(options, "variant", None):
            load_variant(variant, profile=options.profile)
    else:
        assert words[2] == "pytest"
        assert [word for word in words if word.startswith("tests/")]
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))


def test_every_file_with_gpu_tests_belongs_to_a_step():
    """Each file with a test marked `gpu` is run by a step, and no other file is."""
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    run_files = {word for one in STEPS for word in one.arguments if word.startswith("tests/")}
    assert marked == run_files


def test_without_a_gpu_a_step_is_rehearsed_and_no_claim_is_decided(tmp_path, monkeypatch, capsys):
    """The whole command runs without the processes of its steps and writes no report and no page."""
    page, reports = ROOT / "docs" / "gpu.md", ROOT / "reports"
    before = (page.read_text(), sorted(reports.iterdir()))
    monkeypatch.setattr(campaign, "probe_machine", lambda: dataclasses.replace(probe_machine(), device="cpu"))
    monkeypatch.setattr(campaign, "run_process", lambda words, **options: (0, ""))
    assert campaign.main({}, ["--state", str(tmp_path / "state"), "--only", "study"]) == 0
    printed = capsys.readouterr().out
    assert "There is no GPU here" in printed
    assert "planned, not measured" in printed
    assert "0 confirmed; 0 refuted" in printed
    assert (page.read_text(), sorted(reports.iterdir())) == before
