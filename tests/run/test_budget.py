"""A limit of time holds within a replicate too and cuts all variants alike; the fake commands move the clock."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest

from harness.errors import UsageError
from harness.records.metrics import PHASES
from harness.records.record import Failure, Fragment
from harness.run.budget import LEAST_ROUNDS, MEDIAN_TURNS, Budget
from harness.run.executors import Place
from harness.run.plan import make_plan
from harness.run.runner import find_unsettled, run_plan
from harness.run.site import Site
from harness.run.stopping import Stopping
from harness.run.thinning import tell_left_out
from harness.studies.variant import Variant
from harness.verdicts.series import compare_series, series_of
from tests.run.real_figures import GEMMA3, NAMES, SMOLLM2, Machine, study_of

COSTS = {
    "build": 5.0, "verify": 4.0, "warm_up": 6.0, "turn": 10.0, "train": 10.0, "finish_training": 3.0, "request": 4.0,
    "cold": 8.0,
}  # fmt: skip
"""Of a turn and of untimed training: for two steps."""
TURNS, REQUESTS, WARM_UP = 8, 6, 2
SITE = Site(device="cpu", threads=1, tokens_path="t", tokens={})


class Timed:
    """Executor and worker in one: every command takes its cost of the simulated time."""

    start_latency_s = 0.01

    def __init__(self, costs):
        self.costs = COSTS | costs
        self.now = 0.0
        self.asked = []
        self.limits = {}
        self.requests = {}

    def clock(self):
        return self.now

    def make_place(self, trial, log):
        return Place(scratch=trial, log_path=log)

    def clear_place(self, trial):
        pass

    def launch(self):
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        of_steps = command in ("turn", "train")
        seconds = self.costs.get(command, 0.0) * (arguments["steps"] / 2 if of_steps else 1)
        asked = self.requests.get(trial, {})
        if command == "verify" and asked.get("natural") and asked["instrument"] == "spy":
            seconds = self.costs["turn"] / 2  # it looks on at a step that is taken anyway
        self.now += seconds
        self.asked.append((trial, command))
        if command == "prepare":
            self.requests[trial] = arguments["request"]
        if command == "finish_training" and "solo" not in trial:
            self.limits[trial] = arguments.get("steps")
        if command == "build":
            return Fragment(values={"build_step_time_s": self.costs["turn"] / 2})
        if command == "warm_up":
            steps = self.requests[trial].get("warm_up_steps", WARM_UP)
            return Fragment(samples={"warmup_step_time_s": (self.costs["turn"] / 2,) * steps})
        if command == "turn":
            steps = arguments["steps"]
            return Fragment(samples={"step_time_s": (0.1,) * steps, "step_cpu_time_s": (0.1,) * steps})
        return Fragment(samples={"request_time_s": (0.2,)}) if command == "request" else Fragment()

    def cold_start(self, request):
        self.now += self.costs["cold"]
        return Fragment(samples={"cold_start_time_s": (1.0,)})

    def close(self):
        pass


class Quiet:
    """A watcher that only watches."""

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        pass


@pytest.fixture
def measured(small_study):
    """A function that measures the small study in simulated time; returns the executor and the records by trial."""

    def measure(limit_s, *, level="lockstep", costs=None, replicates=1, phases=("train", "generate"), **protocol):
        changed = dataclasses.replace(
            small_study.protocol, turns=TURNS, generate_requests=REQUESTS, replicates=replicates, merged=False,
            max_minutes=None if limit_s is None else limit_s / 60, **protocol,
        )  # fmt: skip
        plan = make_plan(dataclasses.replace(small_study, protocol=changed), interleaving=level, phases=phases)
        executor = Timed(costs or {})
        budget = Budget(limit_s, clock=executor.clock, replicates=replicates, cold_s=executor.costs["cold"])
        site = Site(device="cpu", threads=1, tokens_path="t", tokens={})
        found = run_plan(
            plan, {"": executor}, site, save=lambda record: None, watcher=Quiet(), budget=budget,
            stop=Stopping(plan, budget),
        )  # fmt: skip
        executor.notices = tell_left_out(found.left_out, found.records)
        return executor, {record.trial: record for record in found.records}

    return measure


def rounds(executor, command, replicate=0):
    """How often each trial that takes turns was asked for it."""
    wanted = f"r{replicate}-"
    return Counter(trial for trial, asked in executor.asked if asked == command and trial.startswith(wanted))


def test_enough_time_cuts_nothing(measured):
    """All rounds of all trials, and no record says otherwise."""
    executor, records = measured(10_000.0)
    assert set(rounds(executor, "turn").values()) == {TURNS}
    assert set(rounds(executor, "request").values()) == {REQUESTS}
    assert not any(key.endswith("_planned") for record in records.values() for key in record.values)
    assert set(executor.limits.values()) == {None}


@pytest.mark.parametrize("limit_s", [200.0, 230.0, 260.0, 300.0])
def test_too_little_time_cuts_all_variants_alike(measured, limit_s):
    """Whole rounds are dropped, so each trial has the same number of turns, in both phases, and the limit holds."""
    whole = measured(None)[0].now
    executor, records = measured(limit_s)
    (turns,), (requests,) = set(rounds(executor, "turn").values()), set(rounds(executor, "request").values())
    assert LEAST_ROUNDS <= turns < TURNS
    assert LEAST_ROUNDS <= requests <= REQUESTS
    assert executor.now <= limit_s < whole
    timed = [record for record in records.values() if not record.trial.endswith("solo")]
    for record in timed:
        assert record.status == "ok"
        assert len(record.turn_lengths) == record.values["steps_rounds"] == turns
        assert record.values["steps_rounds_planned"] == TURNS
        assert ("requests_rounds" in record.values) == (requests < REQUESTS)


def test_a_limit_that_not_one_replicate_keeps_is_refused(measured):
    """By the first steps, in one sentence and with the minutes that it takes; one that it just keeps is measured."""
    with pytest.raises(UsageError, match=r"max_minutes = 0\.5: .* takes 2 min .* not even one fits\. Give 3 minutes"):
        measured(30.0, replicates=3, phases=("train", "generate", "cold"))
    executor, records = measured(150.0, replicates=3, phases=("train", "generate", "cold"))
    assert {record.replicate for record in records.values()} == {0}
    assert {record.status for record in records.values()} == {"ok"}
    assert set(rounds(executor, "turn").values()) == {LEAST_ROUNDS}
    assert executor.now <= 1.1 * 150.0


def test_one_process_at_a_time_is_cut_evenly_too(measured):
    """At `replicates` the first trial's share decides, and those that come later get no more turns than it had."""
    executor, records = measured(200.0, level="replicates")
    turns = set(rounds(executor, "turn").values())
    assert len(turns) == 1
    assert LEAST_ROUNDS <= min(turns) < TURNS
    assert executor.now <= 200.0
    assert [record.status for record in records.values()] == ["ok"] * 3


