"""Tests of the parts of a step, computed from the clock at their borders."""

from types import SimpleNamespace

import pytest

from lorameter.attach.steps import sum_parts


def borders(*events, event_of=lambda at_s: None):
    """Return the borders of a step that begins at 0, one event each second: + begins a part, - ends it, < begins a
    backward pass after a forward pass."""
    kinds = {"+": "begin", "-": "end", "<": "backward"}
    found = [(None, "begin", 0.0, event_of(0.0))]
    for at_s, event in enumerate(events, 1):
        found.append((event[1:], kinds[event[0]], float(at_s), event_of(float(at_s))))
    return found


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (["+forward", "-forward", "+backward", "-backward"], {"forward": 1.0, "backward": 1.0}),
        (["+forward", "-forward", "+forward", "-forward"], {"forward": 2.0}),
        (["+data", "-data", "<backward", "-backward", "<backward", "-backward"],
         {"data": 1.0, "forward": 2.0, "backward": 2.0}),
        (["+optimizer", "<backward", "-backward", "-optimizer"], {"optimizer": 1.0, "forward": 1.0, "backward": 1.0}),
        (["+optimizer", "+optimizer", "-optimizer", "-optimizer"], {"optimizer": 3.0}),
        (["+optimizer", "+backward", "-optimizer", "+forward", "-forward"],
         {"optimizer": 1.0, "backward": 1.0, "forward": 1.0}),
        (["+backward", "-backward", "-backward", "-optimizer"], {"backward": 1.0}),
        (["+forward", "-forward", "+backward"], {"forward": 1.0}),
    ],
    ids=["in turn", "twice", "passes", "a closure", "in itself", "an end left out", "an end too many", "none"],
)  # fmt: skip
def test_time_of_nested_parts_counts_for_the_innermost(events, found):
    """With any nesting and any missing end, no time is counted twice."""
    parts = sum_parts(borders(*events))
    parts.pop(None)
    assert parts == found


def test_on_a_gpu_the_device_stamps_all_but_the_wait_for_data():
    """This also holds for nested parts. The GPU's clock runs at half the speed of the host's."""

    def event_of(at_s):
        return SimpleNamespace(at_s=at_s / 2, elapsed_time=lambda later: (later.at_s - at_s / 2) * 1e3)

    events = ["+data", "-data", "+optimizer", "+data", "-data", "+forward", "-forward", "-optimizer"]
    parts = sum_parts(borders(*events, event_of=event_of))
    parts.pop(None)
    assert parts == {"data": 2.0, "optimizer": 1.5, "forward": 0.5}
