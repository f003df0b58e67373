"""A real step taken apart: the same step in phases, and what ran in each of them."""

import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from harness.profile.diagnosis import diagnose
from harness.profile.evidence import Evidence
from harness.records.activity import STEP_PHASES
from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building.build import build
from harness.trial.building.shared import SharedBase
from harness.trial.data.stream import TokenStream
from harness.trial.data.tokens import prepare
from harness.trial.profiling import borders as profiling
from harness.trial.profiling.activity import MARK, activity_of
from harness.trial.profiling.borders import BorderedStep, step_times
from harness.trial.step import TrainStep


def setting(folder, layout="packed"):
    workload = Workload(
        sequence_length=32, batch_size=2, train_sequences=8, held_out_records=8, held_out_sequences=2,
        prompt_tokens=8, layout=layout,
    )  # fmt: skip
    variant = Variant(name="v", r=4, lora_dropout=0.1, gradient_accumulation=2)
    request = TrialRequest(
        trial="t", variant=variant, role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=prepare(workload, folder).path, scratch=str(folder), log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    return request, TokenStream(request.tokens_path, workload, variant, "cpu")


def test_a_bordered_step_is_the_plain_one_and_its_phases_add_up(tmp_path):
    """Losses are bit-equal to those of plain steps, and the phases of a step leave little of it."""
    losses = {}
    for bordered in (False, True):
        request, stream = setting(tmp_path)
        trainee = build(request, steps=8, shared=SharedBase())
        step = (
            BorderedStep(trainee, stream, request) if bordered else TrainStep(trainee, stream, request.variant, "cpu")
        )
        losses[bordered] = [float(step()) for _ in range(3)]
    assert losses[True] == losses[False]

    plain = TrainStep(trainee, stream, request.variant, "cpu")
    samples = step_times(plain, step, "cpu", budget_s=0.0)
    assert len(samples["plain_step_time_s"]) == len(samples["phase_forward_s"]) == 8
    assert len(samples["train_loss"]) == 16
    for index, lap in enumerate(samples["bordered_step_time_s"]):
        phases = sum(samples[f"phase_{phase}_s"][index] for phase in ("data", "forward", "backward", "update"))
        assert phases <= lap


class Clock:
    """Time that passes where a test says so, in place of the machine's."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        for module in ("harness.trial.profiling.borders", "harness.trial.profiling.phases", "harness.trial.clock"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=self.read, process_time=self.read))

    def read(self):
        return self.now_s

    def passing(self, seconds, call):
        """`call`, and that it takes `seconds`."""

        def taken(*arguments):
            self.now_s += seconds
            return call(*arguments)

        return taken


@pytest.mark.parametrize(("late_s", "found"), [(0.0, False), (0.02, True)])
def test_a_batch_that_comes_late_is_found(tmp_path, monkeypatch, late_s, found):
    """Real steps by a planted clock, whose stream is slow or not: the phase shows it, and the rule names it."""
    request, stream = setting(tmp_path)
    trainee = build(request, steps=8, shared=SharedBase())
    clock = Clock(monkeypatch)
    stream.take = clock.passing(late_s, stream.take)
    monkeypatch.setattr(TrainStep, "loss", clock.passing(0.05, TrainStep.loss))
    plain, step = TrainStep(trainee, stream, request.variant, "cpu"), BorderedStep(trainee, stream, request)
    samples = step_times(plain, step, "cpu", budget_s=0.0)
    evidence = Evidence(
        variant=request.variant, workload=request.workload, device="cpu",
        step_s=statistics.median(samples["plain_step_time_s"]),
        phases_s={phase: statistics.median(samples[f"phase_{phase}_s"]) for phase in STEP_PHASES},
    )  # fmt: skip
    codes = {finding.code: finding for finding in diagnose(evidence)}
    assert ("data-wait" in codes) is found
    if found:
        assert codes["data-wait"].cost_s == pytest.approx(2 * late_s)  # two micro-batches a step
    assert samples["phase_forward_s"] == pytest.approx([0.1] * 8)


def test_what_ran_is_told_by_phase():
    """On a CPU operators count without those that they call, inside the phase that they began in."""
    weight = torch.randn(256, 256, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.ones(8).exp()  # in no phase
        with record_function(f"{MARK}forward"):
            loss = (weight @ weight).sum()
        with record_function(f"{MARK}backward"):
            loss.backward()
    activity = activity_of(recorded.profiler.kineto_results.events(), (0.01,), "cpu")
    data, forward, backward, update = activity.phases
    assert (activity.device, data.calls, update.calls) == ("cpu", 0.0, 0.0)
    names = {use.name: use for use in forward.operators}
    assert (names["aten::mm"].category, names["aten::mm"].calls) == ("matmul", 1.0)
    assert "aten::exp" not in names
    assert {use.name: use.calls for use in backward.operators}["aten::mm"] == 2.0
    assert forward.busy_s <= forward.window_s
    assert forward.totals_s["aten::matmul"] > names["aten::matmul"].time_s
    assert sum(use.time_s for use in forward.operators) == pytest.approx(forward.busy_s, rel=0.01)


def event(name, start, end, *, device=DeviceType.CUDA, marked=False, stream=7):
    """A record of the profiler, constructed; times in milliseconds."""
    values = {
        "name": name, "device_type": device, "is_user_annotation": marked, "is_hidden_event": False, "is_async": False,
        "start_ns": int(start * 1e6), "end_ns": int(end * 1e6), "device_index": 0, "start_thread_id": 0,
        "device_resource_id": stream, "sequence_nr": -1, "fwd_thread_id": 0, "dtypes": [],
    }  # fmt: skip
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})


def test_on_a_gpu_the_device_is_busy_where_kernels_run():
    """Constructed records of two steps: overlapping streams count once as busy, the host's launches not at all."""
    host = {"device": DeviceType.CPU}
    events = []
    for begin in (100, 200):
        events += [
            event(f"{MARK}forward", begin, begin + 20, marked=True, **host),
            event(f"{MARK}forward", begin, begin + 20, marked=True),
            event("aten::mm", begin, begin + 1, **host),
            event("cudaLaunchKernel", begin, begin + 1, **host),
            event("nvjet_tst_128x64", begin + 2, begin + 8),
            event("Memcpy HtoD (Pageable -> Device)", begin + 6, begin + 10, stream=8),
            event("kernel_nobody_knows", begin + 30, begin + 40),
        ]
    activity = activity_of(events, (0.1, 0.1), "cuda")
    forward = activity.phases[1]
    assert activity.device == "cuda"
    assert (forward.window_s, forward.busy_s) == pytest.approx((0.020, 0.008))
    assert forward.categories_s == pytest.approx({"matmul": 0.006, "copy": 0.004})
    assert activity.calls == 2.0
    with pytest.raises(ValueError, match="no phase"):
        activity_of([], (0.1,), "cuda")


def test_a_device_whose_kernels_were_not_recorded_is_no_cpu():
    """Constructed records without any of the device: nothing is said to have run, and why is said."""
    host = {"device": DeviceType.CPU}
    events = [event(f"{MARK}forward", 0, 20, marked=True, **host), event("aten::mm", 1, 9, **host)]
    activity = activity_of(events, (0.1,), "cuda")
    assert (activity.device, activity.calls) == ("cuda", 0.0)
    assert "CUPTI" in activity.missing
    assert activity_of(events, (0.1,), "cpu").missing == ""


@pytest.mark.parametrize(("missing", "kept"), [(["no kernel", ""], 1), ([""], 0), (["no kernel", "no kernel"], 1)])
def test_a_profile_without_a_kernel_of_the_card_is_tried_once_more(monkeypatch, missing, kept):
    """It may have begun on the heels of another; a card that never tells is asked no third time."""
    sessions = [SimpleNamespace(missing=one) for one in missing]
    left = list(sessions)
    monkeypatch.setattr(profiling, "_session", lambda *asked: ((), ()))
    monkeypatch.setattr(profiling, "activity_of", lambda *records, **names: left.pop(0))
    assert profiling.profiled("step", "cuda", Path("folder")) is sessions[kept]
    assert not left


def test_pairs_are_taken_until_the_remainder_is_known(tmp_path, monkeypatch):
    """A remainder that hardly varies takes the fewest looks, one that varies takes them all."""
    request, stream = setting(tmp_path)
    trainee = build(request, steps=8, shared=SharedBase())
    step = BorderedStep(trainee, stream, request)
    plain = TrainStep(trainee, stream, request.variant, "cpu")
    monkeypatch.setattr(profiling, "PAIRS_AT_ONCE", 8)
    monkeypatch.setattr(profiling, "MOST_PAIRS", 16)
    for width, pairs in ((1e9, 8), (0.0, 16)):
        monkeypatch.setattr(profiling, "REMAINDER_HALF_WIDTH", width)
        assert len(step_times(plain, step, "cpu")["plain_step_time_s"]) == pairs


def test_the_lengths_of_records_are_those_of_the_data(tmp_path):
    """Packed rows are full; padded ones hold one record each, without its padding."""
    _, stream = setting(tmp_path)
    lengths = stream.record_lengths()
    assert sum(lengths) == 8 * 32
    assert len(lengths) >= 8
    _, stream = setting(tmp_path, layout="padded")
    for _ in range(4):
        stream.take()
    assert len(stream.record_lengths()) == 8
    assert sum(stream.record_lengths()) == stream.real_tokens
