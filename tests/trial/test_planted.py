"""Real trials whose truth is known by construction: more rank is more work and more parameters, more alpha is neither.

The scaling spans a factor of 128, so that the larger alpha certainly learns faster in the
few steps that are taken. Whether three replicates suffice to decide on a time is the machine's affair: beside other
work a verdict on one may be that nothing is known, and never the wrong one. `make proof-long` runs them.
"""

from __future__ import annotations

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.verdicts.claims import judge_claims

pytestmark = pytest.mark.selftest

STUDY = """
title = "planted truths"
reference = "middle"
[workload]
model = "tiny-llama"
sequence_length = 64
batch_size = 1
train_sequences = 32
held_out_records = 8
held_out_sequences = 4
prompt_tokens = 8
new_tokens = 4
[controls]
r = 16
lora_alpha = 1
target_modules = ["all-linear"]
optimizer = "adamw"
learning_rate = 1e-3
[sweeps]
r = [16, 256]
lora_alpha = [1, 128]
[protocol]
replicates = 3
phases = ["train"]
peak_replicates = 1
warmup_steps_min = 2
warmup_steps_max = 3
turns = 12
steps_per_turn = 1
"""
TIMED = "step_time_s"
CLAIMS = {
    "slower with rank": ("trend-up", "r", "step_time_s", "supported"),
    "faster with rank": ("trend-down", "r", "step_time_s", "refuted"),
    "as fast at any rank": ("equal", "r", "step_time_s", "refuted"),
    "more parameters with rank": ("rises", "r", "trainable_parameters", "supported"),
    "more bytes with rank": ("rises", "r", "optimizer_state_bytes", "supported"),
    "less loss with alpha": ("trend-down", "lora_alpha", "held_out_loss", "supported"),
    "more loss with alpha": ("trend-up", "lora_alpha", "held_out_loss", "refuted"),
    "more parameters with alpha": ("rises", "lora_alpha", "trainable_parameters", "refuted"),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """The verdicts of one run of the study above, by what was claimed."""
    folder = tmp_path_factory.mktemp("planted")
    claims = "".join(
        f'[[claim]]\nid = "{says}"\nsays = "{says}"\n'
        f'parts = [{{ rule = "{rule}", axis = "{axis}", metric = "{metric}" }}]\n'
        for says, (rule, axis, metric, _) in CLAIMS.items()
    )
    effect = '{ rule = "largest-effect", axis = "lora_alpha", against = ["r"], metric = "held_out_loss" }'
    claims += f'[[claim]]\nid = "largest"\nsays = "alpha matters most"\nparts = [{effect}]\n'
    best = '{ rule = "best", axis = "r", levels = [256], metrics = { step_time_s = 1 } }'
    claims += f'[[claim]]\nid = "best"\nsays = "the largest rank is fastest"\nparts = [{best}]\n'
    same = '{ rule = "trend-up", axis = "lora_alpha", metric = "step_time_s" }'
    claims += f'[[claim]]\nid = "null"\nsays = "alpha costs time"\nparts = [{same}]\n'
    (folder / "planted.toml").write_text(STUDY + claims)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMETER_RUNS", str(folder / "runs"))
        assert main(["run", str(folder / "planted.toml"), "--json"]) in (0, 4)
        run = next((folder / "runs").glob("*/manifest.json")).parent
        report = judge_claims(store.read_run(run.name, run.parent))
    return {claim.id: claim for claim in report.claims}


@pytest.mark.parametrize("says", CLAIMS)
def test_a_planted_truth_is_found(verdicts, says):
    """Work, parameters and loss whose order is known: what is true is supported, what is false refuted."""
    claim, (_, _, metric, truth) = verdicts[says], CLAIMS[says]
    reason = claim.parts[0].reason
    doubted = metric == TIMED or "the control differs from itself" in reason
    assert claim.verdict in ((truth, "inconclusive") if doubted else (truth,)), reason


def test_claims_that_weigh_and_compare_are_judged(verdicts):
    """Alpha changes the loss more than rank does, and the largest rank is not the fastest."""
    assert verdicts["largest"].verdict == "supported"
    assert verdicts["best"].verdict in ("refuted", "inconclusive")


def test_a_quiet_machine_decides_on_the_times_too(verdicts):
    """Sixteen times the rank is more than twice the time: three replicates see it where nothing else runs."""
    timed = {says: truth for says, (_, _, metric, truth) in CLAIMS.items() if metric == TIMED} | {"best": "refuted"}
    assert {says: verdicts[says].verdict for says in timed} == timed


def test_no_effect_is_supported_where_there_is_none(verdicts):
    """Alpha is a factor in a product: it costs no time."""
    assert verdicts["null"].verdict in ("refuted", "inconclusive")
