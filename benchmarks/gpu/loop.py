"""Runs the steps of a campaign in order, each in its own process, as long as they fit into the time of the call.

At its limit a process gets SIGINT, upon which a run saves its trials and pytest writes its results; a process that
ignores it is killed with its children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.steps import Step

GRACE_S = 25.0
"""The time that an interrupted process has to save its results and exit."""
REPORT_S = 20.0
"""The time of a call that is reserved for judging and writing."""
MAX_ATTEMPTS = 2
"""Maximum attempts at a step that reached its time limit and cannot be resumed."""
MAX_CHARACTERS = 300


def attempts_s(step: Step, journal: Journal) -> float:
    """Return the seconds that all attempts at a step have taken."""
    return sum(entry.took_s for entry in journal.attempts(step.name))


def is_pending(step: Step, journal: Journal) -> bool:
    """Return whether a step must still be started or resumed: it has not failed and has time left."""
    last = journal.last(step.name)
    if last is None or last.outcome != "stopped":
        return last is None
    if step.resume_command:
        return step.total_s - attempts_s(step, journal) >= step.min_start_s
    return len(journal.attempts(step.name)) < MAX_ATTEMPTS


def run_steps(
    steps: Sequence[Step],
    journal: Journal,
    *,
    left_s: Callable[[], float],
    run: Callable[[Step, float], Entry],
) -> None:
    """Run each pending step that fits into the remaining time of the call, and add it to the journal.

    Args:
        steps: the steps, in order.
        journal: the journal of the campaign.
        left_s: returns the remaining seconds of the call.
        run: runs one step within the given seconds.
    """
    for step in steps:
        if not is_pending(step, journal) or step.min_start_s + GRACE_S > left_s():
            continue
        limit_s = min(step.limit_s, left_s() - GRACE_S)
        if step.resume_command:
            limit_s = min(limit_s, step.total_s - attempts_s(step, journal))
        print(f"{step.name}: {step.question} (at most {limit_s:.0f} s)", file=sys.stderr, flush=True)
        entry = run(step, limit_s)
        journal.add(entry)
        reason = f": {entry.last_line}" if entry.outcome in ("failed", "stopped") and entry.last_line else ""
        print(f"  {entry.outcome} after {entry.took_s:.0f} s{reason}", file=sys.stderr, flush=True)


def run_process(
    words: Sequence[str], *, limit_s: float, outputs: Path, name: str, folder: Path, variables: Mapping[str, str]
) -> tuple[int | None, str]:
    """Run a command to its end or to its limit; its output goes to NAME.out and NAME.err in `outputs`.

    Returns:
        The exit code, or None if the process reached the limit; and the last line of its standard error, or of its
        standard output if standard error is empty.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    written = [outputs / f"{name}.{stream}" for stream in ("out", "err")]
    with written[0].open("wb") as out, written[1].open("wb") as err:
        process = subprocess.Popen(
            words, cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit_s)
        finally:
            if code is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output, errors = (path.read_text(encoding="utf-8", errors="replace").strip() for path in written)
    lines = (errors or output).splitlines() or [""]
    return code, lines[-1].strip()[:MAX_CHARACTERS]
