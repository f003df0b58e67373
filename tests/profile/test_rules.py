"""Tests of every profiling rule on constructed evidence: an injected case that it finds, and a healthy step without
findings.

Tests of every rule of requests on constructed evidence: an injected case that it finds, and healthy requests.

Tests of times that the evidence takes from the operators of a phase, on constructed phases.
"""

import dataclasses

import msgspec
import pytest

from lorameter.profile.evidence import PassEvidence, ProfileEvidence, RequestEvidence, dropout_s, unpacking_s
from lorameter.profile.rules import FIRST, LATER, REQUEST_RULES, RULES, WHOLE, diagnose, diagnose_requests
from lorameter.records.activity import ModelSize, OperatorUse, PhaseActivity, RequestFacts, WeightCopy
from lorameter.stats import Estimate
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
INJECTED = {
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
    "logits": (changed(logits_bytes=2 * GIB, liger=True), None, {"liger_kernel": True}),
    "fragmentation": (changed(reserved_bytes=15 * GIB), None, {}),
}  # fmt: skip
"""Constructed evidence, the share of a step that the finding costs, and the suggested changes of the variant."""


def test_a_healthy_step_has_no_finding():
    """No rule finds anything in it."""
    assert diagnose(HEALTHY) == ()


def test_every_rule_has_an_injected_case():
    """Each rule has an injected case that triggers it."""
    assert set(INJECTED) == set(RULES)


@pytest.mark.parametrize("code", INJECTED)
def test_only_the_injected_case_is_found(code):
    """The finding has its cost and the suggested changes; no other rule reports the case."""
    evidence, share, changes = INJECTED[code]
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


MIB = 2**20
PASSES = 31
SIZE = ModelSize(
    linear_elements=100 * MIB, linear_bytes=200 * MIB, head_elements=160 * MIB, head_bytes=320 * MIB,
    adapter_elements=MIB, adapter_bytes=2 * MIB, norm_bytes=1000,
)  # fmt: skip
FACTS = RequestFacts(
    prompt_rows=32, logit_rows=1, cache="DynamicCache",
    cache_bytes=4 * MIB, cache_moved=1.0, head="lm_head.weight", size=SIZE,
)  # fmt: skip
HEAD_COPY = WeightCopy(
    weight="lm_head.weight", shape=(1, 640, 262144), operator="aten::contiguous", calls=1.0, time_s=1.5
)


def span(value, spread=0.01):
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread))


HEALTHY_REQUEST = RequestEvidence(
    variant=LoraVariant(name="v", adapter_dtype="bfloat16"),
    device="cuda",
    request=span(0.4),
    first_token=span(0.05),
    token=span(0.011),
    passes=PASSES,
    prefill=PassEvidence(time_s=0.04, calls=900, idle_s=0.002, head_s=0.001),
    decode=PassEvidence(time_s=0.01, calls=900, idle_s=0.0005, cache_s=0.0001, head_s=0.001),
    facts=FACTS,
    merged=span(0.398),
    merged_calls=700.0,
    adapter_dtype="bfloat16",
    bytes_per_s=1e12,
)
"""Constructed: a request of 0.4 s with a busy GPU, and an adapter that costs almost nothing."""


def changed_request(*, variant=None, prefill=None, decode=None, facts=None, **fields):
    """Return the healthy evidence with changed fields, and with changed fields of its parts."""
    parts = {"variant": variant, "prefill": prefill, "decode": decode}
    fields |= {"facts": msgspec.structs.replace(FACTS, **facts)} if facts else {}
    own = {name: dataclasses.replace(getattr(HEALTHY_REQUEST, name), **given) for name, given in parts.items() if given}
    return dataclasses.replace(HEALTHY_REQUEST, **own, **fields)


SLOW_HEAD = {"prefill": {"time_s": 1.55, "copies": (HEAD_COPY,), "head_s": 1.51}, "first_token": span(1.6)}
INJECTED_REQUESTS = {
    "weight-copied": (changed_request(**SLOW_HEAD), FIRST, 1.51 - 320 * MIB / 1e12, {"copy_head_input": True}),
    "adapter-unmerged": (changed_request(merged=span(0.3)), WHOLE, 0.1, {"merge_adapter": True}),
    "dequantisation": (
        changed_request(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}, unquantised_bytes=10**9),
        LATER, 0.004 - 1e9 / 1e12, {"quantization": "none"},
    ),
    "launch-bound": (changed_request(decode={"idle_s": 0.006}), LATER, 0.006, {}),
    "cache-reallocated": (changed_request(decode={"cache_s": 0.001}), LATER, 0.001, {"kv_cache": "static"}),
    "mixed-types": (
        changed_request(adapter_dtype="float32", prefill={"casts_s": 0.002}, decode={"casts_s": 0.001}),
        WHOLE, 0.002 + PASSES * 0.001, {"adapter_dtype": "bfloat16"},
    ),
}  # fmt: skip
"""Constructed evidence, the metric of the cost, the cost in seconds, and the suggested changes of the variant."""


