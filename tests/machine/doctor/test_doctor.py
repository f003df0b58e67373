"""What the doctor makes of a machine: a remedy for every finding, and unfit only for what cannot be borne."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console

from harness import cli
from harness.machine.card import CardFacts, CardSample, Memory
from harness.machine.cards import VisibleCard
from harness.machine.doctor import examine, is_fit
from harness.machine.doctor.survey import OPTIONAL, REQUIRED, Card, Survey, cannot_load
from harness.machine.filesystem import Place, place_of
from harness.machine.links import NVLINK, Links, Pair
from harness.machine.neighbours import Neighbours
from harness.machine.reading import Reading, missing
from harness.machine.system import SystemFacts
from harness.models import catalogue, shapes
from harness.models.costs.memory import bare_process_bytes, estimate_memory
from harness.records.units import format_bytes
from harness.report.doctor import describe_checks
from harness.report.terminal import show, text_of
from harness.studies.variant import Variant
from harness.studies.workload import Workload

GIB = 2**30
DISK = Place(path="/runs", kind="ext4", options=("rw",), locks=Reading(value=True))


def given(value):
    return Reading(value=value)


SYSTEM = SystemFacts(
    cpus=8, quota_cpus=missing("no limit"), governor=given("performance"), turbo=given(False),
    huge_pages=given("madvise"), numa_nodes=given(1), load=given(0.1), memory_bytes=given(64 * GIB),
    memory_available_bytes=given(60 * GIB), swap_bytes=given(0), swap_used_bytes=given(0),
    container=missing("none"),
)  # fmt: skip
FACTS = CardFacts(
    name=given("Card"), uuid=given("GPU-1"), driver=given("580"), power_limit_w=given(700.0),
    default_power_limit_w=given(700.0), max_sm_clock_hz=given(1.98e9), max_memory_clock_hz=given(2.6e9),
    slowdown_temperature_c=given(87.0), ecc=given(True), corrected_errors=given(0), uncorrected_errors=given(0),
    mig=given(False), persistence=given(True), clocks_need_root=given(False),
)  # fmt: skip
SAMPLE = CardSample(
    energy_j=given(5.0), power_w=given(70.0), sm_clock_hz=given(3e8), memory_clock_hz=given(2.6e9),
    temperature_c=given(35.0), temperature_margin_c=given(52.0), events=given(("gpu_idle",)),
    thermal_slowdown_s=given(0.0), power_slowdown_s=given(0.0),
)  # fmt: skip
ALONE = Neighbours(
    own_bytes=missing("holds none"),
    used_bytes=given(0),
    others=given(()),
    others_bytes=given(0),
    hidden_bytes=given(0),
    statement="",
)
CARD = Card(facts=FACTS, sample=SAMPLE, memory=given(Memory(total=80 * GIB, free=79 * GIB, used=0)),
            neighbours=ALONE, sliced=False)  # fmt: skip


@pytest.fixture
def found(machine):
    """A quiet machine without a card."""
    return Survey(
        machine=machine, system=SYSTEM, packages=dict.fromkeys((*REQUIRED, *OPTIONAL), "1.0"),
        host={"watched_s": 1.0, "cpu_stall_s": 0.0, "steal_s": 0.0, "busy_s": 1.0, "memory_stall_s": 0.0,
              "quota_stall_s": 0.0, "quota_used_s": 1.0}, host_missing={},
        peaks=True, card=missing("no driver"), cards=missing("no driver"), visible=missing("no driver"),
        links=missing("no driver"),
        runs=given(DISK), environment={}, root=False,
    )  # fmt: skip


def on_card(found, **changes):
    """The same machine with a card, of which some things are different."""

    def changed(part):
        own = {field.name for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: value for name, value in changes.items() if name in own})

    parts = {name: changed(getattr(CARD, name)) for name in ("facts", "sample", "neighbours")}
    card = dataclasses.replace(changed(CARD), **parts)
    machine = dataclasses.replace(
        found.machine, device="cuda", device_name="Card", device_memory_bytes=80 * GIB, cuda="13.0", driver="580"
    )
    return dataclasses.replace(found, machine=machine, card=given(card))


def by_name(found):
    return {check.name: check for check in examine(found)}


def test_a_quiet_machine_is_fit_and_nothing_is_to_be_done(found):
    """With and without a card."""
    for one in (found, on_card(found)):
        checks = examine(one)
        assert is_fit(checks)
        assert {check.standing for check in checks} == {"good"}
        assert not any(check.remedy for check in checks)


def test_a_card_that_no_program_can_use_is_unfit(found):
    """A container can be given NVML without CUDA: nvidia-smi shows the card there, and every trial would crash."""
    one = dataclasses.replace(on_card(found), lacks_driver="libcuda.so.1: cannot open shared object file")
    check = by_name(one)["device"]
    assert (check.standing, is_fit(examine(one))) == ("unfit", False)
    assert "libcuda.so.1: cannot open" in check.found
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in check.remedy


@pytest.mark.parametrize(("library", "told"), [("libc.so.6", None), ("libno-such.so.1", "libno-such.so.1: ")])
def test_the_loader_says_what_it_cannot_load(library, told):
    """In its own words."""
    found = cannot_load(library)
    assert found is None if told is None else found.startswith(told)


@pytest.mark.parametrize(
    ("name", "standing", "changes"),
    [
        ("load", "bad", {"load": given(3.5)}),
        ("governor", "bad", {"governor": given("powersave")}),
        ("turbo", "note", {"turbo": given(True)}),
        ("huge pages", "note", {"huge_pages": given("always")}),
        ("memory nodes", "bad", {"numa_nodes": given(2)}),
        ("swap", "note", {"swap_bytes": given(GIB)}),
        ("swap", "bad", {"swap_bytes": given(GIB), "swap_used_bytes": given(4096)}),
        ("CPU quota", "bad", {"quota_cpus": given(1.5)}),
        ("threads", "unfit", {"quota_cpus": given(0.5)}),
        ("memory", "unfit", {"memory_available_bytes": given(200 * 2**20)}),
        ("container", "note", {"container": given("/.dockerenv is there")}),
    ],
)
def test_what_would_spoil_a_measurement_on_the_host(found, name, standing, changes):
    """Each has its remedy; only what no trial could bear makes the machine unfit."""
    one = dataclasses.replace(found, system=dataclasses.replace(SYSTEM, **changes))
    check = by_name(one)[name]
    assert check.standing == standing
    assert check.remedy
    assert is_fit(examine(one)) is (standing != "unfit")


@pytest.mark.parametrize(
    ("load", "stalled_s", "standing"),
    [(3.5, 0.0, "bad"), (4.0, 0.9, "bad"), (15.2, 0.9, "unfit"), (15.2, None, "unfit"), (15.2, 0.0, "bad")],
)
def test_a_machine_that_others_have_is_unfit(found, load, stalled_s, standing):
    """A load above all CPUs leaves none free; one that lags behind work that has ended is not waited for by anybody."""
    watched = {name: value for name, value in found.host.items() if name != "cpu_stall_s"}
    if stalled_s is not None:
        watched["cpu_stall_s"] = stalled_s * found.host["watched_s"]
    one = dataclasses.replace(found, system=dataclasses.replace(SYSTEM, load=given(load), cpus=4), host=watched)
    assert by_name(one)["load"].standing == standing
    assert is_fit(examine(one)) is (standing != "unfit")


@pytest.mark.parametrize(
    ("load", "words"), [(0.1, "is fit to measure. Checks"), (3.5, "with less precision: mend what is bad")]
)
def test_a_bad_check_is_part_of_the_answer(found, load, words):
    """The last line is read alone."""
    checks = examine(dataclasses.replace(found, system=dataclasses.replace(SYSTEM, load=given(load), cpus=4)))
    assert words in text_of(describe_checks(checks, fit=is_fit(checks)), width=200, coloured=False)


@pytest.mark.parametrize(
    ("name", "counter", "seconds"),
    [("waiting", "cpu_stall_s", 0.5), ("paging", "memory_stall_s", 0.05)],
)
def test_what_others_do_now_is_a_share_of_the_time_that_was_watched(found, name, counter, seconds):
    """Beside the share from which it matters."""
    check = by_name(dataclasses.replace(found, host=found.host | {counter: seconds}))[name]
    assert check.standing == "bad"
    assert f"{seconds:.0%} of 1.0 s" in check.found


@pytest.mark.parametrize(
    ("name", "withheld", "given"),
    [("stolen time", "steal_s", "busy_s"), ("withheld time", "quota_stall_s", "quota_used_s")],
)
def test_what_was_not_given_is_a_share_of_the_cpu_time_that_was_asked_for(found, name, withheld, given):
    """Of 64 CPUs 0.5 % is not much; of too little no share is told; what was given may be unknown."""

    def check(**host):
        known = {key: value for key, value in (found.host | host).items() if value is not None}
        missing_ones = {given: "no permission"}
        return by_name(dataclasses.replace(found, host=known, host_missing=missing_ones))[name]

    assert check(**{withheld: 0.32, given: 63.68}).standing == "good"
    much = check(**{withheld: 0.5, given: 1.5})
    assert (much.standing, bool(much.remedy)) == ("bad", True)
    assert "25% of 2.0 s of CPU time" in much.found
    assert check(**{withheld: 0.01, given: 0.1}).standing == "note"
    unknown = check(**{withheld: 0.5, given: None})
    assert (unknown.standing, unknown.found) == ("note", "not available: no permission")


@pytest.mark.parametrize(
    ("name", "standing", "changes"),
    [
        ("persistence", "bad", {"persistence": given(False)}),
        ("power limit", "bad", {"power_limit_w": given(400.0)}),
        ("clock lock", "note", {"clocks_need_root": given(True)}),
        ("MIG", "note", {"sliced": True}),
        ("throttling", "unfit", {"events": given(("hw_thermal_slowdown",))}),
        ("heat", "bad", {"temperature_margin_c": given(2.0)}),
        ("ECC", "unfit", {"uncorrected_errors": given(3)}),
        ("other processes", "bad", {"others": given((7,)), "others_bytes": given(GIB // 4)}),
        ("other processes", "unfit", {"others": given((7, 9)), "others_bytes": given(20 * GIB)}),
        ("other processes", "unfit", {"statement": "who?", "used_bytes": given(60 * GIB)}),
    ],
)  # fmt: skip
def test_what_would_spoil_a_measurement_on_a_card(found, name, standing, changes):
    """Each has its remedy."""
    one = on_card(found, **changes)
    check = by_name(one)[name]
    assert check.standing == standing
    assert check.remedy
    assert is_fit(examine(one)) is (standing != "unfit")


def test_root_may_lock_the_clocks(found):
    """So that is nothing to note."""
    one = dataclasses.replace(on_card(found, clocks_need_root=given(True)), root=True)
    assert by_name(one)["clock lock"].standing == "good"


def test_what_the_card_does_not_tell_is_a_note_with_its_reason(found):
    """Nothing of it makes the machine unfit."""
    why = missing("nvmlDevice...: not permitted")
    silent = {field.name: why for part in (FACTS, SAMPLE) for field in dataclasses.fields(part) if field.name != "name"}
    one = on_card(found, **silent, others=why, statement="cannot be seen")
    checks = by_name(one)
    assert is_fit(examine(one))
    for name in ("energy", "clock reasons", "throttled time", "heat margin", "neighbours", "persistence", "ECC"):
        assert checks[name].standing == "note"
        assert "not permitted" in checks[name].found


def test_missing_packages_make_a_machine_unfit_and_missing_extras_do_not(found):
    """With the command that installs them."""
    lacking = dataclasses.replace(found, packages=found.packages | {"peft": None})
    assert by_name(lacking)["packages"].standing == "unfit"
    assert by_name(lacking)["packages"].remedy == "pip install peft"
    extra = dataclasses.replace(found, packages=found.packages | {"gguf": None})
    assert by_name(extra)["gguf"].standing == "note"
    assert is_fit(examine(extra))


def test_where_trials_run_is_said_when_it_may_surprise(found):
    """A card with a torch for CPUs, a torch for cards without one, cards of several kinds."""
    unused = dataclasses.replace(on_card(found), machine=found.machine)
    assert by_name(unused)["device"].standing == "bad"
    absent = dataclasses.replace(found, machine=dataclasses.replace(found.machine, cuda="13.0"))
    assert "no driver" in by_name(absent)["device"].found
    mixed = dataclasses.replace(on_card(found), cards=given(("Fast", "Slow")))
    assert by_name(mixed)["device order"].standing == "note"
    ordered = dataclasses.replace(mixed, environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert "device order" not in by_name(ordered)


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_process_takes_what_torch_is_built_for(found, cuda):
    """A build for CUDA more, also where there is no card: as much as the estimates say, or it does not fit."""
    built = dataclasses.replace(found, machine=dataclasses.replace(found.machine, cuda=cuda))
    least = bare_process_bytes(cuda)
    for free, standing in ((least, "good"), (least - 1, "unfit")):
        system = dataclasses.replace(SYSTEM, memory_available_bytes=given(free))
        check = by_name(dataclasses.replace(built, system=system))["memory"]
        assert check.standing == standing
        assert f"takes {format_bytes(least)} before its model" in check.found


def test_the_process_counts_in_the_models_that_fit(found):
    """What one more MiB of it would push out is out: the smallest model, with just enough for a build for CPUs."""
    shape = shapes.shape(catalogue.resolve("random:tiny-llama"))
    room = estimate_memory(Variant(name="nf4", quantization="nf4"), Workload(), shape).needed_bytes
    tight = dataclasses.replace(found, system=dataclasses.replace(SYSTEM, memory_available_bytes=given(room)))
    assert "tiny-llama" in by_name(tight)["models"].found
    built = dataclasses.replace(tight, machine=dataclasses.replace(tight.machine, cuda="13.0"))
    assert "tiny-llama" not in by_name(built)["models"].found


def test_models_that_fit_follow_from_the_free_memory(found):
    """Less of it, fewer models; on a card its own counts."""
    little = dataclasses.replace(found, system=dataclasses.replace(SYSTEM, memory_available_bytes=given(2 * GIB)))
    assert "llama2-7b" not in by_name(little)["models"].found
    assert "llama2-7b" in by_name(found)["models"].found.partition(";")[0]
    assert "llama2-7b" in by_name(on_card(little))["models"].found


def test_the_table_shows_every_check(found):
    """With the verdict in one line."""
    checks = examine(on_card(found, events=given(("hw_slowdown",))))
    console = Console(width=200, record=True, file=io.StringIO())
    show(describe_checks(checks, fit=is_fit(checks)), console)
    text = console.export_text()
    assert all(check.name in text for check in checks)
    assert "This machine is unfit" in text


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"peaks": False}, 4)])
def test_the_command_exits_by_its_verdict(found, monkeypatch, capsys, change, code):
    """One JSON document with a schema; 0 is fit, 4 unfit."""
    monkeypatch.setattr("harness.machine.doctor.survey", lambda runs: dataclasses.replace(found, **change))
    assert cli.main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 2
    assert document["fit"] is (code == 0)
    assert {"about", "name", "standing", "found", "remedy"} == set(document["checks"][0])
    assert cli.main(["doctor"]) == code
    assert "This machine is" in capsys.readouterr().out


def test_this_machine_can_be_looked_at(tmp_path):
    """Whatever it is, nothing raises and every check says something."""
    from harness.machine.doctor import survey

    checks = examine(survey(tmp_path / "runs", look_s=0.01))
    assert {check.about for check in checks} == {"runs", "measures", "spoils"}
    assert all(check.found for check in checks)


def four_cards(through, active=(18, 18, 18, 18)):
    """Links of four cards: by NVLink, but for the pairs that are given."""
    pairs = tuple(
        Pair(first=one, second=other, through=through.get((one, other), given(NVLINK)))
        for one, other in itertools.combinations(range(4), 2)
    )
    return given(Links(pairs=pairs, active=tuple((number, given(count)) for number, count in enumerate(active))))


def test_one_card_has_nobody_to_reach(found):
    """Nor has none."""
    alone = given(Links(pairs=(), active=((0, missing("no NVLink")),)))
    for links in (alone, missing("no driver")):
        assert "interconnect" not in by_name(dataclasses.replace(on_card(found), links=links))


def test_how_cards_reach_each_other_is_said(found):
    """All alike is good; ways that differ, or are not known, are worth a note with the cards' numbers."""

    def check(through, **changes):
        return by_name(dataclasses.replace(on_card(found), links=four_cards(through, **changes)))["interconnect"]

    alike = check({})
    assert (alike.standing, alike.found, alike.remedy) == ("good", "all cards by NVLink", "")
    near = given("one PCIe switch")
    switched = check(dict.fromkeys(itertools.combinations(range(4), 2), near))
    assert (switched.standing, switched.found) == ("good", "all cards by one PCIe switch")
    far = check({(0, 3): given("the link between memory nodes"), (1, 2): missing("the driver is too old for it")})
    assert far.standing == "note"
    assert "cards 0 and 3 by the link between memory nodes" in far.found
    assert "cards 1 and 2: " in far.found
    assert "too old" in far.found
    assert "CUDA_VISIBLE_DEVICES" in far.remedy
    everywhere = check(dict.fromkeys(itertools.combinations(range(4), 2), given("the link between memory nodes")))
    assert (everywhere.standing, everywhere.found) == ("note", "all cards by the link between memory nodes")