def test_a_trial_that_is_slower_than_the_others_costs_none_of_them_their_least(measured):
    """Where the time runs out in the first replicate, the rest of it gets its least, in the order of the plan."""
    executor, records = measured(180.0, level="replicates", costs={"warm_up": 45.0})
    assert len(rounds(executor, "turn")) == len(records) == 3
    assert list(rounds(executor, "turn").values())[-1] == LEAST_ROUNDS
    assert min(rounds(executor, "request").values()) == LEAST_ROUNDS


def test_generation_keeps_its_share(measured):
    """Turns that take long do not eat the time of the requests: these are not cut to their least by them."""
    executor, _ = measured(600.0, costs={"turn": 30.0, "request": 10.0})
    assert LEAST_ROUNDS < min(rounds(executor, "turn").values()) < TURNS
    assert min(rounds(executor, "request").values()) > LEAST_ROUNDS
    assert executor.now <= 600.0


def test_what_was_seen_decides_in_later_replicates(measured):
    """A replicate that is known to fit is not cut, although its requests are much cheaper than its turns."""
    executor, records = measured(
        2.03 * measured(None, costs={"request": 0.1})[0].now, costs={"request": 0.1}, replicates=2
    )
    assert {record.replicate for record in records.values()} == {0, 1}
    assert set(rounds(executor, "turn", 0).values()) == set(rounds(executor, "turn", 1).values()) == {TURNS}
    assert set(rounds(executor, "request", 1).values()) == {REQUESTS}


