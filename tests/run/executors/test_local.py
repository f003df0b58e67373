"""Real processes: a trial end to end, and each of the ways in which one can fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import InvalidRunError
from harness.machine.processes import CPUS
from harness.records.record import DISTURBED, Failure
from harness.run.executors.forked import ForkedWorker
from harness.run.executors.host import Host
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import site_of
from harness.trial import zygote


class Quiet:
    """A watcher that can act when a trial enters a phase, and when it has ended."""

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
"""Variants whose served model must be made in a way of its own."""


@pytest.fixture(scope="module")
def served(measure, small_study):
    """The records of one run of all phases; each of its cold starts imports for seconds, so it is made once."""
    return measure(small_study, phases=("train", "generate", "cold"))


@pytest.fixture(scope="module")
def measure(executor, tokens_of):
    """A function that measures one replicate of a study, or some trials of one by name; their records by trial."""

    def run(study, *, phases=("train",), watcher=None, only=None):
        protocol = dataclasses.replace(study.protocol, replicates=1)
        plan = make_plan(dataclasses.replace(study, protocol=protocol), phases=phases)
        groups = (group for group in plan.groups if only is None or {slot.trial for slot in group.slots} <= {*only})
        plan = dataclasses.replace(plan, groups=tuple(groups))
        site = site_of(study.workload, tokens_of(study.workload), "cpu")
        measured = run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=watcher or Quiet())
        return {record.trial: record for record in measured.records}

    return run


def children_of(executor):
    return psutil.Process(executor._zygote.pid).children()


def is_there(process):
    """Whether a process has not ended; whoever has inherited it may not have looked after it yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def variant(study, **changes):
    """The study with one more variant, named `bad`, and nothing but it and the reference selected."""
    bad = dataclasses.replace(study.variants[0], name="bad", **changes)
    return dataclasses.replace(study, variants=(study.variants[0], bad))


def test_a_trial_end_to_end(executor, served):
    """Every phase leaves its numbers, the control is bit-equal to the reference, and no process is left."""
    assert len(served) == 3
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
    plain, nf4, control = (served[f"r0-{name}"] for name in ("plain", "nf4", "plain-control"))
    assert plain.tokens["hash"] == nf4.tokens["hash"]
    assert plain.tokens == control.tokens
    losses, twin_losses = (
        [loss for name in ("warmup_loss", "train_loss", "catch_up_loss") for loss in record.samples[name]]
        for record in (plain, control)
    )
    assert losses == twin_losses
    assert plain.values["held_out_loss"] == control.values["held_out_loss"]
    assert nf4.memory["base_weight_bytes"] < plain.memory["base_weight_bytes"] / 2
    assert nf4.memory["quantization_state_bytes"] > 0 == plain.memory["quantization_state_bytes"]
    assert not children_of(executor)


@pytest.mark.selftest
def test_the_cold_model_is_the_trained_one(measure, small_study):
    """Preparation, adapter type and a base that OLoRA rewrote reach the new interpreter: the answer is the same."""
    more = tuple(dataclasses.replace(small_study.variants[0], name=name, **changes) for name, changes in SERVED.items())
    study = dataclasses.replace(small_study, variants=more, reference="olora")
    records = measure(study, phases=("train", "generate", "cold"))
    for name in SERVED:
        record = records[f"r0-{name}"]
        assert record.status == "ok", record.failure
        assert record.tokens["completion"] == record.tokens["cold_completion"]


def test_a_killed_trial_is_a_row(measure, executor, small_study):
    """SIGKILL in the middle of the turns: crashed, with the signal named and the earlier turns kept."""

    def kill(slot, phase):
        if slot.trial == "r0-nf4" and phase == "finish_training":
            for child in children_of(executor):
                child.kill()

    records = measure(small_study, watcher=Quiet(kill))
    assert records["r0-nf4"].status == "crashed"
    assert "SIGKILL" in records["r0-nf4"].failure.message
    assert records["r0-nf4"].samples["step_time_s"]
    assert {r.status for t, r in records.items() if t != "r0-nf4"} == {"ok"}


def test_a_dead_zygote_costs_the_trial_under_way_and_no_other(measure, executor, small_study):
    """Ended by TERM between two trials and killed in the middle of one: another is started each time. The trial under
    way dies with its zygote."""
    first, second, third = (slot.trial for slot in make_plan(small_study, phases=("train",)).slots[:3])

    def between(record):
        if record.trial == first:
            os.kill(executor._zygote.pid, signal.SIGTERM)

    def under_way(slot, phase):
        if slot.trial == second and phase == "finish_training":
            (orphan,) = children_of(executor)
            os.kill(executor._zygote.pid, signal.SIGKILL)
            deadline = time.monotonic() + 240
            while is_there(orphan):  # else it might answer before it dies
                assert time.monotonic() < deadline, "the trial has outlived its zygote"
                time.sleep(0.05)

    records = measure(small_study, watcher=Quiet(under_way, between))
    assert {trial: record.status for trial, record in records.items()} == {first: "ok", second: "crashed", third: "ok"}
    assert "the zygote ended with signal 9 (SIGKILL)" in records[second].failure.message
    assert records[second].samples["step_time_s"]


