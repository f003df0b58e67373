"""Which attention the request of a served model ran, in its prefill and for every token after it.

What a training step ran says nothing of it: a request comes without autocast and with a cache, asks with one query at
a time, and SDPA chooses anew in each call. Which fused backend it takes may differ from the step's (on Hopper, cuDNN
against flash) and is no failure; what is required of it is that it is fused where the step's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_check.check import Json, PathObservation, count_values, join_values
from kernels_check.judges.attention import FUSED_ATTENTION, judge_kernels, likely_cause

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observe.events import StepProfile


def judge_request(model: nn.Module, profile: StepProfile, required: Json) -> PathObservation:
    """Judge the attention of one request by its operators, or by its kernels where it called none.

    Args:
        model: that was asked; it tells what it was built with.
        profile: of the request alone.
        required: of a training step, in the words of ``attention.backend``; None where nothing is.
    """
    required = "fused" if required in FUSED_ATTENTION else required
    forward = [call for call in profile.attention if call.direction == "forward"]
    if not forward:
        return judge_kernels(profile, required)
    accepted = FUSED_ATTENTION if required == "fused" else {required}
    astray = [call for call in forward if call.backend not in accepted]
    reason = f"forward: {count_values(call.backend for call in forward)}"
    masked = sum(bool(call.mask) for call in forward)
    reason += f"; {masked} with an explicit mask" if masked else ""
    if required is not None and astray:
        reason += f"; likely cause: {likely_cause(model, astray)}"
    return PathObservation(observed=join_values(call.backend for call in forward), reason=reason, satisfies=not astray)