def test_a_replicate_that_turns_out_slower_is_cut_to_the_limit(measured, monkeypatch):
    """It was begun because it would fit; when the machine gets slow its rounds are dropped, for all alike."""
    asked = Timed.ask

    def slowing(self, command, trial, timeout_s, **arguments):
        answer = asked(self, command, trial, timeout_s, **arguments)
        self.now += 10.0 if command == "turn" and trial.startswith("r1") else 0.0
        return answer

    limit = 2.05 * measured(None)[0].now
    monkeypatch.setattr(Timed, "ask", slowing)
    executor, _ = measured(limit, replicates=2)
    (turns,) = set(rounds(executor, "turn", 1).values())
    assert LEAST_ROUNDS <= turns < TURNS == max(rounds(executor, "turn", 0).values())
    assert executor.now <= limit


def test_training_that_is_cut_ends_after_the_same_step_everywhere(measured):
    """The dropped turns are not made up for by untimed steps, and every trial is told the same last step."""
    executor, records = measured(200.0)
    (timed,) = {sum(records[trial].turn_lengths) for trial in turns_of(records)}
    assert {executor.limits[trial] for trial in turns_of(records)} == {1 + WARM_UP + timed}


def turns_of(records):
    return [trial for trial, record in records.items() if "step_time_s" in record.samples]


def test_epochs_are_limited_for_all_alike(measured):
    """The untimed steps that the epochs leave come in rounds, too, and have a share of the time like the others."""
    whole, records = measured(None, epochs=10.0)
    (planned,) = set(rounds(whole, "train").values())
    assert 1 + WARM_UP + 2 * (TURNS + planned) in (80, 81)  # ten epochs of 16 sequences, two a step
    assert set(whole.limits.values()) == {None}
    executor, records = measured(700.0, epochs=10.0)
    (turns,), (untimed,) = (set(rounds(executor, command).values()) for command in ("turn", "train"))
    assert LEAST_ROUNDS <= turns < TURNS
    assert 0 < untimed < planned
    (timed,) = {sum(records[trial].turn_lengths) for trial in turns_of(records)}
    assert {executor.limits[trial] for trial in turns_of(records)} == {1 + WARM_UP + timed + 2 * untimed}
    assert min(rounds(executor, "request").values()) >= LEAST_ROUNDS
    assert executor.now <= 700.0 + 3 * COSTS["turn"] < whole.now


def test_without_time_epochs_are_left_out(measured):
    """What is not timed has no least."""
    executor, records = measured(180.0, epochs=10.0)
    assert not rounds(executor, "train")
    assert set(rounds(executor, "turn").values()) == {LEAST_ROUNDS}
    assert {executor.limits[trial] for trial in turns_of(records)} == {1 + WARM_UP + LEAST_ROUNDS}


def test_trials_that_were_cut_are_compared_turn_by_turn(measured):
    """Equal numbers of turns pair; the comparison is one like any other."""
    _, records = measured(200.0)
    groups = series_of(list(records.values()))
    found = compare_series(groups["plain", "variant"], groups["nf4", "variant"], "step_time_s")
    assert found.ratio == pytest.approx(1.0)


def test_losses_after_other_numbers_of_steps_are_not_compared(measured):
    """A training that was cut and one that was not, or was cut elsewhere, are two trainings."""
    _, records = measured(None, replicates=2)
    kept = []
    for record in records.values():
        cut = record.replicate == 1
        steps = {"training_steps": 9.0 if cut else 19.0} | ({"training_steps_planned": 19.0} if cut else {})
        kept.append(record.replaced(values=record.values | steps | {"held_out_loss": 2.0 - cut}))
    groups = series_of([record for record in kept if "step_time_s" in record.samples])
    plain, nf4 = groups["plain", "variant"], groups["nf4", "variant"]
    assert plain.trials("held_out_loss") == [(2.0,)]
    assert len(plain.trials("step_time_s")) == 2
    assert compare_series(plain, nf4, "held_out_loss").replicates == 1
    other = dataclasses.replace(nf4, records=tuple(record for record in nf4.records if record.replicate == 1))
    assert compare_series(dataclasses.replace(plain, records=plain.records[:1]), other, "held_out_loss") is None
    assert compare_series(plain, other, "held_out_loss") is None


