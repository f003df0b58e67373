"""A remedy is tried as a study of two variants, and judged as any other."""

from types import SimpleNamespace

import pytest

from harness.diagnosis import Finding
from harness.errors import UsageError
from harness.protocol import Protocol
from harness.record import TrialRecord
from harness.remedy import chosen, study_of, tried
from harness.study_file import load_variant


def finding(code="dropout", **changes):
    return Finding(code=code, message="m", cost_s=0.02, cost_share=0.2, remedy="Do it.", changes=changes)


def test_the_dearest_finding_that_can_be_tried_is_chosen():
    """Without a name the first whose remedy is a variant; one that cannot be tried is refused with those that can."""
    found = (finding("contention"), finding("dropout", lora_dropout=0.0))
    assert chosen(found, None).code == chosen(found, "dropout").code == "dropout"
    for code, words in (("contention", r"Do it\. .*tried: dropout"), ("padding", "not found .*tried: dropout")):
        with pytest.raises(UsageError, match=words):
            chosen(found, code)
    with pytest.raises(UsageError, match="no finding"):
        chosen(found[:1], None)


def test_the_present_variant_is_the_reference_of_two():
    """They differ in what the remedy changes and in nothing else; requirements about that are not demanded."""
    study, variant = load_variant("lora-or-qlora:qlora-nf4-r16")
    pair = study_of(study, variant, finding("dequantisation", quantization="none"), protocol=Protocol(replicates=5))
    present, suggested = pair.variants
    assert pair.reference == present.name == variant.name
    assert suggested.name == "without-dequantisation"
    assert suggested.differences(present) == ("quantization",)
    assert (pair.workload, pair.protocol.replicates) == (study.workload, 5)


def run_of(times, *, status="ok"):
    """A constructed run: step times of the present variant, its control and the suggested one, in four replicates."""
    records = [
        TrialRecord(
            trial=f"r{replicate}-{name}-{role}", status=status if name == "new" else "ok", name=name, variant=name,
            role=role, replicate=replicate, position=position, interleaving="shared-base", seed=0,
            started_unix_s=0.0, wall_time_s=1.0,
            samples={"step_time_s": tuple(seconds * (1 + 0.001 * turn + 0.0001 * replicate) for turn in range(6))},
        )
        for replicate in range(4)
        for position, (name, role, seconds) in enumerate(times)
    ]  # fmt: skip
    manifest = SimpleNamespace(run="a", interleaving="shared-base", study={"reference": "old"})
    return SimpleNamespace(manifest=manifest, records=records)


def test_a_gain_counts_where_the_control_is_no_difference():
    """Constructed times: a fifth is gained; with a control that differs, or a failed trial, nothing counts."""
    old, control, new = ("old", "variant", 0.1), ("old", "control", 0.1), ("new", "variant", 0.08)
    gained = tried(run_of([old, control, new]), finding())
    assert gained.valid
    assert gained.comparison.verdict == "improved"
    assert gained.comparison.ratio == pytest.approx(0.8)
    assert not tried(run_of([old, ("old", "control", 0.12), new]), finding()).valid
    failed = tried(run_of([old, control, new], status="oom"), finding())
    assert not failed.valid
    assert failed.failures
