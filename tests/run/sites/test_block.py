"""Replicates measured by posts behind links, with fakes at the seam: what is asked and answered is JSON, and whatever
happens to a post, what it has not ended is measured by another."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from unittest.mock import Mock

import pytest

from harness.errors import InvalidRunError, UsageError
from harness.machine.provenance import Facts
from harness.machine.reading import Reading
from harness.records import codec, store
from harness.records.preparation import BaseSummary, Hello, TokenSummary
from harness.records.record import Failure, Fragment
from harness.report.live import LiveDisplay
from harness.report.terminal import console_for
from harness.run.budget import TooShortError
from harness.run.device import hold_device
from harness.run.executors import Place, WorkerLostError
from harness.run.measure import measure
from harness.run.plan import make_plan
from harness.run.runner import find_unsettled, run_plan
from harness.run.sites import block, local
from harness.run.sites import joining as joining_module
from harness.run.sites.joining import Joining
from harness.run.sites.orders import Hold, Measure, Message, read_message, read_order, write_order
from harness.run.sites.remote import RemoteStation
from harness.run.sites.together import describe_all, free_bytes_of, hold_all
from harness.run.sites.venue import Venue
from harness.run.written import read_plan, write_plan
from harness.studies.variant import Variant


class Fake:
    """An executor and its worker on a CPU; `changes` are attributes of this one."""

    start_latency_s = 0.01
    harness, tokens, free = "1.0 sha256:one", "a" * 64, 10 * 2**30
    libraries = "1.0"
    before_turn = staticmethod(lambda fake: None)

    def __init__(self, machine, **changes):
        self._machine = machine
        self.closed = threading.Event()
        for name, value in changes.items():
            setattr(self, name, value)

    def machine(self):
        return self._machine

    def device_id(self):
        return "cpu"

    def free_bytes(self):
        return self.free

    def facts(self):
        return Facts(machine=self._machine, settings={}, libraries={"peft": self.libraries}, git={"commit": None})

    def start(self, folder, threads):
        self.folder = folder
        (folder / "logs").mkdir()

    def hello(self):
        return Hello(harness=self.harness, pid=1, import_time_s=1.0, device="cpu", torch="0")

    def prepare_tokens(self, workload, *, keep=True):
        return TokenSummary(
            path=str(self.folder / "t"), hash=self.tokens, data="records of mine", synthetic=False,
            tokenizer_substituted=False, train_sequences=1, real_tokens=1, padded_tokens=0, records=1,
        )  # fmt: skip

    def lanes(self, threads):
        return 1

    def prepare_base(self, request):
        return BaseSummary(path="b", hash="b" * 64, base="b", bytes=1, conversions=0, quantisations=0, seconds=0.0)

    def make_place(self, trial, log):
        return Place(scratch=trial, log_path=str(self.folder / "logs" / f"{log}.log"))

    def clear_place(self, trial):
        pass

    def launch(self):
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        with (self.folder / "logs" / f"{trial}.log").open("a") as file:
            file.write(f"{command}\n")
        if command != "turn":
            return Fragment()
        self.before_turn(self)
        return Fragment(samples={"step_time_s": (0.1,) * arguments["steps"]})

    def close(self):
        """Of the worker after each trial; of the executor where a run is broken off."""
        self.closed.set()


@pytest.fixture
def stations(monkeypatch, machine, desk_link, tmp_path):
    """A function that makes stations by name, each with the changes of its fake, or with a link of its own."""
    monkeypatch.setattr(block, "harness_identity", lambda: "1.0 sha256:one")
    monkeypatch.chdir(tmp_path)
    made, hosts = {}, {}

    def open_executor(name=None, *, host=None, label=""):
        hosts.setdefault(label, []).append(host)
        return Fake(machine, **made[label])

    def make(links=None, **changes):
        found = []
        for name, change in changes.items():
            made[name] = change
            found.append(RemoteStation(name, (links or {}).get(name) or desk_link()))
        return found

    make.hosts = hosts
    monkeypatch.setattr(block, "open_executor", open_executor)
    return make


@pytest.fixture
def plan(small_study):
    """Four replicates of two variants and a control, training only."""
    protocol = dataclasses.replace(small_study.protocol, replicates=4)
    return make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))


def measured(plan, stations, runs):
    describe_all(stations)
    with LiveDisplay(console_for(stderr=True)) as display:
        return measure(plan, runs=runs, display=display, venue=Venue(stations=tuple(stations)))


def sites_of(run):
    sites = {}
    for record in run.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    return sites


def test_a_run_is_measured_by_posts_and_written_by_who_asks(plan, stations, machine, tmp_path):
    """Each replicate by one; facts, tokens and logs are those of the posts, and nothing of theirs is left."""
    both = threading.Barrier(2)

    def first_turn(fake):
        if not getattr(fake, "met", False):
            fake.met = True
            both.wait(30)

    changes = {"before_turn": first_turn}
    pair = stations(a=changes, b=changes)
    run = measured(plan, pair, tmp_path / "runs")
    assert [record.trial for record in run.records] == [slot.trial for slot in plan.slots]
    assert {record.status for record in run.records} == {"ok"}
    assert all(len(of_one) == 1 for of_one in sites_of(run).values())
    assert set.union(*sites_of(run).values()) == {"a", "b"}
    assert run.manifest.tokens["hash"] == "a" * 64
    assert run.manifest.provenance["device_name"] == "Test CPU"
    for record in run.records:
        said = (run.path / record.log).read_text().splitlines()
        assert said.count("turn") == plan.study.protocol.turns
    assert run.manifest.site_facts == {
        site: store.SiteFacts(machine=codec.to_json(machine), fingerprint=run.manifest.fingerprint) for site in "ab"
    }
    folders = [station._link.desk._post._folder for station in pair]
    assert all((folder / "logs").is_dir() for folder in folders)
    for station in pair:
        station.close()
    assert not any(folder.exists() for folder in folders)


def test_posts_of_one_machine_divide_its_cpus(plan, stations, desk_link, tmp_path, monkeypatch):
    """Whatever they start stays on the part of its site."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr(local, "cores_of", lambda cpus: [(4, 6), (5, 7)])
    stations(a={"device_id": lambda: "card 0"}, b={"device_id": lambda: "card 1"})
    pair = [RemoteStation(name, desk_link(), share=share, shares=2) for share, name in enumerate("ab")]
    run = measured(plan, pair, tmp_path / "runs")
    assert {record.status for record in run.records} == {"ok"}
    told = {name: {host.environment["LORAMETER_CPUS"] for host in hosts} for name, hosts in stations.hosts.items()}
    assert told == {"a": {"4,6"}, "b": {"5,7"}}
    for station in pair:
        station.close()


