"""Packed records are judged by forwards of the step's own calls."""

from negative_controls.batch_faults import pack, pack_without_cache
from negative_controls.loss_faults import return_log_probs


def test_a_model_that_returns_log_probabilities_is_judged_below_its_head(training):
    """One token less is returned, as by TRL's SFTTrainer: the hidden states tell."""
    run = training()
    pack_without_cache(run)
    run.packed = None
    return_log_probs(run)
    check = run.check("packing.isolated", True)
    assert check.met, check.reason
    pack(run, use_cache=None)
    run.packed = None
    check = run.check("packing.isolated", True)
    assert check.status == "fallback"
    assert "changing the odd records" in check.reason
