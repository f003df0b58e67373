"""Tests of real processes: a complete trial, and each way in which a trial can fail."""

from __future__ import annotations

import dataclasses
import os
import signal

import psutil
import pytest

from lorameter.errors import InvalidRunError
from lorameter.run.display import Display
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext
from lorameter.run.runner import run_plan
from lorameter.run.workers.local import ForkedWorker, LocalExecutor


class Quiet(Display):
    """A silent listener that runs a callback when a trial enters a phase or ends."""

    def __init__(self, act=None, at_end=None):
        self.act = act
        self.at_end = at_end

    def trial_phase(self, slot, phase):
        if self.act:
            self.act(slot, phase)

    def trial_ended(self, record):
        if self.at_end:
            self.at_end(record)


SERVED = {
    "olora": {"init_lora_weights": "olora", "dtype": "float32", "learning_rate": 1e-2},
    "prepared": {
        "quantization": "nf4",
        "prepare_for_kbit": True,
        "optimizer": "adamw",
        "adapter_dtype": "bfloat16",
    },
}
"""Variants whose served model needs special preparation."""


@pytest.fixture(scope="module")
def served(measure, small_study):
    """The records of one variant and its control in all phases."""
    study = dataclasses.replace(small_study, variants=small_study.variants[:1])
    return measure(study, phases=("train", "generate", "cold"))


@pytest.fixture(scope="module")
def measure(executor, tokens_of):
    """A function that measures one replicate of a study and returns its records by trial."""

    def run(study, *, phases=("train",), listener=None, executor=executor):
        protocol = dataclasses.replace(study.protocol, replicates=1)
        plan = make_plan(dataclasses.replace(study, protocol=protocol), phases=phases)
        site = RunContext(device="cpu", tokens={study.workload: tokens_of(study.workload)})
        measured = run_plan(plan, {"": executor}, site, save=lambda record: None, display=listener or Quiet())
        return {record.trial: record for record in measured.records}

    return run


@pytest.fixture
def own_executor(tmp_path):
    """A separate executor whose zygote may be killed."""
    local = LocalExecutor()
    local.start(tmp_path, 1)
    local.hello()
    yield local
    local.close()


def children_of(executor):
    return psutil.Process(executor._zygote.pid).children()


def test_a_trial_end_to_end(executor, served):
    """Every phase records its values, the control is bit-equal to the reference, and no process is left."""
    assert len(served) == 2
    assert {record.status for record in served.values()} == {"ok"}, [r.failure for r in served.values()]
    for record in served.values():
        assert len(record.samples["step_time_s"]) == 4
        assert len(record.samples["request_time_s"]) == len(record.samples["merged_request_time_s"]) == 2
        assert record.turn_lengths == (2, 2)
        assert record.values["start_latency_s"] > 0
        parts = ("cold_import_time_s", "cold_load_time_s", "cold_completion_time_s")
        assert all(record.values[part] > 0 for part in parts)
        assert sum(record.values[part] for part in parts) <= record.values["cold_start_time_s"]
        assert record.memory["optimizer_state_bytes"] == pytest.approx(2 * record.memory["adapter_bytes"], rel=0.01)
        assert record.memory["gradient_bytes"] == record.memory["adapter_bytes"]
        assert record.tokens["completion"] == record.tokens["cold_completion"]
    plain, control = served["r0-plain"], served["r0-plain-control"]
    assert plain.tokens == control.tokens
    losses, twin_losses = (
        [loss for name in ("warmup_loss", "timed_loss", "remaining_loss") for loss in record.samples[name]]
        for record in (plain, control)
    )
    assert losses == twin_losses
    assert plain.values["held_out_loss"] == control.values["held_out_loss"]
    assert not children_of(executor)


@pytest.mark.selftest
def test_the_cold_model_is_the_trained_one(measure, small_study):
    """Preparation, adapter type and a base that OLoRA rewrote reach the new interpreter, so that the answer is the
    same."""
    more = tuple(dataclasses.replace(small_study.variants[0], name=name, **changes) for name, changes in SERVED.items())
    study = dataclasses.replace(small_study, variants=more, reference="olora")
    records = measure(study, phases=("train", "generate", "cold"))
    for name in SERVED:
        record = records[f"r0-{name}"]
        assert record.status == "ok", record.failure
        assert record.tokens["completion"] == record.tokens["cold_completion"]