def replicates_of(records):
    """How many replicates left a record."""
    return len({record.replicate for record in records.values()})


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
def test_the_time_is_spread_over_replicates(measured, share):
    """Where five whole replicates do not fit, each is cut, and none takes all that the others would need."""
    whole = measured(None, replicates=5)[0].now
    executor, records = measured(share * whole, replicates=12)
    assert replicates_of(records) >= 5
    assert executor.now <= share * whole
    turns = [next(iter(rounds(executor, "turn", replicate).values())) for replicate in range(5)]
    assert LEAST_ROUNDS <= min(turns) < TURNS


@pytest.mark.parametrize("limit_s", [400.0, 700.0, 1500.0, 3000.0])
@pytest.mark.parametrize("level", ["lockstep", "replicates"])
@pytest.mark.parametrize("load_s", [5.0, 40.0])
def test_the_limit_is_kept_and_used(measured, limit_s, level, load_s):
    """Whatever a load takes: it is late by a round of everything at most, and not half of it is left over."""
    costs = {"cold": load_s, "verify": load_s}
    executor, records = measured(limit_s, level=level, costs=costs, replicates=40, phases=("train", "generate", "cold"))
    a_round = 3 * (COSTS["turn"] + COSTS["request"])
    assert executor.now <= max(1.1 * limit_s, limit_s + a_round)
    assert executor.now >= 0.8 * limit_s
    assert sum("cold_start_time_s" in record.samples for record in records.values()) == 2  # none of a control
    assert {record.status for record in records.values()} == {"ok"}


def test_what_is_paid_once_costs_no_later_replicate(measured):
    """The profile for the evidence and cold starts are the first replicate's; the others are not foreseen with them."""
    costs = {"verify": 60.0, "cold": 60.0}

    def spied(self, command, trial, timeout_s, **arguments):
        answer = asked(self, command, trial, timeout_s, **arguments)
        self.now -= 56.0 if command == "verify" and not (trial.startswith("r0") and "solo" not in trial) else 0.0
        return answer

    asked = Timed.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timed, "ask", spied)
        executor, records = measured(2000.0, costs=costs, replicates=40, phases=("train", "cold"))
    assert replicates_of(records) >= 5
    assert 1700.0 <= executor.now <= 2100.0


def test_turns_that_are_worth_less_than_they_cost_make_room(measured, monkeypatch):
    """Where replicates differ far more than turns, later ones take fewer turns and there are more of them."""
    asked = Timed.ask

    def differing(self, command, trial, timeout_s, **arguments):
        answer = asked(self, command, trial, timeout_s, **arguments)
        if command != "turn":
            return answer
        replicate, turn = int(trial[1 : trial.index("-")]), len(self.asked)
        step = 0.1 * (1 + 0.2 * (replicate % 3) * ("nf4" in trial) + 0.001 * (turn % 5))
        return Fragment(samples={"step_time_s": (step,) * 2, "step_cpu_time_s": (step,) * 2})

    many, _ = measured(4000.0, replicates=40, phases=("train",))
    monkeypatch.setattr(Timed, "ask", differing)
    executor, records = measured(4000.0, replicates=40, phases=("train",))
    turns = [rounds(executor, "turn", replicate)[f"r{replicate}-plain"] for replicate in range(6)]
    assert turns[0] == TURNS
    assert turns[3:] == [MEDIAN_TURNS] * 3  # of a median, whatever is best for a mean
    before = len({trial for trial, command in many.asked if command == "turn"}) / 3
    assert replicates_of(records) > 1.5 * before
    assert executor.now <= 4100.0


def test_what_is_measured_beside_has_what_is_left_from_its_own_begin():
    """Of a limit; without one it has none either. One that begins later has less."""
    now = [100.0]
    whole = Budget(60.0, replicates=6, clock=lambda: now[0])
    now[0] += 20
    first = whole.beside(3)
    now[0] += 25
    assert (first.left_s, whole.beside(3).left_s) == (15.0, 15.0)
    assert Budget(clock=lambda: now[0]).beside(3).left_s == math.inf