def test_each_post_is_told_what_the_run_has_left_of_its_minutes(plan, stations, desk_link, tmp_path):
    """Once, with as many of the replicates as it will measure; from then on it keeps its own account."""
    orders = {"a": [], "b": []}

    class Noting(desk_link):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def ask(self, order):
            orders[self.name].append(read_order(order))
            return super().ask(order)

    protocol = dataclasses.replace(plan.study.protocol, max_minutes=10)
    limited = make_plan(dataclasses.replace(plan.study, protocol=protocol), phases=("train",))
    links = {name: Noting(name) for name in orders}
    run = measured(limited, stations(links, a={}, b={}), tmp_path / "runs")
    assert {record.status for record in run.records} == {"ok"}
    for of_one in orders.values():
        measures = [order for order in of_one if isinstance(order, Measure)]
        assert [order.afresh for order in measures] == [number == 0 for number in range(len(measures))]
        assert all(0 < order.left_s <= 600 for order in measures)
        assert {order.replicates for order in measures[:1]} <= {2}


def test_a_link_that_breaks_loses_its_replicate_and_no_other(plan, stations, desk_link, tmp_path):
    """Another post measures it from its beginning, and a notice says what became of the first."""
    seen = []

    def cut(line):
        seen.append(read_message(line))
        if sum(message.says == "record" for message in seen) == 2:
            raise ConnectionError("the node is gone")
        return line

    def wait(fake):
        while sum(message.says == "record" for message in seen) < 2:
            time.sleep(0.001)

    run = measured(plan, stations({"b": desk_link(cut)}, a={"before_turn": wait}, b={}), tmp_path / "runs")
    assert {record.status for record in run.records} == {"ok"}
    assert all(of_one == {"a"} for of_one in sites_of(run).values())
    (notice,) = (notice for notice in run.manifest.notices if notice.code == "site-lost")
    assert "site b was lost: it does not answer any more: the node is gone" in notice.message


