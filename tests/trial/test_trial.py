"""Tests of the commands of a trial: each records what the request measures.

Tests that the zygote refuses a fork that could not use the device.

Tests of the telemetry around the commands of a trial.

Tests of the setup of a measuring process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from lorameter.errors import InvalidRunError
from lorameter.measurements.metrics import METRICS, get_samples
from lorameter.records.os_errors import failed_record
from lorameter.records.record import PartialRecord, TrialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial import zygote
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.process import TrialTelemetry, prepare_process
from lorameter.trial.trial import Trial

WORKLOAD = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3, open_ended_tokens=6, open_ended_prompt_tokens=400,
)  # fmt: skip
PROTOCOL = Protocol(warmup_steps_min=2, warmup_steps_max=4, turns=2, steps_per_turn=2, generate_warmup=0)
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))
LOSSES = ("warmup_loss", "timed_loss", "remaining_loss")
TRAIN = ("build", "warm_up", "finish_training")
"""Commands that every trial runs."""
MEMORY = {
    "host_rss_at_start_bytes", "host_peak_load_bytes", "host_peak_train_bytes", "base_weight_bytes", "adapter_bytes",
    "gradient_bytes", "optimizer_state_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Write one token file for all trials."""
    return prepare(WORKLOAD, tmp_path_factory.mktemp("tokens")).path