COSTLY = {"request": 20.0, "begin_generate": 20.0}
"""A model whose requests take longer than all of its steps."""


def requested(executor):
    """The replicates in which there was a request."""
    return {int(trial[1 : trial.index("-")]) for trial, command in executor.asked if command == "request"}


def test_later_replicates_leave_out_what_would_cost_them_their_number(measured):
    """Where five of all do not fit, all phases are measured once and the steps five times; what is left out is said."""
    limit_s = 1100.0
    executor, records = measured(limit_s, costs=COSTLY, replicates=12, phases=PHASES)
    assert replicates_of(records) >= 5
    assert requested(executor) == {0}
    assert {record.status for record in records.values()} == {"ok"}
    assert {record.replicate for record in records.values() if "cold_start_time_s" in record.samples} == {0}
    assert executor.now <= 1.1 * limit_s
    (notice,) = executor.notices
    assert notice.code == "left-out"
    assert "peaks of memory, requests" in notice.message
    assert not measured(None, costs=COSTLY, replicates=3, phases=PHASES)[0].notices


def test_what_no_replicate_measured_is_not_said_to_be_of_the_others(measured):
    """The limit left out the requests of the only replicate; of several the numbers are those of the others."""
    (notice,) = measured(160.0, costs=COSTLY, replicates=5, phases=PHASES)[0].notices
    assert "No replicate measured peaks of memory, requests." in notice.message
    assert "other replicates" not in notice.remedy
    (notice,) = measured(400.0, costs=COSTLY, replicates=5, phases=PHASES)[0].notices
    assert "requests" not in notice.message.partition("No replicate measured ")[2]
    assert notice.remedy.startswith("The numbers of requests are those of the other replicates.")


@pytest.mark.parametrize("asked", [{"phases": ("train", "generate")}, {"phases": PHASES, "precision": 0.01}])
def test_nothing_is_left_out_whose_interval_is_asked_for(measured, asked):
    """Phases that were named, and all where a precision decides: there are fewer replicates then."""
    executor, records = measured(1100.0, costs=COSTLY, replicates=12, **asked)
    assert not executor.notices
    assert requested(executor) == set(range(replicates_of(records)))
    assert 1 < replicates_of(records) < 5


def test_only_as_much_is_left_out_as_must_be(measured):
    """The solo trials alone, where that is enough: trials that take turns tell their own peaks, but for the first
    replicate, in which they are profiled."""
    executor, records = measured(1500.0, costs={"build": 25.0}, replicates=12, phases=PHASES)
    assert replicates_of(records) >= 5
    assert requested(executor) == set(range(replicates_of(records)))
    assert not [trial for trial in records if trial.endswith("solo")]
    assert "1 replicate left out peaks of memory:" in executor.notices[0].message
    seen = {trial for trial, request in executor.requests.items() if "peaks" in request["measures"]}
    assert seen == {trial for trial in records if trial[:2] in ("r1", "r2")}  # three are enough for peaks


def test_a_warm_up_that_is_longer_is_caught_up_with(measured, monkeypatch):
    """Trials of a replicate end after the same step, that of the longest warm-up; so do those of the next."""
    asked = Timed.ask

    def warming(self, command, trial, timeout_s, **arguments):
        answer = asked(self, command, trial, timeout_s, **arguments)
        longer = {"r0-plain": 2, "r0-nf4": 4}.get(trial, 3)
        return Fragment(samples={"warmup_step_time_s": (1.0,) * longer}) if command == "warm_up" else answer

    monkeypatch.setattr(Timed, "ask", warming)
    executor, records = measured(330.0, replicates=2, phases=("train",), warmup_steps_max=12)
    ends = {executor.limits[trial] - sum(record.turn_lengths) for trial, record in records.items()
            if record.turn_lengths}  # fmt: skip
    assert replicates_of(records) == 2
    assert ends == {1 + 4, 1 + 3}  # the second takes as many as the first has shown to be enough


# --- with the figures of a real machine -------------------------------------------------------------------------------


