"""Tests of every rule of requests on constructed evidence: an injected case that it finds, and healthy requests."""

import dataclasses

import msgspec
import pytest

from lorameter.profile.accounting import TimeSpan
from lorameter.profile.evidence import PassEvidence, RequestEvidence
from lorameter.profile.request_rules import (
    FIRST,
    LATER,
    REQUEST_RULES,
    WHOLE,
    diagnose_requests,
)
from lorameter.records.activity import ModelSize, RequestFacts, WeightCopy
from lorameter.studies.variant import LoraVariant

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
    return TimeSpan(value=value, low=value * (1 - spread), high=value * (1 + spread))


HEALTHY = RequestEvidence(
    variant=LoraVariant(name="v", adapter_dtype="bfloat16"),
    device="cuda",
    request=span(0.4),
    first_token=span(0.05),
    token=span(0.011),
    passes=PASSES,
    prefill=PassEvidence(time_s=0.04, calls=900, idle_s=0.002, head_s=0.001),
    decode=PassEvidence(time_s=0.01, calls=900, idle_s=0.0005, cache_s=0.0001, head_s=0.001),
    choose_s=0.0005,
    facts=FACTS,
    merged=span(0.398),
    merged_calls=700.0,
    new_length=TimeSpan(value=0.0001, low=-0.001, high=0.001),
    adapter_dtype="bfloat16",
    bytes_per_s=1e12,
)
"""Constructed: a request of 0.4 s with a busy GPU, and an adapter that costs almost nothing."""


def changed(*, variant=None, prefill=None, decode=None, facts=None, **fields):
    """Return the healthy evidence with changed fields, and with changed fields of its parts."""
    parts = {"variant": variant, "prefill": prefill, "decode": decode}
    fields |= {"facts": msgspec.structs.replace(FACTS, **facts)} if facts else {}
    own = {name: dataclasses.replace(getattr(HEALTHY, name), **given) for name, given in parts.items() if given}
    return dataclasses.replace(HEALTHY, **own, **fields)


SLOW_HEAD = {"prefill": {"time_s": 1.55, "copies": (HEAD_COPY,), "head_s": 1.51}, "first_token": span(1.6)}
PLANTED = {
    "weight-copied": (changed(**SLOW_HEAD), FIRST, 1.51 - 320 * MIB / 1e12, {"copy_head_input": True}),
    "adapter-unmerged": (changed(merged=span(0.3)), WHOLE, 0.1, {"merge_adapter": True}),
    "dequantisation": (
        changed(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}, unquantised_bytes=10**9),
        LATER, 0.004 - 1e9 / 1e12, {"quantization": "none"},
    ),
    "launch-bound": (changed(decode={"idle_s": 0.006}), LATER, 0.006, {}),
    "cache-reallocated": (changed(decode={"cache_s": 0.001}), LATER, 0.001, {"kv_cache": "static"}),
    "prompt-logits": (changed(prefill={"head_s": 0.02}, facts={"logit_rows": 32}), FIRST, 0.02 * 31 / 32, {}),
    "between-tokens": (changed(choose_s=0.004), LATER, 0.004, {}),
    "new-length": (changed(new_length=TimeSpan(value=0.03, low=0.02, high=0.04)), FIRST, 0.03, {}),
    "mixed-types": (
        changed(adapter_dtype="float32", prefill={"casts_s": 0.002}, decode={"casts_s": 0.001}),
        WHOLE, 0.002 + PASSES * 0.001, {"adapter_dtype": "bfloat16"},
    ),
}  # fmt: skip
"""Constructed evidence, the metric of the cost, the cost in seconds, and the suggested changes of the variant."""


def test_a_healthy_request_has_no_finding():
    """No rule finds anything in it."""
    assert diagnose_requests(HEALTHY) == ()


def test_every_rule_has_a_planted_case():
    """Each rule has an injected case that triggers it."""
    assert set(PLANTED) == set(REQUEST_RULES)


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_case_is_found_alone(code):
    """The finding has its cost and the suggested changes; no other rule reports the case."""
    evidence, metric, cost_s, changes = PLANTED[code]
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
        (changed(prefill={"copies": (msgspec.structs.replace(HEAD_COPY, time_s=0.0005),)}), []),
        (changed(**SLOW_HEAD, variant={"copy_head_input": True}), [{}]),
        (changed(prefill={"time_s": 1.55, "copies": (LAYER_COPY,)}, first_token=span(1.6)), [{}]),
        (changed(merged=TimeSpan(value=0.3, low=0.2, high=0.4)), []),
        (changed(merged=None), []),
        (changed(merged=span(0.5)), []),
        (changed(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}), [{}]),
        (
            changed(variant={"quantization": "nf4"}, decode={"dequantise_s": 0.004}, unquantised_bytes=10**10),
            [{}],
        ),
        (
            changed(variant={"quantization": "nf4", "prepare_for_kbit": True}, decode={"casts_s": 0.001}),
            [{"prepare_for_kbit": False}],
        ),
        (changed(facts={"cache_moved": 0.0, "cache": "StaticCache"}, decode={"cache_s": 0.001}), []),
        (changed(prefill={"head_s": 0.02}), []),
        (changed(new_length=TimeSpan(value=0.03, low=-0.01, high=0.04)), []),
        (changed(variant={"dtype": "float32"}, adapter_dtype="float32", decode={"casts_s": 0.001}), []),
        (changed(variant={"merge_adapter": True}, adapter_dtype="float32", decode={"casts_s": 0.001}), []),
        (changed(device="cpu", decode={"idle_s": 0.0015}, choose_s=0.0015), []),
    ],
)
def test_harmless_and_unchangeable_cases_have_no_change(evidence, found):
    """A variation of each injected case has no finding, or one without a change of the variant."""
    findings = diagnose_requests(evidence)
    assert [finding.changes for finding in findings] == found
    for finding in findings:
        assert bool(finding.suggestion) != bool(finding.obstacle)