def test_a_card_whose_links_are_down_is_named(found):
    """The others have more: every exchange waits for it."""
    checks = by_name(dataclasses.replace(on_card(found), links=four_cards({}, active=(18, 18, 16, 18))))
    assert checks["NVLinks"].standing == "bad"
    assert "card 2 has 16 up, others 18" in checks["NVLinks"].found
    assert "NVLinks" not in by_name(dataclasses.replace(on_card(found), links=four_cards({})))


def test_ranks_that_would_share_a_card_are_told_of(found):
    """Instances of one card are named as they are made visible; cards of their own are nothing to tell of."""

    def seen(*boards):
        cards = (
            VisibleCard(entry=f"MIG-{n}", name=given("1g.10gb"), board=board, power_limit_w=given(700.0))
            for n, board in enumerate(boards)
        )
        return by_name(dataclasses.replace(on_card(found), visible=given(tuple(cards))))

    check = seen(given("GPU-1"), given("GPU-2"), given("GPU-1"))["ranks"]
    assert check.standing == "note"
    assert "MIG-0 and MIG-2 are parts of one card" in check.found
    assert "CUDA_VISIBLE_DEVICES" in check.remedy
    for boards in ((given("GPU-1"), given("GPU-2")), (given("GPU-1"),), (missing("gone"), missing("gone"))):
        assert "ranks" not in seen(*boards)


