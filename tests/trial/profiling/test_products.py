"""Products of 32 bits, told from others by real records of torch."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from harness.trial.profiling.activity import MARK, activity_of
from harness.trial.profiling.products import wide_product_times

WIDE = torch.ones(64, 64)
NARROW = WIDE.bfloat16()


def recorded(call):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found, record_function(f"{MARK}forward"):
        call()
    return list(found.profiler.kineto_results.events())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: WIDE @ WIDE, "aten::mm"),
        (lambda: torch.nn.functional.linear(WIDE, WIDE, WIDE[0]), "aten::addmm"),
        (lambda: torch.bmm(WIDE[None], WIDE[None]), "aten::bmm"),
        (lambda: NARROW @ NARROW, ""),
        (lambda: torch.nn.functional.linear(NARROW, NARROW, NARROW[0]), ""),
        (lambda: WIDE.double() @ WIDE.double(), ""),
        (lambda: WIDE * WIDE, ""),
    ],
)
def test_products_of_32_bits_are_told_from_others(call, name):
    """Once, however they were asked for."""
    events = recorded(call)
    meant = [(one.start_ns(), (one.end_ns() - one.start_ns()) / 1e9) for one in events if one.name() == name]
    assert wide_product_times([one for one in events if "aten" in one.name()], None) == meant
    assert len(meant) == bool(name)
    forward = activity_of(events, (0.01,), "cpu").phases[1]
    assert forward.wide_products_s == pytest.approx(sum(seconds for _, seconds in meant))