def measure_real(figures, limit_s):
    """The six variants in simulated time; the machine, what was measured, and what the time went to."""
    machine, study = Machine(figures), study_of(limit_s)
    plan = make_plan(study, interleaving="lockstep", phases=PHASES)
    budget = Budget(limit_s, clock=machine.clock, replicates=12, cold_s=min(figures.colds))
    machine.now += figures.preparing
    site = Site(device="cpu", threads=1, tokens_path="t", tokens={}, lanes=2)
    found = run_plan(
        plan, {"": machine}, site, save=lambda record: None, watcher=Quiet(), budget=budget,
        stop=Stopping(plan, budget),
    )  # fmt: skip
    return machine, found, budget.spending()


@pytest.mark.parametrize(("figures", "minutes"), [(SMOLLM2, 8), (GEMMA3, 15)], ids=["smollm2", "gemma3"])
def test_a_real_model_is_measured_in_its_minutes(figures, minutes):
    """Five replicates, each variant asked and started cold once, the limit kept, and most of the time is measuring."""
    machine, found, spending = measure_real(figures, 60.0 * minutes)
    assert len({record.replicate for record in found.records}) >= 5
    assert machine.now <= 1.05 * 60 * minutes
    assert spending.share >= 0.6
    assert {record.status for record in found.records} == {"ok"}
    first = {record.name for record in found.records if "cold_start_time_s" in record.samples}
    assert first == {record.name for record in found.records if "request_time_s" in record.samples} == set(NAMES)
    groups = series_of(found.records)
    for name in NAMES[1:]:
        ratio = compare_series(groups["bf16-r8", "variant"], groups[name, "variant"], "step_time_s", family=5)
        assert ratio.high / ratio.low < 1.1


def test_a_slow_step_is_no_part_of_a_replicate():
    """Where only few turns fit each replicate has the three that a median needs, a little late if it must be."""
    machine, _, spending = measure_real(GEMMA3, 900.0)
    assert [one.turns for one in spending.allocations] == [MEDIAN_TURNS] * 5
    assert machine.now <= 1.03 * 900.0


def test_one_request_is_enough_where_no_other_replicate_has_any():
    """What it would take goes to timed turns; and no first call is made where nothing follows it."""
    machine, _, spending = measure_real(SMOLLM2, 480.0)
    asked = Counter((trial[:2], word) for _, trial, word in machine.asked)
    assert asked["r0", "request"] == 2 * 7  # unmerged and merged
    assert {when for when, word in asked if word in ("request", "begin_generate")} == {"r0"}
    assert max(one.turns for one in spending.allocations) > 2


@pytest.mark.parametrize("minutes", [4, 5, 6, 7, 10, 12, 20, 40])
def test_a_real_model_keeps_any_limit(minutes):
    """By leaving out what it must, in the first replicate too, and no more than that."""
    machine, found, spending = measure_real(SMOLLM2, 60.0 * minutes)
    assert 0.55 * 60 * minutes <= machine.now <= 1.1 * 60 * minutes
    assert {record.status for record in found.records} == {"ok"}
    replicates = len({record.replicate for record in found.records})
    assert len(spending.allocations) == replicates
    if minutes >= 10:
        assert replicates >= 5
        assert not any(record.trial.endswith("solo") for record in found.records) or minutes >= 40


def test_more_turns_are_taken_where_processes_are_dear():
    """Than are planned, where a process costs much more than a turn: what the optimum was is said with them."""
    _, found, spending = measure_real(dataclasses.replace(SMOLLM2, beside=4.0), 3600.0)
    assert len({record.replicate for record in found.records}) >= 5
    assert max(one.turns for one in spending.allocations) > 8
    later = [one for one in spending.allocations if one.replicate >= 2]
    assert all(one.optimum is None or one.optimum > 8 for one in later)  # None: the more the better


def test_two_minutes_for_a_real_model_are_refused():
    """After the first steps, which say what it takes."""
    with pytest.raises(
        UsageError, match="max_minutes = 1: by the first steps of this run a replicate of 7 trials takes"
    ):
        measure_real(SMOLLM2, 60.0)


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("replicates", [1, 3, 12])
def test_long_turns_keep_the_limit(measured, steps, replicates):
    """Their least is set aside as turns of one step, and no more of a turn than that is free of the share."""
    for limit_s in (200 * 1.13**number for number in range(30)):
        try:
            executor, _ = measured(limit_s, replicates=replicates, phases=("train",), steps_per_turn=steps)
        except UsageError:
            continue
        assert executor.now <= 1.1 * limit_s, (limit_s, executor.now)


