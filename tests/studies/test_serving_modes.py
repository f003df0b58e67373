"""Tests of which serving modes apply to a variant."""

from __future__ import annotations

import pytest

from lorameter.studies.request import base_key, serving_modes
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

NF4 = [
    "unmerged, nf4", "no adapter, nf4", "merged into nf4", "unmerged, nf4, asked again", "merged, nf4 dequantised",
    "unmerged, bfloat16", "merged into bfloat16",
]  # fmt: skip
FOUR = ["unmerged, nf4", "merged into nf4"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"quantization": "nf4"}, NF4),
        ({"quantization": "nf4", "dtype": "float32"}, NF4),
        ({"quantization": "fp4"}, [name.replace("nf4", "fp4") for name in NF4]),
        ({"quantization": "int8"}, [*(name.replace("nf4", "int8") for name in NF4), *FOUR]),
        ({"dtype": "float16"}, [*(name.replace("nf4", "float16") for name in NF4[:4]), *FOUR]),
        ({"dtype": "float32"}, [*(name.replace("nf4", "float32") for name in NF4[:4]), *NF4[5:], *FOUR]),
    ],
)
def test_a_variant_is_served_in_each_applicable_mode_once(fields, names):
    """A variant is served on its own base, in 16 bits and in 4 bits, once each, with two merges of a quantised base and
    the controls."""
    ways = [way for group in serving_modes(LoraVariant(**fields)) for way in group]
    assert [way.name for way in ways] == names
    assert [way.name for way in ways if way.is_control] == [names[1], names[3]]


def test_a_group_is_served_from_one_base_and_merges_last():
    """The merge is last in a group, because it changes the base for all later requests."""
    for group in serving_modes(LoraVariant(quantization="int8")):
        assert len({(base_key(way.variant, Workload()), way.dequantised) for way in group}) == 1
        assert not any(way.merged for way in group[:-1])
