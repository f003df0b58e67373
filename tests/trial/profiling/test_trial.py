"""Tests of the profile of a trial's steps."""

from __future__ import annotations

import pytest
import torch

from lorameter.models.costs.modules import from_values
from lorameter.records.activity import STEP_PHASES
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.profiling.trial import ProfiledTrial


@pytest.fixture
def trial(tmp_path):
    """A built trial of the smallest model without measurements."""
    workload = Workload(sequence_length=32, batch_size=1, train_sequences=4, held_out_records=4, held_out_sequences=1)
    request = TrialRequest(
        trial="t", variant=LoraVariant(name="v", r=4), role="variant", replicate=0, seed=1, workload=workload,
        protocol=Protocol(), interleaving="replicates", measures=("steps", "peaks"), device="cpu", threads=1,
        tokens_path=prepare(workload, tmp_path).path, scratch=str(tmp_path), log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    one = ProfiledTrial(request, SharedBase())
    one.run("build")
    return one


def test_a_profile_times_phases_and_counts_products(trial, monkeypatch):
    """Steps come in pairs; products are counted from the modules where the family has no closed form."""
    profiled = trial.run("profile", budget_s=0.0)
    assert from_values(profiled.values) is None
    samples = profiled.samples
    assert len(samples["plain_step_time_s"]) == len(samples["phase_forward_s"]) == len(samples["timed_loss"]) / 2 == 8
    for index, lap_s in enumerate(samples["bordered_step_time_s"]):
        assert sum(samples[f"phase_{phase}_s"][index] for phase in STEP_PHASES) <= lap_s
    monkeypatch.setattr("lorameter.models.shapes.FAMILIES", {})
    found = from_values(trial.run("profile", budget_s=0.0).values)
    block = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 704
    assert (found.plain, found.head) == (4 * block, 256 * 320)
    assert found.weights == found.forward - 4 * block  # the adapter's products
