"""An A/B on other machines, with posts in threads of this process that only pretend to measure: each puts up the sides
for itself, and what would not be the same there is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys

import pytest

from harness.cli import main
from harness.errors import InvalidRunError, UsageError
from harness.machine.provenance import Facts
from harness.report.live import LiveDisplay
from harness.report.terminal import console_for
from harness.run.ab import measure_ab, plan_ab, resume_ab
from harness.run.executors import open_executor
from harness.run.executors.host import Host
from harness.run.executors.sides import OpenSide, open_side
from harness.run.sites import block
from harness.run.sites.remote import RemoteStation
from harness.run.sites.sides import check_sides, write_sides
from harness.run.sites.together import describe_all
from harness.run.sites.venue import Venue
from harness.run.written import WrittenSide, read_plan, write_plan
from harness.verdicts.ab import report_of

PYTHONS = {"base": "/env/a/bin/python", "candidate": "/env/b/bin/python"}


@pytest.fixture
def posts(pretended, desk_link, monkeypatch):
    """A function that makes a venue of two posts; `versions` are what their candidates have."""
    opened = []

    @contextlib.contextmanager
    def put_up(spec, **options):
        opened.append((spec, options["kind"]))
        options["report"](f"putting up {spec}")
        yield OpenSide(spec=spec, kind=options["kind"], host=Host(python=spec), label=spec, declared=())

    monkeypatch.setattr(block, "open_side", put_up)
    monkeypatch.setattr(block, "harness_identity", lambda: "1.0 sha256:one")
    made = []

    def make(**versions):
        stations = tuple(RemoteStation(name, desk_link()) for name in versions or ("a", "b"))
        made.extend(stations)
        describe_all(stations)
        if versions:
            told = pretended.Fake.facts

            def facts(self):
                found = told(self)
                version = versions[self.label[-1]]
                if found.host is None or self.label.startswith("base"):
                    return found
                return dataclasses.replace(found, host={**found.host, "libraries": {"peft": version}})

            monkeypatch.setattr(pretended.Fake, "facts", facts)
        pretended.MEETINGS[:] = [pretended.Meeting(2)]
        return Venue(said="on = 'ray'", stations=stations)

    make.opened = opened
    yield make
    for station in made:
        station.close()


@pytest.fixture
def plan(small_study, machine):
    """Four replicates of one variant on both sides, training only."""
    protocol = dataclasses.replace(small_study.protocol, replicates=4)
    study = dataclasses.replace(small_study, protocol=protocol)
    return plan_ab(study, machine, free_bytes=None, select=["plain"], phases=("train",), injected_rows=3)[0]


def measured(plan, venue, tmp_path):
    with LiveDisplay(console_for(stderr=True)) as display:
        return measure_ab(
            plan, base=PYTHONS["base"], candidate=PYTHONS["candidate"], repository=tmp_path, cache=tmp_path,
            runs=tmp_path / "runs", display=display, venue=venue,
        )  # fmt: skip


def test_each_post_puts_up_both_sides_and_measures_whole_replicates(plan, posts, pretended, tmp_path):
    """In the interpreter of each side; facts and logs of the sides are those of the posts, and the ratio is paired."""
    run = measured(plan, posts(), tmp_path)
    assert sorted(posts.opened) == sorted([(spec, "interpreter") for spec in PYTHONS.values()] * 2)
    started = {one.label: one.host.python for one in pretended.MADE if hasattr(one, "folder")}
    assert started == {
        f"{arm}-{site}": PYTHONS["candidate" if arm == "candidate" else "base"]
        for arm in ("base", "control", "candidate") for site in "ab"
    }  # fmt: skip
    assert {record.site for record in run.records} == {"a", "b"}
    assert {record.status for record in run.records} == {"ok"}
    sides = run.manifest.sides
    assert {name: sides[name]["facts"]["packages"]["python"] for name in sides} == PYTHONS
    assert sides["candidate"]["injected_rows"] == 3
    assert sides["base"]["kind"] == "interpreter"
    assert "putting up /env/b/bin/python" in (run.path / "logs" / "side-candidate-a.log").read_text()
    (row,) = (row for row in report_of(run).comparisons if row.metric == "step_time_s")
    assert row.comparison.ratio == pytest.approx(1.0)
    assert row.comparison.replicates == 4


def test_an_ab_is_gone_on_with_where_its_sides_are_the_same(plan, posts, tmp_path):
    """Refused where one is another now, before anything is measured."""
    run = measured(plan, posts(), tmp_path)
    lines = (run.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (run.path / "trials.jsonl").write_text(lines[0])
    broken = dataclasses.replace(
        run, records=run.records[:0], manifest=dataclasses.replace(run.manifest, status="interrupted")
    )
    options = {"repository": tmp_path, "cache": tmp_path}
    with LiveDisplay(console_for(stderr=True)) as display:
        with pytest.raises(UsageError, match=r"its candidate would be of two kinds: libraries.peft: '1.0' then, '2.0'"):
            resume_ab(broken, plan, display=display, venue=posts(a="2.0", b="2.0"), **options)
        again = resume_ab(broken, plan, display=display, venue=posts(a="1.0", b="1.0"), **options)
    assert [record.status for record in again.records] == ["ok"] * len(plan.slots)


def test_a_side_that_is_another_on_one_node_is_refused_by_name(plan, posts, tmp_path):
    """With what differs, before anything is measured."""
    with pytest.raises(InvalidRunError, match=r"site b: its candidate is another than on a: libraries.peft is '2.0'"):
        measured(plan, posts(a="1.0", b="2.0"), tmp_path)


def test_a_side_that_only_one_place_has_is_refused(machine):
    """What is not told agrees with nothing."""
    facts = Facts(machine=machine, settings={}, libraries={}, git={}, host={"python": "3.11.0"})
    check_sides("a", {"base": facts}, "b", {"base": facts})
    with pytest.raises(InvalidRunError, match="its base is another"):
        check_sides("a", {"base": facts}, "b", {})


def test_a_plan_of_sides_is_read_as_it_was_written(plan):
    """The same trials, with the extra work of the candidate."""
    sides = (WrittenSide(side="base", kind="interpreter", spec="/a"),)
    again = read_plan(write_plan(plan, plan, sides))
    assert again.groups == plan.groups
    assert {one.side: one.injected_rows for one in again.contenders} == {"base": 0, "candidate": 3}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with one commit."""
    for words in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e@e", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("HEAD", "a revision is checked out on this machine only"),
        ("python3", "it may be another Python on each node. Name its path, such as /"),
        ("no-such-thing", "not an interpreter"),
        ("peft @ https://me:secret@host/peft.whl", "what may be a credential"),
    ],
)
def test_what_is_not_the_same_on_another_machine_is_refused(repository, spec, words):
    """With what can be."""
    with pytest.raises(UsageError, match=words):
        write_sides({"base": spec}, repository, "on = 'ray'")