def test_a_server_that_shares_the_card_is_found_by_its_pipes(found, tmp_path):
    """Where trials run on a card, and its daemon is there."""
    one = dataclasses.replace(on_card(found), environment={"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
    assert "MPS" not in by_name(one)
    (tmp_path / "control").touch()
    assert by_name(one)["MPS"].standing == "bad"
    assert "MPS" not in by_name(dataclasses.replace(one, card=missing("no driver")))
    shared = dataclasses.replace(one, environment={**one.environment, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"})
    assert "25 % of a card" in by_name(shared)["MPS"].found


@pytest.mark.parametrize(
    ("changes", "standing", "words"),
    [
        ({}, "good", "lies on ext4; locks hold"),
        ({"kind": "overlay"}, "good", "lies on overlay"),
        ({"kind": "nfs4", "options": ("rw", "vers=4.2", "local_lock=none")}, "note", "other machines may share"),
        ({"kind": "nfs", "options": ("rw", "nolock")}, "bad", "nfs with nolock"),
        ({"kind": "nfs4", "options": ("rw", "local_lock=flock")}, "bad", "on this machine alone"),
        ({"kind": "lustre", "options": ("rw", "localflock")}, "bad", "lustre with localflock"),
        ({"kind": "fuse.gcsfuse"}, "bad", "an object store"),
        ({"kind": "tmpfs"}, "bad", "lies on tmpfs, which is memory"),
        ({"kind": "overlay", "options": ("rw", "volatile")}, "bad", "overlay with volatile"),
        ({"kind": "ext4", "options": ("rw", "nobarrier")}, "bad", "ext4 with nobarrier: what was synced can be lost"),
        ({"kind": "ext4", "options": ("rw", "barrier=0")}, "bad", "ext4 with barrier=0"),
        ({"kind": "ext4", "options": ("rw", "barrier=1")}, "good", "locks hold"),
        ({"kind": "f2fs", "options": ("rw", "fsync_mode=nobarrier")}, "bad", "f2fs with fsync_mode=nobarrier"),
        ({"kind": "nfs", "options": ("rw", "volatile")}, "note", "other machines may share"),
        ({"locks": Reading(value=False)}, "bad", "keeps nobody out"),
        ({"locks": missing("no lock can be tried in /runs: Read-only file system")}, "bad", "Read-only"),
    ],
)
def test_where_runs_would_be_written(found, changes, standing, words):
    """By the type of its file system, by the options of its mount, and by a lock that was tried."""
    check = by_name(dataclasses.replace(found, runs=given(dataclasses.replace(DISK, **changes))))["runs folder"]
    assert (check.standing, words in check.found) == (standing, True), check.found
    assert bool(check.remedy) == (standing != "good")
    assert is_fit(examine(found))


def test_a_place_is_read_from_the_mounts(tmp_path):
    """The longest mount above it, and of several on one point the last; a folder that is not there yet is that above
    it. What the kernel does not say is missing."""
    inner = tmp_path / "with space"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"2 1 0:5 / {escaped} rw - nfs4 host:/export rw,vers=4.2,local_lock=none\n"
        f"3 1 0:6 / {escaped} rw,noexec - lustre mds@tcp:/fs rw,flock\n"
        "not a line of it\n"
    )
    place = place_of(inner / "runs" / "later", mounts).value
    assert (place.path, place.kind, place.shared, place.local_locks) == (str(inner), "lustre", True, "")
    assert "flock" in place.options
    assert place.locks.value is True
    assert place_of(tmp_path, mounts).value.kind == "ext4"
    assert not list(inner.iterdir())
    assert "cannot be read" in place_of(tmp_path, tmp_path / "none").reason
    assert place_of(tmp_path).known  # of this machine


def test_a_folder_that_cannot_be_looked_for_is_missing_with_the_reason(tmp_path, monkeypatch):
    """The one in which the command was started was removed, or a name is longer than any file system takes."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "No such file" in place_of(Path("runs")).reason
    monkeypatch.chdir(tmp_path)
    assert place_of(tmp_path / ("x" * 5000)).value.path == str(tmp_path.resolve())