FAILED = {"killed": signal.SIGKILL, "hung": signal.SIGSTOP, "bad": None}
"""Variants that fail, with the signal that each receives during its training."""
IMPATIENCE_S = 0.5


@pytest.fixture(scope="module")
def failed(measure, executor, small_study):
    """The records of one study in which one trial is killed, one stopped and one cannot be built.

    The stopped process has a shorter time limit than the protocol's, which no other process could keep on a busy
    machine.
    """
    plain = small_study.variants[0]
    variants = {name: dataclasses.replace(plain, name=name, r=r) for r, name in enumerate(FAILED, 5)}
    variants["bad"] = dataclasses.replace(variants["bad"], target_modules=("no_such_module",))
    ask, limits = ForkedWorker.ask, set()

    def impatient(worker, command, trial, timeout_s, **arguments):
        limits.add(timeout_s)
        stopped = (trial, command) == ("r0-hung", "finish_training")
        return ask(worker, command, trial, IMPATIENCE_S if stopped else timeout_s, **arguments)

    def act(slot, phase):
        number = FAILED.get(slot.variant.name)
        if number is not None and phase == "finish_training":
            for child in children_of(executor):
                os.kill(child.pid, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkedWorker, "ask", impatient)
        study = dataclasses.replace(small_study, variants=(plain, *variants.values()))
        records = measure(study, listener=Quiet(act))
    assert limits == {small_study.protocol.step_timeout_s}
    assert not children_of(executor)
    return records


def test_a_failed_trial_costs_no_other(failed):
    """The other trials of the study are measured."""
    assert {r.status for t, r in failed.items() if t.removeprefix("r0-") not in FAILED} == {"ok"}


def test_a_killed_trial_is_a_row(failed):
    """A trial that is killed after its turns is recorded as crashed, with the signal and its turns."""
    assert failed["r0-killed"].status == "crashed"
    assert "SIGKILL" in failed["r0-killed"].failure.message
    assert failed["r0-killed"].samples["step_time_s"]


def test_a_hanging_trial_is_killed_and_a_row(failed):
    """A stopped process is recorded as timeout after the limit."""
    assert failed["r0-hung"].status == "timeout"
    assert f"{IMPATIENCE_S} s" in failed["r0-hung"].failure.message


def test_an_exception_is_a_row(failed, folder):
    """Targets that match no module are recorded as crashed with PEFT's message."""
    assert failed["r0-bad"].status == "crashed"
    assert "no_such_module" in failed["r0-bad"].failure.message
    assert failed["r0-bad"].failure.phase == "build"
    assert "Traceback" in (folder / failed["r0-bad"].log).read_text()


def test_a_dead_zygote_ends_the_run_and_costs_the_trial_under_way(measure, own_executor, small_study):
    """A zygote that is killed during a trial ends the trial and the run; earlier results are kept, and the error has
    the signal and the log."""
    first, second, third = (slot.trial for slot in make_plan(small_study, phases=("train",)).slots[:3])
    kept = {}

    def under_way(slot, phase):
        if slot.trial == second and phase == "finish_training":
            os.kill(own_executor._zygote.pid, signal.SIGKILL)

    listener = Quiet(under_way, lambda record: kept.update({record.trial: record}))
    with pytest.raises(InvalidRunError, match=r"the zygote ended with signal 9 \(SIGKILL\)\. Its log is .*zygote"):
        measure(small_study, listener=listener, executor=own_executor)
    assert {trial: record.status for trial, record in kept.items()} == {
        first: "ok", second: "crashed", third: "not_run",
    }  # fmt: skip
    assert kept[second].samples["step_time_s"]


def test_running_out_of_memory_is_a_row(measure, executor, small_study, folder):
    """A trial that exceeds its address-space limit is recorded as oom, with the traceback in record and log."""
    limit = psutil.Process(executor._zygote.pid).memory_info().vms + 64 * 2**20
    protocol = dataclasses.replace(small_study.protocol, memory_limit_bytes=limit)
    workload = dataclasses.replace(small_study.workload, batch_size=64, sequence_length=512, train_sequences=64)
    variants = small_study.variants[:1]
    records = measure(dataclasses.replace(small_study, protocol=protocol, workload=workload, variants=variants))
    assert {record.status for record in records.values()} == {"oom"}
    record = records["r0-plain"]
    assert "Traceback" in record.failure.traceback
    assert "Traceback" in (folder / record.log).read_text()
