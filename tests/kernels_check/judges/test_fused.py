"""Tests that fused kernels count where they are bound and called, on constructed evidence, since real ones need a
GPU."""

import pytest

from kernels_check.judges.execution import judge_fused
from kernels_check.observe.execution import FusedKernelSite


def _place(kind="rms_norm", library="liger_kernel", *, called=True, hidden=False, name="norm"):
    return FusedKernelSite(kind=kind, name=name, library=library, called=called, hidden=hidden)


def _judge(seen, required, *places, **given):
    observation = seen(**given)
    vars(observation)["fused_kernel_sites"] = list(places)  # what the property has cached
    return judge_fused(observation, required).against("fused.kernels", required)


def test_unbound_places_are_counted(training):
    """Each kind is listed with its number of places, and none is required."""
    check = training().check("fused.kernels")
    assert (check.status, check.observed) == ("not_applicable", None)
    assert check.reason == "loss 0 of 1, rope 0 of 2, qkv 0 of 2, o 0 of 2, mlp 0 of 2, rms_norm 0 of 5"


def test_rope_is_recognised_by_the_function_that_attention_names(training, monkeypatch):
    """Liger replaces the function in the module of the model's code."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb

    def rotary(*args, **kwargs):
        return own(*args, **kwargs)

    rotary.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    check = training().check("fused.kernels", "rope")
    assert check.met, check.reason
    assert "rope 2 of 2 of liger_kernel" in check.reason


def test_a_profile_without_its_kernels_contradicts(seen):
    """A bound and called kernel is absent if the profile shows other kernels only."""
    without = _judge(seen, "rms_norm", _place(), kernels={"GEMM-BF16": 4})
    assert (without.status, without.observed) == ("absent", None)
    assert "no kernel of liger_kernel was launched" in without.reason
    assert _judge(seen, "rms_norm", _place(), kernels={"LIGER": 4}).met
    unknown_rule = _judge(seen, "rms_norm", _place(library="apex"), kernels={"GEMM-BF16": 4})
    assert unknown_rule.met, unknown_rule.reason


@pytest.mark.parametrize(
    ("places", "required", "status"),
    [
        ([_place(), _place(called=False)], "rms_norm", "fallback"),
        ([_place(), _place(library=None)], "rms_norm", "fallback"),
        ([_place(called=False)], "rms_norm", "absent"),
        ([_place(hidden=True, called=False)], "rms_norm", "unknown"),
        ([_place(), _place("mlp", hidden=True, called=False)], "rms_norm", "active"),
        ([_place()], "rms_norm+rope", "fallback"),
        ([_place()], "rmsnorm", "fallback"),
        ([], "rms_norm", "absent"),
    ],
)
def test_all_places_of_each_required_kind_must_be_fused(seen, places, required, status):
    """All places of each required kind must be fused, and no place meets a misspelt kind."""
    assert _judge(seen, required, *places).status == status
