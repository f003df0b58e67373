"""Sites that are unlike: each has its part of the replicates and is judged by itself, and nobody pools them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.errors import InvalidRunError, UsageError
from harness.records import store
from harness.report.live import LiveDisplay
from harness.report.terminal import console_for
from harness.run.measure import measure
from harness.run.plan import make_plan
from harness.run.sites import block, orders
from harness.run.sites.local import local_sites
from harness.run.sites.remote import RemoteStation
from harness.run.sites.together import check_like, describe_all
from harness.run.sites.venue import Venue
from harness.studies.stored import read_study
from harness.verdicts.ab import attribution_of, report_of
from harness.verdicts.gate import Policy, judge
from harness.verdicts.mixed import runs_of_sites
from harness.verdicts.series import series_of
from harness.verdicts.standing import standing_of

SITES = ("--sites", "0,1", "--mixed")
SIDES = ("--base", "/a/python", "--candidate", "/b/python", "--phase", "train", "--variant", "small")


@pytest.fixture
def spread(placed, run, pretended):
    """A function that measures eight replicates on two sites, the second of which is slow at what it is told."""

    def measure(command, *words, slow=()):
        pretended.SLOW.update(slow)
        return run(command, placed("", replicates=8), *SITES, *words, meeting=2)

    return measure


def document(said):
    """The JSON document that a command has printed."""
    return json.JSONDecoder().raw_decode(said[said.index("{") :])[0]


def test_each_site_has_as_many_replicates_however_quick_it_is(spread):
    """And each record says what machine it is of."""
    _, last, _ = spread("run")
    replicates = {}
    for record in last.records:
        replicates.setdefault(record.site, set()).add(record.replicate)
    assert {site: len(found) for site, found in replicates.items()} == {"cpus-0": 4, "cpus-1": 4}
    assert {record.machine for record in last.records} == {"Test CPU"}
    assert last.manifest.sites == ("cpus-0", "cpus-1")


def test_a_report_gives_ratios_by_site_and_none_of_all(spread, run):
    """Here they differ by a half: a mean over both would be of neither."""
    _, last, _ = spread("run", slow={("cpus-1", "large"): 1.5})
    code, _, said = run("report", last.manifest.run, "--json")
    tables = document(said)["tables"]
    assert code == 0
    assert [(table["site"], table["title"]) for table in tables] == [
        ("cpus-0", "Training on cpus-0"), ("cpus-1", "Training on cpus-1"),
    ]  # fmt: skip
    ratios = [{row["name"]: row["ratio"] for row in table["rows"]}["large"] for table in tables]
    assert [one["ratio"] for one in ratios] == pytest.approx([1.0, 1.5])
    assert [one["replicates"] for one in ratios] == [4, 4]
    code, _, said = run("report", last.manifest.run)
    assert "the sites are unlike machines (cpus-0: Test CPU; cpus-1: Test CPU)" in said
    assert "1.22" not in said  # the mean of the logarithms


def test_notices_say_of_which_site_they_are_unless_of_all(spread):
    """Each once."""
    _, _, said = spread("run", slow={("cpus-1", "control"): 1.5})
    assert said.count("the records are synthetic") == 1
    assert "cpus-1: Training: the reference differs from itself" in said
    assert "cpus-0: Training: the reference" not in said


def test_the_command_that_measures_gives_the_control_of_each_site(spread):
    """Its document has one a site."""
    code, _, said = spread("run", "--json")
    assert code == 0
    assert set(document(said)["control"]) == {"train on cpus-0", "train on cpus-1"}


def test_a_control_that_fails_on_one_site_fails_the_run(spread):
    """However good the other is."""
    code, last, _ = spread("run", slow={("cpus-1", "control"): 1.5})
    stands = standing_of(last, read_study(last))
    assert code == 4
    assert any("regressed in phase 'train on cpus-1'" in fault for fault in stands.faults)


@pytest.mark.parametrize("words", [("compare", 2), ("gate", 2), ("accept", 1), ("claims", 1)])
def test_what_would_take_sites_together_is_refused(spread, run, words):
    """With each site and its machine, and exit code 2."""
    _, last, _ = spread("run")
    command, times = words
    code, _, said = run(command, *[last.manifest.run] * times)
    assert code == 2
    assert "unlike machines" in said or "claims nothing" in said


def test_records_of_unlike_sites_are_never_grouped(spread):
    """Whoever asks; those of one site are, as a run of their own."""
    _, last, _ = spread("run")
    with pytest.raises(UsageError, match="no number holds over all of them"):
        series_of(last.records)
    parts = runs_of_sites(last)
    assert {site: len(series_of(part.records)) for site, part in parts.items()} == {"cpus-0": 3, "cpus-1": 3}
    assert not any(part.manifest.study["protocol"].get("mixed") for part in parts.values())


def test_runs_of_unlike_sites_are_listed_and_hide_no_other(spread, run):
    """They are no points of a history."""
    _, last, _ = spread("run")
    code, _, said = run("list", "runs")
    assert code == 0
    assert last.manifest.run[:15] in said
    assert "unlike" not in said


def test_neither_a_page_nor_a_table_takes_sites_together(spread, run, tmp_path):
    """They are refused with the reason."""
    _, last, _ = spread("run")
    for words in (("report", last.manifest.run, "--html", tmp_path / "page.html"), ("export", last.manifest.run)):
        code, _, said = run(*words)
        assert code == 2, words
        assert "unlike machines" in said


def test_a_gate_of_an_ab_lets_pass_what_every_site_lets_pass(spread, two_pythons):
    """A candidate that is slower on one of them is slower."""
    code, last, said = spread("ab", *SIDES, "--json")
    assert code == 0, said
    assert {row["site"] for row in document(said)["comparisons"]} == {"cpus-0", "cpus-1"}
    assert judge(report_of(last), Policy(required=("small",))).passed


def test_a_gate_of_an_ab_fails_where_one_site_regresses(spread, two_pythons, run):
    """By its name, in the stored run as well."""
    code, last, _ = spread("ab", *SIDES, slow={("candidate-cpus-1", "small"): 1.5})
    assert code == 1
    rows = {row.site: row for row in report_of(last).comparisons if row.metric == "step_time_s"}
    assert {site: row.verdict for site, row in rows.items()} == {"cpus-0": "equivalent", "cpus-1": "regressed"}
    assert {part.variant for part in attribution_of(last).parts} == {"small on cpus-0", "small on cpus-1"}
    code, _, said = run("gate", last.manifest.run)
    assert code == 1
    assert "small on cpus-1, step time" in said.lower() or "small on cpus-1" in said


def test_a_site_that_has_measured_nothing_is_no_pass(spread, two_pythons):
    """The others do not speak for it."""
    _, last, _ = spread("ab", *SIDES)
    gone = dataclasses.replace(last, manifest=dataclasses.replace(last.manifest, sites=("cpus-0", "cpus-1", "lost")))
    assert {row.verdict for row in report_of(gone).comparisons} == {"invalid"}
    assert "site lost has measured nothing" in report_of(gone).comparisons[0].comparison.reason
    nothing = dataclasses.replace(gone, records=())
    assert not judge(report_of(nothing), Policy(inconclusive="pass")).passed


def test_a_run_is_gone_on_with_on_unlike_sites_or_not_at_all(spread, run, tmp_path):
    """That it is of such is settled."""
    _, last, _ = spread("run")
    lines = (last.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (last.path / "trials.jsonl").write_text(lines[0])
    name = last.manifest.run
    code, _, said = run("run", "--resume", name, "--on", "here")
    assert code == 2
    assert "mixed: there is one site here" in said
    code, _, said = run("run", "--resume", name, "--mixed")
    assert code == 2
    assert "--mixed would change the study" in said
    code, _, _ = run("run", "--resume", name, meeting=2)
    again = store.read_run(name, tmp_path / "runs")
    assert {record.machine for record in again.records} == {"Test CPU"}
    assert {record.status for record in again.records} == {"ok"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mixed",), "mixed: there is one site here"),
        ((*SITES, "--precision", "0.01"), "precision = 0.01: it is of one interval"),
    ],
)
def test_what_makes_no_sense_of_unlike_sites_is_refused(placed, run, words, said):
    """Before anything is measured."""
    code, last, told = run("run", placed(""), *words)
    assert (code, last) == (2, None)
    assert said in told


def test_unlike_cards_are_allowed_by_name(machine, monkeypatch):
    """Each says what it is, by whatever name it is visible."""
    from harness.machine.cards import VisibleCard
    from harness.machine.reading import Reading
    from harness.run.sites import local

    found = tuple(
        VisibleCard(
            entry=entry, name=Reading(value=name), board=Reading(value=entry), power_limit_w=Reading(value=limit)
        )
        for entry, name, limit in (("GPU-1", "H100", 700.0), ("GPU-2", "A100", 400.0))
    )
    monkeypatch.setattr(local, "visible_cards", lambda: Reading(value=found))
    sites = local_sites(("0", "1"), dataclasses.replace(machine, device="cuda"), mixed=True)
    assert [site.machine for site in sites] == ["H100 beside Test CPU", "A100 beside Test CPU"]


class Told:
    """A link that answers what a place says of itself."""

    def __init__(self, description):
        self.description = description

    def ask(self, order):
        from harness.records import codec

        yield codec.dumps(orders.Message(says="done", answer=codec.to_json(self.description)))


@pytest.fixture
def stations(machine, pretended):
    """A function that makes a station of a machine with these changes, and these libraries."""

    def make(name, libraries="1.0", **changes):
        facts = pretended.Fake("").facts()
        facts = dataclasses.replace(
            facts, machine=dataclasses.replace(machine, **changes), libraries={"peft": libraries}
        )
        return RemoteStation(
            name,
            Told(
                orders.Description(facts=facts, harness="one", device_id=name, machine=name, free_bytes=1),
            ),
        )

    return make


def test_unlike_machines_are_refused_unless_they_may_be_mixed(stations):
    """What is installed must be the same in any case."""
    first, other = stations("a"), stations("b", cpu_model="Other CPU", device_name="Other CPU")
    with pytest.raises(InvalidRunError, match=r"or have each site judged by itself by --mixed\.$"):
        check_like(first, other)
    check_like(first, other, mixed=True)
    assert (first.machine, other.machine) == ("Test CPU", "Other CPU")
    with pytest.raises(InvalidRunError, match=r"libraries.peft is '2.0' there"):
        check_like(first, stations("b", libraries="2.0", cpu_model="Other CPU"), mixed=True)


def test_every_kind_of_machine_must_be_able_to_measure_the_plan(stations, small_study):
    """And alike: trials of one run alternate at one level."""
    from harness.run.measure import plan_study

    pair = stations("a"), stations("b", cpu_model="Other CPU", device_name="Other CPU")
    venue = Venue(stations=pair)
    assert [machine.cpu_model for machine in venue.machines] == ["Test CPU", "Other CPU"]
    seen = []

    def make(machine):
        seen.append(machine.cpu_model)
        return plan_study(small_study, machine, free_bytes=None, phases=("train",))

    venue.plan(make)
    assert seen == ["Test CPU", "Other CPU"]
    with pytest.raises(UsageError, match="would alternate otherwise on different sites: lockstep, replicates"):
        venue.plan(
            lambda machine: (
                make_plan(small_study, interleaving="lockstep" if machine.cpu_model == "Test CPU" else "replicates"),
                (),
            )
        )


@pytest.fixture
def posts(pretended, desk_link, monkeypatch):
    """A function that makes two posts, each with a CPU of its own kind, and links that may change what is said."""
    told, made = pretended.Fake.facts, []

    def facts(self):
        own = dataclasses.replace(pretended.MACHINE, cpu_model=f"CPU of {self.label[-1]}")
        return dataclasses.replace(told(self), machine=own)

    def make(**cuts):
        made.extend(RemoteStation(name, desk_link(*([cut] if cut else []))) for name, cut in cuts.items())
        describe_all(made, mixed=True)
        pretended.MEETINGS[:] = [pretended.Meeting(len(cuts))]
        return tuple(made)

    monkeypatch.setattr(pretended.Fake, "facts", facts)
    monkeypatch.setattr(block, "harness_identity", lambda: "1.0 sha256:one")
    yield make
    for station in made:
        station.close()


@pytest.fixture
def mixed_plan(small_study):
    """Eight replicates on nodes of a cluster that are unlike."""
    protocol = dataclasses.replace(small_study.protocol, replicates=8, on="ray", mixed=True)
    study = dataclasses.replace(small_study, protocol=protocol)
    return make_plan(study, phases=("train",), interleaving="lockstep")


def measured(plan, stations, runs):
    with LiveDisplay(console_for(stderr=True)) as display:
        return measure(plan, runs=runs, display=display, venue=Venue(said="on = 'ray'", stations=stations))


def replicates_of(found):
    sites = {}
    for record in found.records:
        sites.setdefault(record.site, set()).add(record.replicate)
    return {site: len(of_one) for site, of_one in sites.items()}


def test_posts_on_unlike_machines_have_equal_parts_and_are_judged_by_themselves(
    mixed_plan, posts, pretended, run, tmp_path
):
    """Each record says of what machine it is, each site has its fingerprint, and the report a table for each."""
    pretended.SLOW[("b", "nf4")] = 1.5
    found = measured(mixed_plan, posts(a=None, b=None), tmp_path / "runs")
    assert {record.status for record in found.records} == {"ok"}
    assert replicates_of(found) == {"a": 4, "b": 4}
    assert {(record.site, record.machine) for record in found.records} == {("a", "CPU of a"), ("b", "CPU of b")}
    ours, theirs = (found.manifest.site_facts[site] for site in "ab")
    assert (ours.machine["cpu_model"], theirs.machine["cpu_model"]) == ("CPU of a", "CPU of b")
    assert ours.fingerprint == found.manifest.fingerprint != theirs.fingerprint
    _, _, said = run("report", found.manifest.run, "--json")
    ratios = {
        table["site"]: {row["name"]: row["ratio"] for row in table["rows"]}["nf4"]["ratio"]
        for table in document(said)["tables"]
    }
    assert ratios == pytest.approx({"a": 1.0, "b": 1.5})


def test_the_part_of_an_unlike_post_that_is_lost_goes_to_the_other(mixed_plan, posts, tmp_path):
    """What it had measured whole stays its own."""
    seen = []

    def cut(line):
        seen.append(orders.read_message(line))
        if sum(message.says == "record" for message in seen) > 5:
            raise ConnectionError("the node is gone")
        return line

    found = measured(mixed_plan, posts(a=None, b=cut), tmp_path / "runs")
    assert {record.status for record in found.records} == {"ok"}
    parts = replicates_of(found)
    assert sum(parts.values()) == 8
    assert 1 <= parts["b"] < 4
    assert "site-lost" in {notice.code for notice in found.manifest.notices}
