"""CUDA_VISIBLE_DEVICES by the rules of the programming guide, and reasons for clocks in words."""

from __future__ import annotations

import pytest

from harness.machine.throttle import POWER_CAPPED, PROTECTING, reasons_in
from harness.machine.visible import counts_along_the_bus, visible_devices


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("0", (0,)), ("2,1", (2, 1)), ("0,2,-1,1", (0, 2)), ("", ()), ("-1", ()), ("none", ()), ("0,0", ()),
        ("GPU-8932f937,1", ("GPU-8932f937", 1)), ("MIG-GPU-8932f937/1/0", ("MIG-GPU-8932f937/1/0",)),
        (" 3 , 4", (3, 4)), ("GPU-", ()), ("0," + "9" * 5000, (0,)), ("\u0661", ()),
    ],
)  # fmt: skip
def test_the_list_ends_at_the_first_entry_that_is_no_device(listed, devices):
    """Indices, UUIDs and MIG instances in order; an entry given twice makes all of it invalid."""
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == devices


def test_without_the_variable_nothing_is_hidden():
    """None, which is not the empty list."""
    assert visible_devices({}) is None


def test_the_order_is_that_of_the_bus_only_if_asked_for():
    """By default CUDA puts the fastest card first, and NVML does not."""
    assert counts_along_the_bus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert not counts_along_the_bus({})


def test_reasons_are_words_and_unknown_bits_are_said():
    """No bit is lost, and none is in two classes."""
    assert reasons_in(0) == ()
    assert reasons_in(0x1 | 0x8 | 0x200) == ("gpu_idle", "hw_slowdown", "bit 0x200")
    assert not POWER_CAPPED & PROTECTING
