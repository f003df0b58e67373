"""A real step by phases: the same step with its phases timed, and what ran in each of them."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.profiling.activity import MARK, activity_of
from lorameter.trial.profiling.phases import BorderedStep, pair_times
from lorameter.trial.step import TrainStep


def setting(folder, layout="packed"):
    workload = Workload(
        sequence_length=32, batch_size=2, train_sequences=8, held_out_records=8, held_out_sequences=2,
        prompt_tokens=8, layout=layout,
    )  # fmt: skip
    variant = LoraVariant(name="v", r=4, lora_dropout=0.1, gradient_accumulation=2)
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
    samples = pair_times(
        plain, step, "cpu", what="step", samples_of=lambda loss, _: {"timed_loss": float(loss)}, budget_s=0.0
    )
    assert len(samples["plain_step_time_s"]) == len(samples["phase_forward_s"]) == 8
    assert len(samples["timed_loss"]) == 16
    for index, lap in enumerate(samples["bordered_step_time_s"]):
        phases = sum(samples[f"phase_{phase}_s"][index] for phase in ("data", "forward", "backward", "update"))
        assert phases <= lap


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
