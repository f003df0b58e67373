"""What the backward pass takes for what an operator of the forward pass has made.

A mask of dropout is drawn and applied by one operator, and its gradient multiplied with by an `aten::mul` like any
other. The profiler's sequence numbers tell it from others: autograd counts the nodes of its graph by thread, every
operator bears the number of the node that would be made next, and so does the call of the node in the backward pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from lorameter.trial.profiling.copies import KernelTimes, seconds_of

_CALL = "autograd::engine::evaluate_function: "
"""Before the name of a node, where the engine calls it with all that belongs to it."""
Node = tuple[int, int]
"""Of autograd's graph: the thread that made it, and its number there."""


def backward_times(host: Sequence[Any], maker: str, times: KernelTimes | None) -> list[tuple[int, float]]:
    """Beginning in nanoseconds and seconds of each call of a node that an operator of this name made.

    Args:
        host: the profiler's records of operators.
        maker: an operator of the forward pass; what it calls counts as its own.
        times: on a GPU, where the time of a call is that of its kernels.
    """
    made = _made_by(host, maker)
    return [
        (one.start_ns(), seconds_of(one, times))
        for one in host
        if one.name().startswith(_CALL) and (one.fwd_thread_id(), one.sequence_nr()) in made
    ]


def _made_by(host: Sequence[Any], maker: str) -> set[Node]:
    """Nodes of the graph that were made inside such operators.

    Operators that make none bear the number of the next one, too: the last that does has made it. Calls of nodes bear
    their numbers and the thread of the forward pass, which operators of that pass have not.
    """
    spans: dict[int, list[tuple[int, int]]] = {}
    last: dict[Node, int] = {}
    for one in sorted(host, key=lambda one: one.start_ns()):
        if one.name() == maker:
            spans.setdefault(one.start_thread_id(), []).append((one.start_ns(), one.end_ns()))
        if one.sequence_nr() >= 0 and not one.fwd_thread_id():
            last[(one.start_thread_id(), one.sequence_nr())] = one.start_ns()
    return {node for node, moment in last.items() if _is_within(moment, spans.get(node[0], ()))}


def _is_within(moment: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Of spans in order, none of which overlaps another: those of one operator on one thread."""
    place = bisect_right(spans, moment, key=lambda span: span[0]) - 1
    return place >= 0 and moment <= spans[place][1]