def test_a_healthy_request_has_no_finding():
    """No rule finds anything in it."""
    assert diagnose_requests(HEALTHY_REQUEST) == ()


def test_every_request_rule_has_an_injected_case():
    """Each rule has an injected case that triggers it."""
    assert set(INJECTED_REQUESTS) == set(REQUEST_RULES)


@pytest.mark.parametrize("code", INJECTED_REQUESTS)
def test_only_the_injected_case_of_a_request_is_found(code):
    """The finding has its cost and the suggested changes; no other rule reports the case."""
    evidence, metric, cost_s, changes = INJECTED_REQUESTS[code]
    (finding,) = diagnose_requests(evidence)
    assert (finding.code, finding.metric, finding.changes) == (code, metric, changes)
    whole = {FIRST: evidence.first_token, LATER: evidence.token, WHOLE: evidence.request}[metric].value
    assert finding.cost_s == pytest.approx(cost_s)
    assert finding.cost_share == pytest.approx(cost_s / whole)
    dataclasses.replace(evidence.variant, **finding.changes)  # a variant that could run
    assert bool(finding.suggestion) != bool(finding.obstacle)


LAYER_COPY = msgspec.structs.replace(HEAD_COPY, weight="model.layers.0.mlp.up_proj.weight and 7 like it")


@pytest.mark.parametrize(
    ("evidence", "found"),
    [
        (changed_request(prefill={"copies": (msgspec.structs.replace(HEAD_COPY, time_s=0.0005),)}), []),
        (changed_request(**SLOW_HEAD, variant={"copy_head_input": True}), [{}]),
        (changed_request(prefill={"time_s": 1.55, "copies": (LAYER_COPY,)}, first_token=span(1.6)), [{}]),
        (changed_request(merged=Estimate(value=0.3, low=0.2, high=0.4)), []),
        (changed_request(merged=None), []),
        (changed_request(merged=span(0.5)), []),
        (changed_request(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}), [{}]),
        (
            changed_request(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}, unquantised_bytes=10**10),
            [{}],
        ),
        (
            changed_request(variant={"quantization": "nf4", "prepare_for_kbit": True}, decode={"casts_s": 0.001}),
            [{"prepare_for_kbit": False}],
        ),
        (changed_request(facts={"cache_moved": 0.0, "cache": "StaticCache"}, decode={"cache_s": 0.001}), []),
        (changed_request(variant={"dtype": "float32"}, adapter_dtype="float32", decode={"casts_s": 0.001}), []),
        (changed_request(variant={"merge_adapter": True}, adapter_dtype="float32", decode={"casts_s": 0.001}), []),
        (changed_request(device="cpu", decode={"idle_s": 0.0015}), []),
    ],
)
def test_harmless_and_unchangeable_cases_have_no_change(evidence, found):
    """A variation of each injected case has no finding, or one without a change of the variant."""
    findings = diagnose_requests(evidence)
    assert [finding.changes for finding in findings] == found
    for finding in findings:
        assert bool(finding.suggestion) != bool(finding.obstacle)


def phase(*uses, **fields):
    operators = tuple(OperatorUse(name=name, category=category, calls=1.0, time_s=s) for name, category, s in uses)
    return PhaseActivity(phase="forward", window_s=1.0, busy_s=0.9, operators=operators, **fields)


FUNCTION, PRODUCT = ("MatMul4Bit", "other", 0.01), ("aten::mm", "matmul", 0.5)
UNPACKED = ("bitsandbytes::dequantize_4bit", "dequantize", 0.1)


@pytest.mark.parametrize(
    ("uses", "seconds"),
    [
        ((UNPACKED, PRODUCT), 0.1),  # a GPU kernel, which calls no operator
        ((UNPACKED, FUNCTION, PRODUCT), 0.11),
        ((FUNCTION, ("bitsandbytes::gemm_4bit", "matmul", 0.4)), 0.0),  # packed weights are not unpacked
        ((PRODUCT,), 0.0),
    ],
)
def test_unpacking_includes_the_surrounding_functions(uses, seconds):
    """Surrounding functions count with the unpacking, and not where nothing is unpacked."""
    assert unpacking_s(phase(*uses)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [({"totals_s": {"aten::dropout": 0.2}}, 0.2), ({"dropout_backward_s": 0.05}, 0.1), ({}, 0.05)],
)
def test_dropout_time_includes_the_backward_pass(fields, seconds):
    """Dropout time is that of its operator with all that it calls, or of kernels by name, plus the backward pass."""
    drawn = ("fused_dropout_kernel_vec", "elementwise", 0.05)
    assert dropout_s(phase(drawn, PRODUCT, **fields)) == pytest.approx(seconds)
