"""Verify a fine-tuning step: watch it, judge each requirement, leave no trace.

The evidence comes from the process and the step that are measured, in calls of their own: nothing here runs while a
step is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kernels_check.check import INSTRUMENTS, Check, Instrument, Json, judge_safely
from kernels_check.judges.paths import PATHS, validate
from kernels_check.observe.gc_pause import gc_paused
from kernels_check.observe.observation import Observation
from kernels_check.observe.observe import observe
from kernels_check.observe.restore import restored


def verify(
    model: nn.Module,
    step: Callable[[], object],
    requirements: Mapping[str, Json],
    *,
    batch: Mapping[str, Any] | None = None,
    instrument: Instrument = "profile",
) -> list[Check]:
    """Judge what really runs in ``step`` against ``requirements``.

    Args:
        model: the model that ``step`` trains, as PEFT returned it.
        step: does one forward, backward and optimizer step; called twice, and up to eight times where its optimizer
            steps in some calls only or begins at a learning rate of zero.
        requirements: path to expected value, see ``REQUIREMENTS``. Paths nobody asked for are reported too, with
            ``required`` None.
        batch: packed inputs of ``model(**batch)``, to probe isolation in evaluation too. Without it
            ``packing.isolated`` is judged, where it is required, by the step's own calls as they were made.
        instrument: ``profile`` sees operators, kernels and compiled code, for the price of several steps; ``spy`` sees
            operators only, and how often compiled code is entered, for that of a step (see ``spy``). It is meant for
            the further replicates of a run whose first was profiled.

    Returns:
        One check per path, in the order of ``REQUIREMENTS``. A requirement is met only by status ``active``.
        A path that the spy cannot judge in this step is left out, required or not: a check that is there and not met
        is a failure by either instrument, and a path that is missing needs a profile. Left out are
        ``packing.isolated``; ``tf32`` on CUDA; what operators show where the step enters compiled code; on CUDA the
        paths of which no operator was called; and ``padding.share`` of a model compiled in place.
        What the instrument should have seen and could not is ``unknown``, with the reason: for the spy what ran in a
        thread of its own; for both what only a profile tells, where the program runs a profiler around this call or
        inside ``step``. That profiler is left undisturbed, and the spy watches.

    Raises:
        ValueError: unknown path or a value of the wrong kind; ``step`` has not been called then.
        Exception: whatever ``step`` raises, after everything has been restored.
        RestoreError: something could not be restored; everything else has been. What is restored and what nobody can
            restore, such as a data iterator, is listed in ``observation.restore``.
    """
    validate(requirements)
    if instrument not in INSTRUMENTS:
        raise ValueError(f"instrument {instrument!r} is none of {', '.join(INSTRUMENTS)}")
    with restored(model, step) as snapshot:
        seen = observe(model, step, snapshot, instrument)
        with gc_paused():
            checks = judge_all(seen, requirements, instrument, packed=False)
    if batch is not None or any(PATHS[path].packed for path in requirements):
        checks |= judge_all(replace(seen, batch=batch, left=None), requirements, instrument, packed=True)
    return [checks[path] for path in PATHS if path in checks]


def judge_all(
    seen: Observation, requirements: Mapping[str, Json], instrument: Instrument, *, packed: bool
) -> dict[str, Check]:
    """Judge the paths that take a packed batch, or those that take none, as far as the instrument could see."""
    checks = {}
    for path, judged in PATHS.items():
        if judged.packed is not packed or instrument not in judged.instruments:
            continue
        required = requirements.get(path)
        untold = [seen.untold[evidence] for evidence in judged.rests_on if evidence in seen.untold]
        if untold:
            checks[path] = Check(path=path, required=required, observed=None, status="unknown", reason=untold[0])
        elif seen.blind.keys().isdisjoint(judged.rests_on):
            checks[path] = judge_safely(path, required, partial(judged.judge, seen, required))
    return checks
