"""A profiled trial takes the commands of any trial and its own, and outlives a device that it has filled."""

from __future__ import annotations

import pytest
import torch

from lorameter.models.costs.modules import from_values
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.profiling import trial as profiled
from lorameter.trial.profiling.trial import ProfiledTrial


@pytest.fixture
def trial(tmp_path):
    """A built trial of the smallest model, with nothing measured yet."""
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


def test_what_a_step_multiplies_is_counted_where_no_closed_form_says_it(trial, monkeypatch):
    """By a step that is watched and not timed; nothing is counted of a family that is known."""
    times = {"timed_loss": (1.0,)}
    monkeypatch.setattr(profiled, "pair_times", lambda *args, **options: times)
    assert from_values(trial.run("profile", budget_s=0.0).values) is None
    taken = trial._steps_taken
    monkeypatch.setattr("lorameter.models.shapes.FAMILIES", {})
    found = from_values(trial.run("profile", budget_s=0.0).values)
    assert trial._steps_taken == taken + 1
    block = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 704
    assert (found.plain, found.head) == (4 * block, 256 * 320)
    assert found.weights == found.forward - 4 * block  # the adapter's