@pytest.fixture
def trial(tokens, tmp_path):
    """A function that builds a trial with the given measures."""
    torch.set_num_threads(1)

    def make(*measures, variant=VARIANT, protocol=PROTOCOL):
        level = "replicates" if "peaks" in measures else "lockstep"  # a trial that measures peaks normally runs alone
        request = TrialRequest(
            trial="r0-plain", variant=variant, role="variant", replicate=0, seed=1, workload=WORKLOAD,
            protocol=protocol, interleaving=level, measures=measures, device="cpu", threads=1,
            tokens_path=tokens, scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        return Trial(request, SharedBase())

    return make


def record_of(trial, *commands):
    """Return the record after these commands, merged as the parent does it."""
    record = TrialRecord(
        trial="r0-plain", status="ok", name="plain", variant=VARIANT.id, role="variant", replicate=0, position=0,
        interleaving="lockstep", seed=1, started_unix_s=0.0, wall_time_s=0.0,
    )  # fmt: skip
    for command in commands:
        arguments = {"steps": PROTOCOL.steps_per_turn} if command == "turn" else {}
        record = record.merged(trial.run(command, **arguments))
    assert record.status == "ok"
    return record


def metrics_of(record):
    return {metric for metric in METRICS if get_samples(record, metric)}


def test_a_trial_that_takes_turns_has_times_and_losses(trial):
    """A trial that shares its process has no memory, load time, first step or first call; its requests are unmerged."""
    commands = ("build", "warm_up", "turn", "turn", "finish_training", "begin_generate", "request")
    record = record_of(trial("steps", "requests"), *commands)
    assert record.memory == {}
    assert {"load_time_s", "first_step_time_s", "first_call_time_s"}.isdisjoint(record.values)
    assert metrics_of(record) == {
        "step_time_s", "step_cpu_time_s", "tokens_per_s", "samples_per_s", "timed_loss", "held_out_loss",
        "request_time_s", "first_token_time_s", "time_per_output_token_s", "output_tokens_per_s",
    }  # fmt: skip
    assert len(record.samples["step_time_s"]) == 4
    assert {"host_watched_train_s", "host_watched_generate_s"} <= set(record.values)
    assert sum(record.samples["step_time_s"]) < record.values["host_watched_train_s"]
    assert record.values["held_out_loss"] != record.values["held_out_loss_initial"]


def test_a_request_until_eos_is_timed_and_recorded(trial):
    """Each request until EOS records its time, token count and answer, with and without the adapter."""
    running = trial("steps", "requests", "open_ended")
    record = record_of(running, *TRAIN, "begin_generate", "request", "open_ended", "open_ended", "base_answers")
    times, counts = get_samples(record, "open_ended_request_time_s"), get_samples(record, "open_ended_tokens")
    assert len(times) == len(counts) == 2
    assert [len(record.tokens[f"answer_{index}"]) for index in (0, 1)] == list(counts)
    assert get_samples(record, "open_ended_time_per_token_s") == tuple(
        a / b for a, b in zip(times, counts, strict=True)
    )
    assert {key for key in record.tokens if key.startswith("base_answer_")} == {"base_answer_0", "base_answer_1"}


def test_a_request_without_the_required_attention_makes_the_trial_invalid(trial):
    """Where a study allows fallbacks, a notice replaces the failure."""
    running = trial("steps", "requests", variant=dataclasses.replace(VARIANT, attention="eager"))
    record_of(running, *TRAIN)
    required = dataclasses.replace(running.request, requirements={"attention.backend": "flash"})
    running.request = required
    fragment = running.run("begin_generate")
    assert (fragment.status, fragment.failure.kind) == ("invalid", "RequiredPathNotActive")
    assert "request.attention: required 'flash'" in fragment.failure.message
    running.request = dataclasses.replace(required, allow_fallback=True)
    assert [notice.code for notice in running.run("begin_generate").notices] == ["fallback-allowed"]


def test_epochs_are_trained_in_rounds_and_may_end_early(trial):
    """Rounds of untimed steps never exceed the plan and have the losses of uninterrupted training; a training that ends
    early records the planned number of steps."""
    protocol = dataclasses.replace(PROTOCOL, epochs=2.0)
    commands = ("build", "warm_up", "turn", "turn")
    in_one_go = record_of(trial("steps", protocol=protocol), *commands, "finish_training")
    assert "training_steps_planned" not in in_one_go.values
    running = trial("steps", protocol=protocol)
    record = record_of(running, *commands).merged(running.run("train", steps=5)).merged(running.run("train", steps=100))
    record = record.merged(running.run("finish_training"))
    assert record.samples["remaining_loss"] == in_one_go.samples["remaining_loss"]
    assert record.values["held_out_loss"] == in_one_go.values["held_out_loss"]
    running = trial("steps", protocol=protocol)
    cut = record_of(running, "build", "warm_up", "turn").merged(running.run("finish_training", steps=11))
    assert sum(len(cut.samples[name]) for name in LOSSES) == 11
    assert (cut.values["training_steps"], cut.values["training_steps_planned"]) == (11.0, 16.0)


def test_an_isolated_trial_has_peaks_and_first_times(trial):
    """An isolated trial records memory of every phase, load, first step, first call and merged requests, but no step
    times or losses."""
    commands = (*TRAIN, "begin_generate", "end_generate", "merge", "request")
    record = record_of(trial("peaks", "merged"), *commands)
    assert {*MEMORY, "host_peak_generate_bytes"} <= set(record.memory)
    assert all(record.memory[kind] > 0 for kind in MEMORY)
    assert {"load_time_s", "first_step_time_s", "first_call_time_s"} <= set(record.values)
    assert metrics_of(record) == {
        "first_step_time_s", "first_call_time_s", "merged_request_time_s", "merged_first_token_time_s",
        "merged_time_per_output_token_s",
    }  # fmt: skip
    assert get_samples(record, "timed_loss") == ()
    assert {"held_out_loss", "held_out_loss_initial"}.isdisjoint(record.values)


def test_a_loss_that_is_not_finite_is_invalid(trial):
    """A non-finite loss makes the trial invalid, and the message names the step and the learning rate.

    With a high learning rate alone the result depends on the processor: where the adapter's output stays finite, the
    following normalisation makes the loss constant. Scaled by alpha / r the output is infinite on any processor.
    """
    diverging = trial("steps", variant=dataclasses.replace(VARIANT, learning_rate=1e30, lora_alpha=10**12))
    fragments = [diverging.run("build"), diverging.run("warm_up")]
    assert fragments[-1].status == "invalid"
    assert fragments[-1].failure.kind == "LossNotFinite"
    assert "1e+30" in fragments[-1].failure.message


def test_a_check_watches_steps_of_the_training(trial):
    """The check watches the first two steps; losses are bit-equal to those of a training without it."""
    variant = dataclasses.replace(VARIANT, use_dora=True)
    running = trial("steps", variant=variant)
    running.request = dataclasses.replace(running.request, replicate=1)
    record = record_of(running, "build", "verify").merged(running.run("warm_up", steps=1))
    for command in ("turn", "turn", "finish_training"):
        record = record.merged(running.run(command, **({"steps": 2} if command == "turn" else {})))
    plain = record_of(trial("steps", variant=variant), "build", "warm_up", "turn", "turn", "finish_training")
    losses, others = ([loss for name in LOSSES for loss in one.samples[name]] for one in (record, plain))
    assert losses == others
    assert record.values["held_out_loss"] == plain.values["held_out_loss"]
    assert (len(record.samples["warmup_step_time_s"]), len(record.samples["step_time_s"])) == (2, 4)
    found = {check["path"]: check["status"] for check in record.checks}
    assert (found["peft.learning"], found["base.frozen"]) == ("active", "active")


def test_a_failed_check_makes_the_trial_invalid(trial):
    """A required path that is not active makes the trial invalid."""
    running = trial("steps")
    running.request = dataclasses.replace(running.request, requirements={"attention.backend": "flex"})
    record_of(running, "build")
    fragment = running.run("verify")
    assert (fragment.status, fragment.failure.kind) == ("invalid", "RequiredPathNotActive")


def test_learning_not_shown_by_two_steps_is_checked_in_more(trial):
    """With a learning rate that starts at zero, two steps show only one factor learning, so that the check takes
    further steps and restores the state afterwards."""
    variant = dataclasses.replace(VARIANT, schedule="linear", warmup_ratio=0.1)
    running = trial("steps", variant=variant, protocol=dataclasses.replace(PROTOCOL, turns=8))
    running.run("build")
    fragment = running.run("verify")
    assert fragment.status == "ok", fragment.failure
    assert len(fragment.samples["warmup_loss"]) == 1
    assert {check["path"]: check["status"] for check in fragment.checks}["peft.learning"] == "active"


class FakeDriver:
    """libcuda with one function."""

    def __init__(self, answer):
        self.answer = answer

    def cuDeviceGetCount(self, count):  # noqa: N802 the driver's own name
        return self.answer


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True)])
def test_a_started_cuda_driver_forbids_a_fork(monkeypatch, answer, started):
    """Any result of the driver but CUDA_ERROR_NOT_INITIALIZED means that it has started."""
    monkeypatch.setattr(zygote.ctypes, "CDLL", lambda name, mode: FakeDriver(answer))
    monkeypatch.setattr(zygote, "other_threads", list)
    forbidden = pytest.raises(InvalidRunError, match="started the CUDA driver")
    with forbidden if started else contextlib.nullcontext():
        zygote.require_safe_fork()


