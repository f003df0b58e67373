"""Watch one request of a model that serves: which attention it ran."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kernels_check.check import Check, Json, judge_safely
from kernels_check.judges.attention import judge_request
from kernels_check.judges.paths import validate
from kernels_check.observe.profile import AROUND, INSIDE, is_recording, profiled

PATH = "request.attention"


def watch_request(model: nn.Module, request: Callable[[], object], required: Json = None) -> Check:
    """Judge the attention of one request, of its first token and of those after it.

    Args:
        model: that answers, as PEFT returned it.
        request: asks it once.
        required: what a training step is required to run, in the words of ``attention.backend``; a fused backend
            accepts any.

    Returns:
        A check of the path ``request.attention``; ``unknown`` under a profiler of the program, around this call or in
        ``request``.

    Raises:
        ValueError: a value of the wrong kind.
        Exception: whatever ``request`` raises.
    """
    if required is not None:
        validate({"attention.backend": required})
    if is_recording():
        return Check(path=PATH, required=required, observed=None, status="unknown", reason=AROUND)
    seen = profiled(request)
    if seen is None:
        return Check(path=PATH, required=required, observed=None, status="unknown", reason=INSIDE)
    return judge_safely(PATH, required, partial(judge_request, model, seen, required))