def test_what_a_post_had_no_time_for_is_told_with_the_run(plan, stations, tmp_path, monkeypatch):
    """And one that is too slow for its minutes is a site that is lost, not a bad study."""

    begun = threading.Event()

    def run(part, executors, *arguments, **options):
        if executors[""].slow:
            begun.set()
            raise TooShortError("max_minutes = 1: not even one replicate fits")
        assert begun.wait(30)
        left_out = {part.groups[0].replicate: frozenset({"peaks", "requests"})}
        return dataclasses.replace(run_plan(part, executors, *arguments, **options), left_out=left_out)

    monkeypatch.setattr(block, "run_plan", run)
    run = measured(plan, stations(a={"slow": False}, b={"slow": True}), tmp_path / "runs")
    assert {(record.status, record.site) for record in run.records} == {("ok", "a")}
    said = {notice.code: notice.message for notice in run.manifest.notices}
    assert said["left-out"].startswith("4 replicates left out peaks of memory, requests:")
    assert "site b was lost: max_minutes = 1: not even one replicate fits" in said["site-lost"]


def flaw(kind):
    """A change of what a post says while it measures."""

    def cut(line):
        message = read_message(line)
        if message.says == "record" and kind == "other-trial":
            return line.replace(message.trial, "r9-none")
        if message.says == "record" and kind == "other-variant":
            return line.replace(message.record.variant, "0" * 12)
        if message.says == "record" and kind == "garbled":
            return line[: len(line) // 2]
        if message.says == "record" and kind == "no-record":
            return json.dumps({"says": "phase", "trial": message.trial, "text": "turn"})
        return line

    return cut


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other-trial", "for which it was not asked"),
        ("other-variant", "is of another trial"),
        ("garbled", "cannot be read"),
        ("no-record", "left out r0-"),
    ],
)
def test_an_answer_that_is_none_is_never_a_pass(plan, stations, desk_link, tmp_path, kind, words):
    """The post is lost; it was the only one, so the run ends by the reason and says what was not run."""
    (station,) = stations({"a": desk_link(flaw(kind))}, a={})
    with pytest.raises(InvalidRunError, match=words):
        measured(plan, [station], tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    run = store.read_run(str(path), tmp_path / "runs")
    assert run.manifest.status == "failed"
    assert "ok" not in {record.status for record in run.records if record.replicate > 0}
    assert station._link.desk._post._executors[""].closed.wait(30)  # nothing goes on where nobody listens


class Arriving:
    """One site that comes while others measure; the first of these goes on when it is known what became of it."""

    if_busy = "refuse"

    def __init__(self, station, monkeypatch):
        self.coming, self.settled, note = [station], threading.Event(), Joining._note

        def noting(joining, *said):
            note(joining, *said)
            self.settled.set()

        monkeypatch.setattr(Joining, "_note", noting)
        monkeypatch.setattr(joining_module, "LOOK_S", 0.001)

    def come(self):
        found, self.coming = self.coming, []
        return found

    def is_expected(self):
        return False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"libraries": "2.0"}, "site c is unlike the first, a: libraries.peft is '2.0' there and '1.0' here"),
        ({"tokens": "c" * 64}, "site c makes other tokens of records of mine: their hash is cccccccccccc there"),
    ],
)
def test_a_site_that_comes_and_is_unlike_takes_no_part(plan, stations, tmp_path, monkeypatch, changes, words):
    """It is named with what differs, and ended; the others measure the whole run."""
    waits = {"before_turn": lambda fake: arrivals.settled.wait(30)}
    first, late = stations(a=waits, c=changes)
    arrivals = Arriving(late, monkeypatch)
    describe_all([first])
    with LiveDisplay(console_for(stderr=True)) as display:
        venue = Venue(stations=(first,), arrivals=arrivals)
        run = measure(plan, runs=tmp_path / "runs", display=display, venue=venue)
    (notice,) = (notice for notice in run.manifest.notices if notice.code.startswith("site-"))
    assert notice.code == "site-refused"
    assert notice.message.startswith("site c came and takes no part: ")
    assert words in notice.message
    assert [(record.status, record.site) for record in run.records] == [("ok", "a")] * len(plan.slots)
    post = late._link.desk._post
    assert all(executor.closed.is_set() for executor in post._executors.values())
    assert post._folder is None or not post._folder.exists()
    assert late._link.closed