def test_without_another_zygote_what_never_began_is_not_run(small_study, tmp_path, monkeypatch):
    """The run ends there with the reason, and its rest can be gone on with: no trial is to blame."""
    broken = tmp_path / "path" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    local, saved = LocalExecutor(), []

    def ruin(record):
        if record.status == "ok":
            monkeypatch.setenv("PYTHONPATH", str(broken.parent))
            os.kill(local._zygote.pid, signal.SIGHUP)

    try:
        local.start(tmp_path, 1)
        local.hello()
        plan = make_plan(small_study, phases=("train",))
        site = site_of(small_study.workload, local.prepare_tokens(small_study.workload), "cpu")
        with pytest.raises(InvalidRunError, match=r"signal 1 \(SIGHUP\), and no other .* broken on purpose"):
            run_plan(plan, {"": local}, site, save=saved.append, watcher=Quiet(at_end=ruin))
    finally:
        local.close()
    assert [record.status for record in saved] == ["ok", *["not_run"] * (len(plan.slots) - 1)]


def test_a_cold_start_that_fails_says_so_itself(measure, executor, small_study):
    """Without its adapter it has an exception and no answer: crashed, with its own traceback."""

    def spoil(slot, phase):
        if phase == "cold" and slot.trial == "r0-nf4":
            shutil.rmtree(executor._disk.scratch / slot.trial / "adapter")

    study = dataclasses.replace(small_study, variants=small_study.variants[1:], reference="nf4")
    failed = measure(study, phases=("train", "generate", "cold"), watcher=Quiet(spoil), only=["r0-nf4"])["r0-nf4"]
    assert failed.status == "crashed"
    assert "Traceback" in failed.failure.traceback
    assert failed.samples["request_time_s"]


def test_a_hanging_trial_is_killed_and_a_row(measure, executor, small_study, monkeypatch):
    """A stopped process answers nothing: timeout after the limit, and the process is gone.

    The limit is the protocol's, and is short for the stopped process alone: no other must keep it on a busy machine.
    """
    ask, limits = ForkedWorker.ask, set()

    def impatient(worker, command, trial, timeout_s, **arguments):
        limits.add(timeout_s)
        stopped = (trial, command) == ("r0-nf4", "warm_up")
        return ask(worker, command, trial, 0.5 if stopped else timeout_s, **arguments)

    monkeypatch.setattr(ForkedWorker, "ask", impatient)

    def stop(slot, phase):
        if slot.trial == "r0-nf4" and phase == "warm_up":
            for child in children_of(executor):
                os.kill(child.pid, signal.SIGSTOP)

    records = measure(small_study, watcher=Quiet(stop))
    assert limits == {small_study.protocol.step_timeout_s}
    assert records["r0-nf4"].status == "timeout"
    assert "0.5 s" in records["r0-nf4"].failure.message
    assert {r.status for t, r in records.items() if t != "r0-nf4"} == {"ok"}
    assert not children_of(executor)


def test_running_out_of_memory_is_a_row(measure, executor, small_study, folder):
    """An address-space limit that the process's own size nearly fills: oom, with the traceback in record and log."""
    limit = psutil.Process(executor._zygote.pid).memory_info().vms + 64 * 2**20
    protocol = dataclasses.replace(small_study.protocol, memory_limit_bytes=limit)
    workload = dataclasses.replace(small_study.workload, batch_size=64, sequence_length=512, train_sequences=64)
    records = measure(dataclasses.replace(small_study, protocol=protocol, workload=workload))
    assert {record.status for record in records.values()} == {"oom"}
    record = records["r0-plain"]
    assert "Traceback" in record.failure.traceback
    assert "Traceback" in (folder / record.log).read_text()


def test_an_exception_is_a_row(measure, small_study, folder):
    """Targets that match no module: crashed, with PEFT's own words, while the reference is measured."""
    study = variant(small_study, target_modules=("no_such_module",))
    records = measure(study)
    assert records["r0-bad"].status == "crashed"
    assert "no_such_module" in records["r0-bad"].failure.message
    assert records["r0-bad"].failure.phase == "build"
    assert "Traceback" in (folder / records["r0-bad"].log).read_text()
    assert records["r0-plain"].status == "ok"


def test_a_loss_that_is_not_finite_is_a_row(measure, small_study):
    """A learning rate that diverges: invalid, naming the step, before anything is ranked."""
    study = variant(small_study, learning_rate=1e30, lora_alpha=10**12, max_grad_norm=0.0)
    records = measure(study, only=["r0-bad"])
    assert records["r0-bad"].status == "invalid"
    assert records["r0-bad"].failure.kind == "LossNotFinite"
    assert "learning_rate" in records["r0-bad"].failure.message


