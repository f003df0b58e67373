"""Watch one request of a model that serves: which attention it ran."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kernels_check.check import INSTRUMENTS, Check, Instrument, Json, judge_safely
from kernels_check.judges.paths import validate
from kernels_check.judges.request import judge_request
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.dispatch_recorder import spied
from kernels_check.observe.events import StepProfile
from kernels_check.observe.instruments import lacks_kernels
from kernels_check.observe.recording import is_recording, profiled

PATH = "request.attention"


def watch_request(
    model: nn.Module, request: Callable[[], object], required: Json = None, *, instrument: Instrument = "profile"
) -> Check | None:
    """Judge the attention of one request, of its first token and of those after it.

    Args:
        model: that answers, as PEFT returned it.
        request: asks it once; called once more where a profile held nothing of the GPU.
        required: what a training step is required to run, in the words of ``attention.backend``; a fused backend stands
            for any.
        instrument: as for ``verify``. The spy sees no code of torch.compile, and on a GPU no library without
            operators.

    Returns:
        A check of the path ``request.attention``; None where the spy saw nothing that could decide, which is left to a
        profile, and where ``request`` runs a profiler of its own.

    Raises:
        ValueError: unknown instrument, or a value of the wrong kind.
        Exception: whatever ``request`` raises.
    """
    if required is not None:
        validate({"attention.backend": required})
    if instrument not in INSTRUMENTS:
        raise ValueError(f"instrument {instrument!r} is none of {', '.join(INSTRUMENTS)}")
    seen = _profiled(model, request) if instrument == "profile" and not is_recording() else _spied(model, request)
    if seen is None or "attention" in seen.blind:
        return None
    return judge_safely(PATH, required, partial(judge_request, model, seen, required))


def _profiled(model: nn.Module, request: Callable[[], object]) -> StepProfile | None:
    seen = profiled(request)
    return profiled(request) if lacks_kernels(seen, model) else seen


def _spied(model: nn.Module, request: Callable[[], object]) -> StepProfile:
    """By the operators that a dispatch mode sees; calls of modules are told to nobody, since no layer is asked for."""
    with spied(CallRecorder(model)) as spy:
        request()
    return spy.profile(model)