def test_an_interpreter_by_path_and_requirements_can_be_elsewhere(repository):
    """A path may be there and not here."""
    there, here, asked = write_sides(
        {"base": "/env/bin/python", "candidate": sys.executable, "": "peft==0.19.1"}, repository, "on = 'ray'"
    )
    assert (there.kind, there.spec) == ("interpreter", "/env/bin/python")
    assert (here.kind, here.spec) == ("interpreter", sys.executable)
    assert (asked.kind, asked.spec) == ("requirements", "peft==0.19.1")


def test_a_node_without_the_interpreter_says_so(tmp_path):
    """By its path."""
    with (
        pytest.raises(UsageError, match=r"/env/bin/python.*no executable file of that path on this machine"),
        open_side("/env/bin/python", repository=tmp_path, cache=tmp_path, kind="interpreter"),
    ):
        pass


def test_a_revision_is_refused_before_anything_waits_in_a_queue(study, repository, pretended, capsys):
    """By the command as well."""
    words = ["ab", str(study()), "--base", "HEAD", "--candidate", "HEAD", "--on", "slurm:sites=2"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "on = 'slurm:sites=2', --base HEAD: a revision is checked out" in said
    assert not (repository / "runs").exists()
    assert isinstance(open_executor(), pretended.Fake)
