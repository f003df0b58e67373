"""Tests of the finest interleaving that the variants and the memory allow."""

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.machine.provenance import probe_machine
from lorameter.run.build_plan import build_plan
from lorameter.run.interleaving import MEMORY_SHARE, choose_interleaving, shared_base_obstacle
from lorameter.studies.variant import LoraVariant

R8 = LoraVariant(name="r8", r=8)
SWEEP = (
    R8,
    LoraVariant(name="r64", r=64, lora_alpha=128, lora_dropout=0.1, use_rslora=True, target_modules=("q_proj",)),
)
MIXED = (R8, LoraVariant(name="nf4", r=8, quantization="nf4"))
GIB = 2**30


def test_variants_that_differ_in_their_adapters_share_a_base():
    """The memory does not matter, since the base is loaded once."""
    assert choose_interleaving(SWEEP, together_bytes=900 * GIB, free_bytes=GIB)[0] == "shared-base"


def test_other_variants_take_turns_in_processes_that_fit_together():
    """The reason gives the difference and both sizes."""
    level, why = choose_interleaving(MIXED, together_bytes=3 * GIB, free_bytes=8 * GIB)
    assert level == "lockstep"
    assert "nf4 differs from r8 in quantization" in why
    assert "3 GiB of 8 GiB" in why


def test_variants_that_do_not_fit_together_run_one_after_the_other():
    """The forecast must leave memory free, since a swapping machine measures nothing."""
    free = 8 * GIB
    assert choose_interleaving(MIXED, together_bytes=int(MEMORY_SHARE * free), free_bytes=free)[0] == "lockstep"
    assert choose_interleaving(MIXED, together_bytes=int(MEMORY_SHARE * free) + 1, free_bytes=free)[0] == "replicates"
    assert choose_interleaving(MIXED, together_bytes=1, free_bytes=None)[0] == "replicates"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"init_lora_weights": "olora"}, "rewrites the base"),
        ({"init_lora_weights": "pissa"}, "rewrites the base"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"compile": True}, "recompile"),
        ({"liger_kernel": True}, "whole process"),
        ({"merge_adapter": True}, "changes the base for its requests"),
        ({"kv_cache": "static"}, "kv_cache"),
        ({"attention": "eager"}, "attention"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"dtype": "float32"}, "dtype"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_variants_that_change_the_base_cannot_share_it(changes, word):
    """Each exclusion is found and named, also if only one variant has it."""
    obstacle = shared_base_obstacle((R8, dataclasses.replace(R8, name="other", **changes)))
    assert obstacle is not None
    assert obstacle.startswith("other")
    assert word in obstacle


@pytest.mark.parametrize(("device", "level"), [("cpu", "lockstep"), ("cuda", "shared-base")])
def test_on_a_cpu_variants_on_one_base_have_a_heap_each(small_study, device, level):
    """On a CPU each variant has its own process; on a GPU, whose allocator keeps its blocks, they share one."""
    machine = dataclasses.replace(probe_machine(), device=device)
    study = dataclasses.replace(small_study, variants=tuple(
        dataclasses.replace(small_study.variants[0], name=f"r{r}", r=r) for r in (4, 8)
    ), reference="r4", claims=())  # fmt: skip
    plan, _ = build_plan(study, machine, free_bytes=64 * GIB)
    assert plan.interleaving == level


def test_a_level_can_be_asked_for():
    """A coarser level is always accepted, shared-base only if the variants allow it, an unknown word never."""
    assert choose_interleaving(SWEEP, together_bytes=0, free_bytes=None, requested="replicates") == (
        "replicates",
        "asked for",
    )
    with pytest.raises(UsageError, match=r"nf4 differs from r8 in quantization.*Use lockstep"):
        choose_interleaving(MIXED, together_bytes=0, free_bytes=None, requested="shared-base")
    with pytest.raises(UsageError, match="interleave = 'shuffle'"):
        choose_interleaving(SWEEP, together_bytes=0, free_bytes=None, requested="shuffle")


def test_several_adapters_on_a_base_are_those_of_one_trial():
    """Switching iterates over all adapters of a base, so that other trials' adapters would add to its time."""
    sizes = {"together_bytes": 3 * GIB, "free_bytes": 8 * GIB, "adapters": 4}
    assert choose_interleaving(SWEEP, **sizes)[0] == "lockstep"
    with pytest.raises(UsageError, match="requests have 4 adapters on a base"):
        choose_interleaving(SWEEP, **sizes, requested="shared-base")
