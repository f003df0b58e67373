"""A limit of time holds within a replicate too and cuts all variants alike; the fake commands move the clock."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from lorameter.errors import UsageError
from lorameter.records.metrics import PHASES
from lorameter.records.record import PartialRecord
from lorameter.run.budget import LEAST_ROUNDS, Budget
from lorameter.run.executors import TrialFiles
from lorameter.run.plan import make_plan
from lorameter.run.runner import run_plan
from lorameter.run.stopping import Stopping
from lorameter.run.thinning import tell_left_out
from lorameter.run.trial_setup import RunContext
from lorameter.verdicts.series import compare_series, group_trials

COSTS = {
    "build": 5.0, "verify": 4.0, "warm_up": 6.0, "turn": 10.0, "train": 10.0, "finish_training": 3.0, "request": 4.0,
    "cold": 8.0,
}  # fmt: skip
"""Of a turn and of untimed training: for two steps."""
TURNS, REQUESTS, WARM_UP = 8, 6, 2


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
        return TrialFiles(scratch=trial, log_path=log)

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
            return PartialRecord(values={"build_step_time_s": self.costs["turn"] / 2})
        if command == "warm_up":
            steps = self.requests[trial].get("warm_up_steps", WARM_UP)
            return PartialRecord(samples={"warmup_step_time_s": (self.costs["turn"] / 2,) * steps})
        if command == "turn":
            steps = arguments["steps"]
            return PartialRecord(samples={"step_time_s": (0.1,) * steps, "step_cpu_time_s": (0.1,) * steps})
        return PartialRecord(samples={"request_time_s": (0.2,)}) if command == "request" else PartialRecord()

    def cold_start(self, request):
        self.now += self.costs["cold"]
        return PartialRecord(samples={"cold_start_time_s": (1.0,)})

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
        site = RunContext(device="cpu", threads=1, tokens_path="t", tokens={})
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


def test_losses_after_other_numbers_of_steps_are_not_compared(measured):
    """A training that was cut and one that was not, or was cut elsewhere, are two trainings."""
    _, records = measured(None, replicates=2)
    kept = []
    for record in records.values():
        cut = record.replicate == 1
        steps = {"training_steps": 9.0 if cut else 19.0} | ({"training_steps_planned": 19.0} if cut else {})
        kept.append(record.replaced(values=record.values | steps | {"held_out_loss": 2.0 - cut}))
    groups = group_trials([record for record in kept if "step_time_s" in record.samples])
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
    assert notice.code == "measurements-skipped"
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
