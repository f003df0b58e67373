"""Tests of every profiling rule on constructed evidence: an injected case that it finds, and a healthy step without
findings."""

import dataclasses

import pytest

from lorameter.profile.evidence import ProfileEvidence
from lorameter.profile.rules import RULES, diagnose
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

GIB = 2**30
HEALTHY = ProfileEvidence(
    variant=LoraVariant(name="v", adapter_dtype="bfloat16"),
    workload=Workload(),
    device="cuda",
    step_s=0.1,
    phases_s={"data": 0.0005, "forward": 0.04, "backward": 0.055, "update": 0.001},
    categories={"matmul": 0.7, "attention": 0.1, "elementwise": 0.1, "copy": 0.01, "optimizer": 0.01},
    idle=0.05,
    calls=2000.0,
    attention_backend="flash",
    adapter_dtype="bfloat16",
    flash_attn=True,
    peak_bytes=10 * GIB,
    memory_bytes=80 * GIB,
    extra_bytes={"quantization": 8 * GIB, "gradient_checkpointing": 20 * GIB, "optimizer": GIB},
    reserved_bytes=int(10.5 * GIB),
)
"""Constructed: a step of 100 ms during which a GPU is busy."""


def changed(variant=None, **fields):
    """Return the healthy evidence with changed fields, and with changed fields of its variant."""
    return dataclasses.replace(HEALTHY, variant=dataclasses.replace(HEALTHY.variant, **(variant or {})), **fields)


NF4 = {"quantization": "nf4", "compute_dtype": "bfloat16"}
PLANTED = {
    "launch-bound": (changed(idle=0.4), 0.4, {"compile": True}),
    "dequantisation": (changed(NF4, unpacking=0.3), 0.3, {"quantization": "none"}),
    "float32-adapter": (
        changed(adapter_dtype="float32", categories={"copy": 0.3}, casts=0.15), 0.15, {"adapter_dtype": "bfloat16"}
    ),
    "float32-compute": (changed({"dtype": "float32"}), 0.7, {"dtype": "bfloat16"}),
    "masked-attention": (
        changed(attention_mask="explicit", attention_backend="efficient", masked_pairs=0.5),
        0.05,
        {"attention": "flash_attention_2"},
    ),
    "padding": (changed(padded=0.3, workload=Workload(layout="padded")), 0.3, {}),
    "needless-checkpointing": (
        changed({"gradient_checkpointing": True}, recomputed=0.3), 0.3 * 0.95, {"gradient_checkpointing": False}
    ),
    "unfused-optimizer": (
        changed({"optimizer": "adamw"}, phases_s=dict(HEALTHY.phases_s) | {"update": 0.01}),
        0.1,
        {"optimizer": "adamw_fused"},
    ),
    "dropout": (changed({"lora_dropout": 0.1}, dropout=0.08), 0.08, {"lora_dropout": 0.0}),
    "data-wait": (changed(phases_s=dict(HEALTHY.phases_s) | {"data": 0.02}), 0.2, {}),
    "logits": (changed(logits_bytes=2 * GIB, liger=True), None, {"liger_kernel": True}),
    "fragmentation": (changed(reserved_bytes=15 * GIB), None, {}),
}  # fmt: skip
"""Constructed evidence, the share of a step that the finding costs, and the suggested changes of the variant."""


def test_a_healthy_step_has_no_finding():
    """No rule finds anything in it."""
    assert diagnose(HEALTHY) == ()


def test_every_rule_has_a_planted_case():
    """Each rule has an injected case that triggers it."""
    assert set(PLANTED) == set(RULES)


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_case_is_found_alone(code):
    """The finding has its cost and the suggested changes; no other rule reports the case."""
    evidence, share, changes = PLANTED[code]
    (finding,) = diagnose(evidence)
    assert (finding.code, finding.changes) == (code, changes)
    if share is None:
        assert finding.cost_bytes == {"logits": 2 * GIB - GIB // 4, "fragmentation": 5 * GIB}[code]
    else:
        assert finding.cost_share == pytest.approx(share)
        assert finding.cost_s == pytest.approx(share * 0.1)
    dataclasses.replace(evidence.variant, **finding.changes)  # a variant that could run
    dataclasses.replace(evidence.workload, **finding.workload_changes)
    assert bool(finding.suggestion) != bool(finding.obstacle)


@pytest.mark.parametrize(
    ("changes", "variant", "share"),
    [
        ({}, {}, 0.05 + 0.5 * 0.1),
        ({"wide_registers": False, "device": "cpu", "reserved_bytes": None}, {}, 0.05),
        ({}, NF4 | {"prepare_for_kbit": True}, 0.05),  # the head's products are among them
        ({"casts": 0.0}, {}, 0.05),
    ],
)
def test_an_adapter_in_32_bits_has_casts_and_products(changes, variant, share):
    """The cost is the casts and, on hardware with fast 16-bit products, half of the float32 products."""
    evidence = changed(variant, **{"adapter_dtype": "float32", "casts": 0.05, "wide_products": 0.1} | changes)
    (finding,) = diagnose(evidence)
    assert (finding.code, finding.cost_share) == ("float32-adapter", pytest.approx(share))


@pytest.mark.parametrize(
    ("evidence", "found"),
    [
        (changed({"gradient_checkpointing": True}, recomputed=0.3, memory_bytes=20 * GIB), []),
        (changed({"optimizer": "paged_adamw_32bit"}, memory_bytes=11 * GIB), []),
        (changed(NF4, unpacking=0.3, memory_bytes=15 * GIB), [{}]),
        (changed({"dtype": "float32"}, device="cpu", wide_registers=False), []),
        (changed({"autocast": "bfloat16"}, adapter_dtype="float32", casts=0.2), []),
        (changed(adapter_dtype="float32", categories={"copy": 0.3}, casts=0.01), []),
        (changed(logits_bytes=GIB // 2, liger=True), []),
        (changed(logits_bytes=2 * GIB), [{}]),
        (changed({"liger_kernel": True}, logits_bytes=2 * GIB, liger=True), [{}]),
        (changed(device="cpu", logits_bytes=2 * GIB, liger=True, reserved_bytes=None), [{}]),
        (changed(attention_backend="eager", variant={"attention": "eager"}), [{"attention": "sdpa"}]),
        (changed(attention_mask="explicit", masked_pairs=0.5, flash_attn=False), [{}]),
        (changed({"autocast": "float32"}, attention_mask="explicit", masked_pairs=0.5, wide_registers=False), [{}]),
        (
            changed(NF4 | {"prepare_for_kbit": True}, unpacking=0.3),
            [{"quantization": "none", "prepare_for_kbit": False}],
        ),
        (changed(padded=0.3), [{}]),
        (changed(device="cpu", attention_backend="math"), [{}]),
    ],
)
def test_an_unavailable_remedy_is_not_suggested(evidence, found):
    """A change that memory, machine or packages do not allow is not suggested; the finding has none or is left out."""
    findings = diagnose(evidence)
    assert [finding.changes for finding in findings] == found
    for finding in findings:
        dataclasses.replace(evidence.variant, **finding.changes)  # a variant that could run
        assert bool(finding.suggestion) != bool(finding.obstacle)


def test_the_most_costly_finding_comes_first():
    """Findings are sorted by cost, and those of memory are last."""
    evidence = changed({"lora_dropout": 0.1}, dropout=0.05, padded=0.3, reserved_bytes=15 * GIB)
    assert [finding.code for finding in diagnose(evidence)] == ["padding", "dropout", "fragmentation"]
