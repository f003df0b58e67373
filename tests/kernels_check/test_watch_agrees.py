"""What a natural step shows is what verify says of it, or unknown where one step cannot tell: by every control."""

import pytest

from kernels_check import watch
from kernels_check.check import INSTRUMENTS
from kernels_check.controls.catalogue import CONTROLS
from kernels_check.judges.paths import PATHS
from kernels_check.observation import compilations
from kernels_check.observation.instruments import AROUND, INSIDE
from kernels_check.observation.instruments_beside import TOLD_BY_A_PROFILE
from kernels_check.observation.natural import COMPILED_MEANWHILE
from kernels_check.observation.observe import MOST_CALLS
from kernels_check.watching import NO_UPDATE, NOTHING_RAN

HERE = [control for control in CONTROLS if control.needs_cuda is None]
IN_THE_WAY = (COMPILED_MEANWHILE, INSIDE, AROUND, TOLD_BY_A_PROFILE)
"""What may be in the way of any path that rests on operators or on calls of modules, and of none of them in a step that
compiles nothing and runs no profiler."""
CAUGHT = {"status": ("fallback", "absent"), "unknown": ("unknown",), "reason": ("active",)}


UNANSWERED = {
    ("a copy of the model trained in its place", "profile"): NOTHING_RAN,
    ("a copy of the model trained in its place", "spy"): NOTHING_RAN,
    ("a copy trained beside gradients of the model itself", "profile"): NOTHING_RAN,
    ("a copy trained beside gradients of the model itself", "spy"): NOTHING_RAN,
    ("a loop inside a step with a profiler of its own", "profile"): INSIDE,
    ("compile of a loss alone", "spy"): TOLD_BY_A_PROFILE,
}
"""Controls that a watch of natural steps leaves unknown to the end, where verify has an answer, with the reason: nobody
tells it that what takes place is a step of this model, it has no step in which another profiler would be off, and no
second instrument. Unknown is no pass."""


def _some():
    """Of each path one control, in turn by a profile and by the spy where that can see it."""
    first = {control.path: control for control in reversed(HERE)}
    return [(one, one.instruments[place % len(one.instruments)]) for place, one in enumerate(first.values())]


SOME = _some()
REST = [(control, name) for control in HERE for name in control.instruments if (control, name) not in SOME]


def _ids(pairs):
    return [f"{control.name}-{name}" for control, name in pairs]


def _after_each_step(build, control, instrument):
    """The check after each watched step: two, and more while it takes them, up to those that verify takes."""
    run = build()
    watched = watch(run.model, {control.path: control.required}, instrument=instrument, batch=run.packed)
    found = []
    while len(found) < 2 or (found[-1].status == "unknown" and _waits(found[-1]) and len(found) < MOST_CALLS):
        with watched:
            run.step()
        found.append(next(check for check in watched.checks if check.path == control.path))
    return found


def _waits(check):
    further = PATHS[check.path].further_steps
    return any(reason in check.reason for reason in (further, NO_UPDATE, "watch a later step") if reason is not None)


def _agrees(check, control, statuses, instrument):
    """As promised of verify, with the same reason; or unknown, by a path that the watch lists, or by what is known to
    leave this control unknown."""
    if check.status in statuses:
        return True
    judged, own = PATHS[control.path], UNANSWERED.get((control.name, instrument))
    listed = (judged.further_steps, NO_UPDATE if judged.takes_update else None, *IN_THE_WAY, own)
    return check.status == "unknown" and any(reason is not None and reason in check.reason for reason in listed)


def _try(control, instrument):
    """Agrees after every step; and comes to an answer, unless it is listed as one that cannot."""
    unanswered = []
    try:
        for build, statuses in ((control.sabotage, CAUGHT[control.caught_by]), (control.twin, ("active",))):
            found = _after_each_step(build, control, instrument)
            for check in found:
                assert _agrees(check, control, statuses, instrument), check
            last = found[-1]
            if last.status not in statuses:
                unanswered.append(last)
            elif build is control.sabotage:
                assert all(word in last.reason for word in control.words), last
    finally:
        compilations.forget()
    known = UNANSWERED.get((control.name, instrument))
    assert bool(unanswered) == (known is not None), unanswered
    assert all(known in check.reason for check in unanswered), unanswered


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("control", "instrument"), SOME, ids=_ids(SOME))
def test_one_control_of_each_path_agrees(control, instrument):
    """After one watched step, and after as many as it takes."""
    _try(control, instrument)


@pytest.mark.selftest
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("control", "instrument"), REST, ids=_ids(REST))
def test_every_other_control_agrees(control, instrument):
    """The rest of them."""
    _try(control, instrument)


@pytest.mark.selftest
def test_how_many_agree_is_said(capsys):
    """For whoever reads what this has printed."""
    pairs = {(control.name, name) for control, name in (*SOME, *REST)}
    assert pairs >= UNANSWERED.keys()
    with capsys.disabled():
        print(f"\n{len(HERE)} controls, {len(pairs)} with their instruments; {len(UNANSWERED)} of these stay unknown:")
        print("\n".join(f"  {name}, {instrument}: {why}" for (name, instrument), why in UNANSWERED.items()))


def test_every_control_is_tried():
    """By each instrument that can see it."""
    assert len(SOME) + len(REST) == sum(len(control.instruments) for control in HERE)
    assert set(INSTRUMENTS) == {name for _, name in SOME}