def test_all_end_after_one_step_where_more_turns_are_taken_than_planned(small_study, monkeypatch):
    """However long each took to warm up: their losses are of the same number of steps, and those steps are told."""
    asked, taken = Timed.ask, {}

    def ask(self, command, trial, timeout_s, **arguments):
        found = asked(self, command, trial, timeout_s, **arguments)
        if command == "warm_up" and "warm_up_steps" not in self.requests[trial]:
            found = Fragment(samples={"warmup_step_time_s": (1.0,) * (2 if "nf4" in trial else 5)})
        if command in ("warm_up", "turn"):
            name = "warmup_step_time_s" if command == "warm_up" else "step_time_s"
            taken[trial] = taken.get(trial, 1) + len(found.samples[name])
        if command == "finish_training" and "solo" not in trial:
            planned = arguments.get("steps")
            assert planned is not None
            taken[trial] = max(taken[trial], arguments["least"])
        return found

    monkeypatch.setattr(Timed, "ask", ask)
    protocol = dataclasses.replace(
        small_study.protocol, turns=TURNS, replicates=1, merged=False, max_minutes=60.0, warmup_steps_max=6
    )
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving="lockstep", phases=("train",))
    executor = Timed({})
    budget = Budget(3600.0, clock=executor.clock)
    budget.allow("steps", 2 * TURNS)
    run_plan(plan, {"": executor}, SITE, save=lambda record: None, watcher=Quiet(), budget=budget)
    live = {trial: steps for trial, steps in taken.items() if "solo" not in trial}
    assert set(live.values()) == {1 + 5 + 2 * 2 * TURNS}


def test_a_warm_up_is_told_by_the_slowest_of_all_and_to_nobody_in_the_first_replicate(small_study, monkeypatch):
    """Also where each trial is a group of its own, and the slow one comes first."""
    asked, told = Timed.ask, {}

    def ask(self, command, trial, timeout_s, **arguments):
        found = asked(self, command, trial, timeout_s, **arguments)
        if command == "warm_up":
            told[trial] = self.requests[trial].get("warm_up_steps")
            if told[trial] is None:
                slow = (20.0, 15.0, 12.0, 9.0, 7.0, 6.0, 5.0, 5.0)
                return Fragment(samples={"warmup_step_time_s": slow if "nf4" in trial else (5.0,) * 3})
        return found

    monkeypatch.setattr(Timed, "ask", ask)
    for seed in range(3):
        told.clear()
        protocol = dataclasses.replace(
            small_study.protocol, turns=TURNS, replicates=5, merged=False, max_minutes=12.0, seed=seed
        )
        study = dataclasses.replace(small_study, protocol=protocol)
        plan, executor = make_plan(study, interleaving="replicates", phases=("train",)), Timed({})
        budget = Budget(720.0, clock=executor.clock, replicates=5)
        stop = Stopping(plan, budget)
        run_plan(plan, {"": executor}, SITE, save=lambda record: None, watcher=Quiet(), budget=budget, stop=stop)
        live = {trial: steps for trial, steps in told.items() if "solo" not in trial}
        assert {steps for trial, steps in live.items() if trial.startswith("r0-")} == {None}
        later = {steps for trial, steps in live.items() if not trial.startswith("r0-")} - {None}
        assert later == {6}
        assert [one.replicate for one in budget.spending().allocations] == sorted({int(trial[1]) for trial in live})