def test_a_claim_that_does_not_hold_is_a_row(measure, small_study):
    """A paged optimizer pages nothing on a CPU: invalid, and measured only where the study allows it."""
    study = variant(small_study, r=512, optimizer="paged_adamw_32bit")  # large enough for bitsandbytes to page it
    refused = measure(study, only=["r0-bad"])["r0-bad"]
    assert refused.status == "invalid"
    assert "optimizer.paged_share" in refused.failure.message
    assert "step_time_s" not in refused.samples
    allowed = measure(dataclasses.replace(study, allow_fallback=True), only=["r0-bad"])["r0-bad"]
    assert allowed.status == "ok"
    assert any(notice.code == "fallback-allowed" for notice in allowed.notices)
    assert allowed.memory["paged_optimizer_state_bytes"] == 0


def test_a_disturbed_trial_is_measured_again_by_a_fresh_process(measure, executor, small_study, monkeypatch):
    """The judgement is planted, the processes are real: the second is the first over again, to the bit."""
    seen = []

    def judged(record, *, on_cpu):
        seen.append(record)
        if record.role == "control" or record.attempt:
            return record
        return record.replaced(status="invalid", failure=Failure(phase="train", kind=DISTURBED, message="planted"))

    monkeypatch.setattr("harness.run.runner.judged", judged)
    protocol = dataclasses.replace(small_study.protocol, allow_disturbed=False)
    study = dataclasses.replace(small_study, variants=small_study.variants[:1], protocol=protocol)
    records = measure(study)
    assert [(record.role, record.attempt) for record in seen if record.role == "variant"] == [
        ("variant", 0), ("variant", 1)
    ]  # fmt: skip
    first, second = (record for record in seen if record.role == "variant")
    assert first.samples["train_loss"] == second.samples["train_loss"]
    assert records["r0-plain"] == second
    assert {record.status for record in records.values()} == {"ok"}
    assert not children_of(executor)


def test_a_warm_zygote_has_one_thread_to_fork_with(executor):
    """Before and after it forked, as the kernel counts."""
    worker = executor.launch()
    worker.close()
    assert not children_of(executor)
    assert psutil.Process(executor._zygote.pid).num_threads() == 1


def test_a_zygote_with_threads_refuses_to_fork():
    """Forking a process with a second thread can deadlock the child, so it is an error and not a gamble."""

    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        read, write = os.pipe()
        os.close(read)
        answer = zygote._fork(write, None, set())
    finally:
        release.set()
        thread.join()
    assert "threads" in answer["error"]


def test_the_files_of_a_trial_lie_where_the_executor_says(executor, tmp_path):
    """By absolute paths: its folder until it is cleared, its log with the run; what is fetched is the parent's then."""
    place = executor.make_place("t", "shared")
    (Path(place.scratch) / "found.json").write_text("{}")
    assert executor.fetch("t", "found.json", tmp_path).read_text() == "{}"
    assert not [*Path(place.scratch).iterdir()]
    assert Path(place.log_path).is_absolute()
    assert (Path(place.log_path).parent.name, Path(place.log_path).name) == ("logs", "shared.log")
    executor.clear_place("t")
    executor.clear_place("t")
    assert not Path(place.scratch).exists()


def test_an_executor_answers_for_its_machine_before_it_is_started():
    """A plan is made from what it says, and where nothing was started nothing can be asked of a worker."""
    local = LocalExecutor()
    assert local.machine() == local.facts().machine
    assert 0 < local.free_bytes() <= local.machine().memory_bytes or local.machine().device == "cuda"
    for ask in (local.hello, local.launch, lambda: local.make_place("t", "t")):
        with pytest.raises(InvalidRunError, match="not started"):
            ask()
    local.close()


def test_a_whole_cpu_has_lanes_and_a_share_of_one_has_none(monkeypatch, machine):
    """As many as it has cores for their threads; who measures on the rest of a machine is timed meanwhile."""
    monkeypatch.setattr(LocalExecutor, "machine", lambda self: dataclasses.replace(machine, device="cpu", cpus=6))
    assert [LocalExecutor().lanes(threads) for threads in (1, 2, 4, 8)] == [6, 3, 1, 1]
    assert LocalExecutor(host=Host(environment={CPUS: "0,1,2"})).lanes(1) == 1
    monkeypatch.setattr(LocalExecutor, "machine", lambda self: dataclasses.replace(machine, device="cuda", cpus=6))
    assert LocalExecutor().lanes(1) == 1


def test_a_worker_that_cannot_import_is_an_error_with_its_log(tmp_path, monkeypatch):
    """No silent retry: the error names what the worker printed and where its log is."""
    broken = tmp_path / "path" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    local = LocalExecutor()
    local.start(Path(tmp_path), 1)
    with pytest.raises(InvalidRunError, match="broken on purpose"):
        local.hello()