@pytest.mark.parametrize(
    ("device", "built", "lacks"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bitsandbytes_without_its_cuda_library_is_reported(monkeypatch, device, built, lacks):
    """The case that torch sees a device and bitsandbytes does not is reported before a trial fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    library = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=built))
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", library)
    assert ("its library for CPUs" in (zygote._describe(1.0).lacks or "")) is lacks


class FakeTelemetry:
    """A `Telemetry` that reports an energy if configured."""

    def __init__(self, phase, device, *, energy, generations):
        self.values = {f"device_energy_{phase}_j": 900.0} if energy else {f"host_load_{phase}": 1.0}

    def begin(self):
        pass

    def end(self):
        return self.values

    def notice(self):
        return None


@pytest.fixture
def make_telemetry(monkeypatch):
    """A function that makes the telemetry of a trial on a device; each of its steps trains 10 tokens."""
    monkeypatch.setattr("lorameter.trial.process.Telemetry", FakeTelemetry)
    monkeypatch.setattr("lorameter.trial.process.ENERGY_STRETCH_S", 0.02)

    def make(*measures, device="cuda", **ranks):
        request = TrialRequest(
            trial="r0-a", variant=LoraVariant(name="a"), role="variant", replicate=0, seed=0, workload=Workload(),
            protocol=Protocol(), interleaving="lockstep", measures=measures, device=device, threads=1, tokens_path="",
            scratch="", log_path="",
        )  # fmt: skip
        steps = []

        return TrialTelemetry(request, lambda: steps.append(1), lambda: 10 * len(steps), **ranks), steps

    return make


@pytest.mark.parametrize(("measures", "device"), [(("steps", "requests"), "cuda"), (("peaks",), "cpu")])
def test_a_trial_without_its_own_energy_counter_takes_no_steps(make_telemetry, measures, device):
    """With turns, the GPU's counter would include the energy of other trials; a CPU has no counter."""
    telemetry, steps = make_telemetry(*measures, device=device)
    assert "energy_steps" not in telemetry.around(COMMANDS["turn"], PartialRecord).values
    telemetry.around(COMMANDS["finish_training"], PartialRecord)
    assert steps == []


def test_an_isolated_trial_takes_steps_for_its_energy(make_telemetry):
    """The steps follow the command, and the counts are those of the steps between the readings."""
    telemetry, steps = make_telemetry("peaks", "merged")
    fragment = telemetry.around(COMMANDS["finish_training"], lambda: PartialRecord(memory={"adapter_bytes": 1}))
    assert len(steps) >= 1
    assert fragment.values["energy_steps"] == len(steps)
    assert fragment.values["energy_tokens"] == 10 * len(steps)
    assert fragment.memory == {"adapter_bytes": 1}


def test_all_ranks_take_the_same_steps_for_energy(make_telemetry):
    """The first rank decides on the number of steps."""
    decisions = iter([True, True, True, False])
    telemetry, steps = make_telemetry("peaks", agree=lambda own: next(decisions))
    assert telemetry.around(COMMANDS["finish_training"], PartialRecord).values["energy_steps"] == len(steps) == 3


def test_int8_layers_do_not_log_inside_the_timed_window(monkeypatch, tmp_path):
    """The warning of each int8 layer in each forward is disabled; errors still reach the log."""
    logger, threads = logging.getLogger("bitsandbytes.autograd._functions"), torch.get_num_threads()
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    prepare_process(
        TrialRequest(
            trial="r1-plain", variant=LoraVariant(), role="variant", replicate=1, seed=0, workload=Workload(),
            protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
            tokens_path="", scratch=str(tmp_path), log_path="",
        )
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert logger.level == logging.ERROR


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (ValueError("can't allocate memory"), "crashed"),
    ],
)
def test_running_out_of_memory_is_distinguished_from_a_crash(error, status):
    """The record has the command, the exception type and the message."""
    fragment = failed_record(error, "build")
    assert fragment.status == status
    assert (fragment.failure.phase, fragment.failure.kind) == ("build", type(error).__name__)
    assert fragment.failure.message == (str(error) or type(error).__name__)