def test_a_site_that_comes_and_is_like_the_others_takes_part(plan, stations, tmp_path, monkeypatch):
    """As soon as it can measure; what it is stands in the run beside what the first one is."""
    measuring = threading.Event()
    first, late = stations(
        a={"before_turn": lambda fake: measuring.wait(30)}, c={"before_turn": lambda fake: measuring.set()}
    )
    arrivals = Arriving(late, monkeypatch)
    describe_all([first])
    with LiveDisplay(console_for(stderr=True)) as display:
        venue = Venue(stations=(first,), arrivals=arrivals)
        run = measure(plan, runs=tmp_path / "runs", display=display, venue=venue)
    assert [notice.code for notice in run.manifest.notices if notice.code.startswith("site-")] == ["site-joined"]
    assert {record.status for record in run.records} == {"ok"}
    assert {site for of_one in sites_of(run).values() for site in of_one} == {"a", "c"}
    assert {site: facts.fingerprint for site, facts in run.manifest.site_facts.items()} == dict.fromkeys(
        "ac", run.manifest.fingerprint
    )
    late.close()


def test_a_defect_of_a_post_is_told_with_its_name_and_its_traceback(plan, stations, tmp_path):
    """And no trial is ok for it."""

    def fail(fake):
        raise KeyError("a defect")

    with pytest.raises(InvalidRunError, match=r"site a: KeyError: .*a defect"):
        measured(plan, stations(a={"before_turn": fail}), tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    assert "a defect" in (path / "logs" / "failed-a.log").read_text()
    assert "ok" not in {record.status for record in store.read_run(str(path), tmp_path / "runs").records}


def test_who_ends_a_run_ends_what_its_posts_measure(plan, stations, tmp_path):
    """What was under way is interrupted, and is saved."""

    def turn(fake):
        os.kill(os.getpid(), signal.SIGINT)
        assert fake.closed.wait(30)
        raise WorkerLostError("crashed", Failure(phase="turn", kind="ProcessDied", message="killed"))

    run = measured(plan, stations(a={"before_turn": turn}), tmp_path / "runs")
    assert run.manifest.status == "interrupted"
    states = {record.status for record in run.records}
    assert "interrupted" in states
    assert not states & {"ok", "crashed"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"libraries": "2.0"}, r"site b is unlike the first, a: libraries.peft is '2.0' there and '1.0' here"),
        ({"cpu_model": "Other CPU"}, r"cpu_model is 'Other CPU' there"),
    ],
)
def test_an_unlike_machine_is_refused_by_name(stations, machine, changes, words):
    """Before anything is prepared, with what differs."""
    if "cpu_model" in changes:
        changes = {"_machine": dataclasses.replace(machine, **changes)}
    with pytest.raises(InvalidRunError, match=words):
        describe_all(stations(a={}, b=changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"tokens": "c" * 64}, "site b makes other tokens of records of mine"), ({"harness": "2.0"}, "site b is unlike")],
)
def test_other_tokens_or_another_program_are_refused_by_name(plan, stations, tmp_path, changes, words):
    """Before anything is measured."""
    with pytest.raises(InvalidRunError, match=words):
        measured(plan, stations(a={}, b=changes), tmp_path / "runs")


def test_sites_on_one_machine_are_said_and_share_its_memory(stations):
    """They measure beside each other; the device is held once, by the first."""
    both = stations(a={}, b={"free": 8 * 2**30})
    (notice,) = describe_all(both)
    assert notice.code == "sites-together"
    assert free_bytes_of(both) == 4 * 2**30
    assert hold_all(both, "refuse", print) is False
    for station in both:
        station.close()


def test_sites_on_parts_of_one_card_are_said(stations, monkeypatch):
    """Each has a device of its own, which is no card of its own."""
    board = {"a": "one", "b": "one", "c": "two"}
    three = stations(**{name: {"device_id": lambda name=name: f"MIG-{name}"} for name in board})
    for station in three:
        seen = Mock(board=Reading(value=board[station.name]))
        monkeypatch.setattr(block, "visible_cards", lambda environment, seen=seen: Reading(value=(seen,)))
        assert station.description.boards == (board[station.name],)
    (notice,) = describe_all(three)
    assert (notice.code, notice.message.split(",")[0]) == ("sites-together", "sites a")
    assert "b are parts of one card (one)" in notice.message