def test_another_finds_out_what_is_the_bases_where_who_was_to_has_failed(small_study, monkeypatch):
    """All that stand on it would else be without it, and pass."""
    asked, verified = Timed.ask, {}

    def ask(self, command, trial, timeout_s, **arguments):
        found = asked(self, command, trial, timeout_s, **arguments)
        request = self.requests[trial]
        if command == "build" and request.get("asks_base", True) and "solo" not in trial:
            return Fragment().failed("oom", Failure(phase="build", kind="OutOfMemory", message="no room"))
        if command == "verify":
            verified[trial] = arguments
            if arguments.get("asks_base"):
                check = {"path": "packing.isolated", "required": True, "observed": True, "status": "active"}
                return Fragment(checks=({**check, "reason": "seen"},))
        return found

    monkeypatch.setattr(Timed, "ask", ask)
    variants = tuple(Variant(name=name, r=rank) for name, rank in (("plain", 4), ("big", 8), ("huge", 16)))
    study = dataclasses.replace(small_study, variants=variants)
    plan, executor = make_plan(study, interleaving="lockstep", phases=("train",)), Timed({})
    found = run_plan(plan, {"": executor}, SITE, save=lambda record: None, watcher=Quiet())
    first = [record for record in found.records if record.replicate == 0 and "solo" not in record.trial]
    assert sorted(record.status for record in first) == ["ok", "ok", "ok", "oom"]
    asking = [trial for trial, arguments in verified.items() if arguments.get("asks_base")]
    assert len(asking) == 1
    told = {record.trial: [check["path"] for check in record.checks] for record in first if record.status == "ok"}
    profiled = {slot.trial for slot in plan.slots if slot.instrument == "profile"}
    assert all(paths == ["packing.isolated"] for trial, paths in told.items() if trial in profiled)


def test_what_was_left_out_stays_so_where_a_run_is_gone_on_with(small_study):
    """Its minutes are for what is missing; solo trials of replicates that have ended are not."""

    def go(limit_s, earlier=()):
        protocol = dataclasses.replace(
            small_study.protocol, turns=TURNS, generate_requests=REQUESTS, replicates=12, merged=False,
            max_minutes=limit_s / 60,
        )  # fmt: skip
        plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving="lockstep", phases=PHASES)
        executor = Timed({"build": 25.0, "verify": 25.0})
        left = len({group.replicate for group in find_unsettled(plan, earlier)})
        budget = Budget(limit_s, clock=executor.clock, replicates=left, cold_s=8.0)
        found = run_plan(
            plan, {"": executor}, SITE, save=lambda record: None, watcher=Quiet(), budget=budget,
            stop=Stopping(plan, budget), earlier=earlier,
        )  # fmt: skip
        return executor, found

    _, first = go(1300.0)
    earlier = [record for record in first.records if record.replicate < 3]
    assert {record.trial for record in earlier if record.replicate} == {
        record.trial for record in earlier if record.replicate and "solo" not in record.trial
    }
    executor, found = go(450.0, earlier)
    assert min(trial[:2] for trial, _ in executor.asked) == "r3"
    assert {record.status for record in found.records} == {"ok"}
    _, short = go(30.0, earlier)  # not one replicate fits: what there is stands
    assert [record.trial for record in short.records] == [record.trial for record in earlier]
    assert "not even one fits" in short.stopped


def test_peaks_are_measured_where_no_later_replicate_would(measured):
    """Trials of the first replicate are profiled, and tell none beside others."""
    whole_s = measured(None, phases=PHASES)[0].now
    executor, _ = measured(0.95 * whole_s, phases=PHASES)
    assert {trial for trial, request in executor.requests.items() if "peaks" in request["measures"]}
    assert executor.now <= 1.1 * 0.95 * whole_s


def test_a_cold_start_is_held_to_an_answer_though_no_request_was_measured(small_study, monkeypatch):
    """Where there was no time for requests the first prompt is answered at the end, untimed."""
    monkeypatch.setattr(Budget, "has_room", lambda self, plan, kind: False)
    protocol = dataclasses.replace(small_study.protocol, turns=TURNS, replicates=1, merged=False, max_minutes=60.0)
    plan, executor = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving="lockstep"), Timed({})
    budget = Budget(3600.0, clock=executor.clock)
    budget.is_tight = True
    run_plan(plan, {"": executor}, SITE, save=lambda record: None, watcher=Quiet(), budget=budget)
    colds = {slot.trial for slot in plan.slots if "cold" in slot.measures}
    assert colds <= {trial for trial, command in executor.asked if command == "end_generate"}