def test_a_post_holds_each_card_that_ranks_take(stations, monkeypatch):
    """Whoever measures on any of them keeps it out, and the other way round."""
    two = stations(a={}, b={})
    monkeypatch.setattr(
        block, "executors_of_ranks", lambda host, ranks: [Mock(device_id=lambda n=n: f"held {n}") for n in range(ranks)]
    )
    assert not two[0].hold("refuse", print, ranks=2)
    with (
        pytest.raises(InvalidRunError, match=r"measures on this device \(held 1\)"),
        hold_device(Mock(device_id=lambda: "held 1"), "refuse"),
    ):
        pass
    with hold_device(Mock(device_id=lambda: "held 2"), "refuse"):
        pass
    two[0].close()
    assert not two[1].hold("refuse", print, ranks=3)
    two[1].close()


def test_a_plan_is_read_as_it_was_written(small_study):
    """The same trials, and variants with the ids that they had, of whole numbers as well."""
    whole = Variant(name="whole", lora_alpha=32, r=4)
    study = dataclasses.replace(small_study, variants=(*small_study.variants, whole))
    plan = make_plan(study, phases=("train",))
    rest = dataclasses.replace(plan, groups=plan.groups[2:])
    order = json.loads(write_order(block.Prepare(plan=write_plan(rest, plan))))
    again = read_plan(read_order(json.dumps(order)).plan)
    assert again.groups == rest.groups
    assert again.contenders == plan.contenders


def test_a_plan_of_another_version_and_a_part_of_a_group_are_refused(plan):
    """With the remedy."""
    written = write_plan(plan, plan)
    with pytest.raises(UsageError, match="plans other trials"):
        read_plan(dataclasses.replace(written, order=("r0-other", *written.order[1:])))
    together = make_plan(plan.study, phases=("train",), interleaving="lockstep")
    written = write_plan(together, together)
    with pytest.raises(UsageError, match="no whole groups"):
        read_plan(dataclasses.replace(written, trials=written.trials[:1]))


@pytest.mark.parametrize("text", ["", "[]", '{"do": "Dance"}', '{"do": "Measure", "with": {"steps": 1}}'])
def test_an_order_that_is_none_fails_and_ends_nothing(text):
    """Whoever asks is told why."""
    said = []
    block.Post().carry_out(text, said.append)
    (last,) = map(read_message, said)
    assert last.says == "failed"
    assert last.text


def test_what_is_not_prepared_is_not_measured():
    """The order comes too early, or to another process than the one that prepared it."""
    said = []
    block.Post().carry_out(write_order(Measure(trials=("r0-a",))), said.append)
    assert "nothing is prepared here" in read_message(said[-1]).text
    assert isinstance(read_order(write_order(Hold(if_busy="share"))), Hold)


def test_of_a_long_log_the_end_is_sent(tmp_path, monkeypatch):
    """It says what went wrong; what was sent is not sent again."""
    monkeypatch.setattr(block, "MOST_LOG_BYTES", 4)
    post, said = block.Post(), []
    post._folder = tmp_path
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "r0-a.log").write_text("a long story")
    post._send_logs(said.append)
    post._send_logs(said.append)
    assert said == [Message(says="log", trial="r0-a", text="[8 bytes are left out]\ntory")]


def test_a_replicate_that_is_spread_is_measured_whole_again(plan, stations, tmp_path):
    """Of one that broke off nothing is kept: its trials would be paired over two sites."""
    run = measured(plan, stations(a={}), tmp_path / "runs")
    some = [record for record in run.records if record.trial != plan.groups[0].slots[0].trial]
    left = {group.replicate for group in find_unsettled(plan, some)}
    assert left == {0}
    assert len(find_unsettled(plan, some)) == sum(group.replicate == 0 for group in plan.groups)
    alone = [record.replaced(site="") for record in some]
    assert len(find_unsettled(plan, alone)) == 1
    assert len(find_unsettled(plan, alone, whole=True)) == len(find_unsettled(plan, some))
    two = [record.replaced(site="b") if record.trial == "r1-plain" else record for record in run.records]
    assert {group.replicate for group in find_unsettled(plan, two)} == {1}
