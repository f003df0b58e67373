"""A script that is talked to: it takes the steps that it is let take, and how it ended is told where it does not.

Whatever becomes of a script is an `EndedError` with a status, a kind and a message that names the cause as far as it
can be known from here: what its training said, its exit code, and the last line that it printed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lorameter.attach.observer import StepReading
from lorameter.errors import redact
from lorameter.machine.processes import exit_words
from lorameter.records.os_errors import says_out_of_memory
from lorameter.records.record import Status
from lorameter.records.units import format_count
from lorameter.run.executors.script_messages import Begun, Kind, TrainingEnded, Word, read_word
from lorameter.run.executors.script_process import END_TIMEOUT_S, ScriptProcess

STOP_TIMEOUT_S = 60.0
"""A training that was told to take no further step ends in this time, or is ended by force, which is said."""
MOST_SAID = 8000
"""Characters of what a script printed before it died that its record keeps; the log has all."""


class EndedError(Exception):
    """A script's trial is over before it had taken its steps."""

    def __init__(self, status: Status, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(redact(message))
        self.status: Status = status
        self.kind, self.message, self.traceback = kind, redact(message), redact(traceback)
        self.partial: list[StepReading] = []
        """Steps that it had taken of those that were asked."""


class Script:
    """A script's process under way. Its methods raise `EndedError`, `GarbledError` for what is no message, and
    `UsageError` for one that cannot be meant."""

    def __init__(self, process: ScriptProcess, log: Path, log_begin: int) -> None:
        """`log_begin` is how long the log was before this process."""
        self.process = process
        self.steps = 0
        """Taken so far."""
        self._log, self._log_begin = log, log_begin

    def begin(self, timeout_s: float) -> Begun:
        """Wait until it stands before its first step."""
        message = self.process.first_word(timeout_s)
        if message is None:
            raise self._never_began(timeout_s)
        word = read_word(message, "begin", "fault")
        if word.begin is None:
            raise _two_trainings(word)
        return word.begin

    def take(self, steps: int, timeout_s: float, *, watch: dict[str, Any] | None = None) -> list[StepReading]:
        """Let it take steps; what they showed. With `watch` the first of them is watched for these requirements."""
        self.process.tell({"do": "go", "steps": steps, **({} if watch is None else {"watch": watch})})
        word = self._hear(timeout_s, "steps", "end", "fault", steps=steps)
        read = list(word.steps or ())
        self.steps += len(read)
        if word.fault is not None:
            raise _two_trainings(word)
        if word.end is not None:
            ended = self._ended(word.end)
            ended.partial = read
            raise ended
        return read

    def peaks(self, timeout_s: float) -> dict[str, int]:
        """Bytes since its first step, by their names in a record."""
        self.process.tell({"do": "peaks"})
        return self._hear(timeout_s, "peaks").peaks or {}

    def stop(self) -> str:
        """Have it take no further step, and wait until its training has ended; why it had to be killed, or ""."""
        self.process.tell({"do": "end"})
        try:
            word = self._hear(STOP_TIMEOUT_S, "end", "fault")
        except EndedError as ended:
            return f"its training had not ended after {STOP_TIMEOUT_S:g} s" if ended.status == "timeout" else ""
        if word.end is not None and word.end.error:
            return redact(f"{word.end.error}: {word.end.message}")
        return redact(word.fault or "")

    def said(self) -> str:
        """What it has printed, its end."""
        with contextlib.suppress(OSError):
            printed = self._log.read_bytes()[self._log_begin :].decode(errors="replace")
            return redact(printed).strip()[-MOST_SAID:]
        return ""

    def _hear(self, timeout_s: float, *due: Kind, steps: int = 0) -> Word:
        message = self.process.hear(timeout_s)
        if message is None:
            raise self._died() if self.process.closed else self._silent(timeout_s)
        return read_word(message, *due, steps=steps)

    def _ended(self, told: TrainingEnded) -> EndedError:
        """Its training has ended although steps were asked of it."""
        if told.error is None:
            return EndedError(
                "invalid",
                "EndedEarly",
                f"the script's first training ended by itself after {format_count(self.steps, 'step')}, and more are "
                "measured. Have it train longer (it is stopped when it has taken them), or ask for fewer turns in "
                "[protocol].",
            )
        message = f"{told.error} in step {self.steps + 1}: {told.message}"
        return EndedError(_status_of(f"{told.error}: {told.message}"), told.error, message, told.traceback)

    def _never_began(self, timeout_s: float) -> EndedError:
        if self.process.closed:
            return self._died()
        code = self.process.ended()
        said = self.said()
        if not self.process.hooked and code in (None, 0):
            return EndedError(
                "invalid",
                "NotHooked",
                "no Python of the command has loaded the hook, so nothing of its training could be seen. It must start "
                "a Python that reads PYTHONPATH (not -I, -E or -S, and not in a container of its own).",
                said,
            )
        if self.process.lacking:
            return EndedError("invalid", "Lacking", f"nothing can be measured: {self.process.lacking}", said)
        if code is None:
            message = f"the script came to no training within {timeout_s:g} s and was killed: it hangs, or loads longer"
            return EndedError("timeout", "Silent", f"{message}. Raise step_timeout_s if it was at work", said)
        if code == 0:
            return EndedError(
                "invalid",
                "NeverTrained",
                "the script ended with exit code 0 and trained nothing: no Trainer was run, no loop was named, and no "
                "optimizer took a step. Name the command that trains.",
                said,
            )
        last = _last_line(said)
        status = _status_of(last)
        return EndedError(status, "Crashed", f"the script ended with {exit_words(code)} before it trained{last}", said)

    def _died(self) -> EndedError:
        code = self.process.ended(END_TIMEOUT_S)
        said = self.said()
        last = _last_line(said)
        message = f"the script's process is gone ({exit_words(code)}) after {format_count(self.steps, 'step')}{last}"
        if code == -9:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return EndedError(_status_of(last), "ProcessDied", message, said)

    def _silent(self, waited_s: float) -> EndedError:
        message = (
            f"the script took no step within {waited_s:g} s after {self.steps}, and was killed. Raise step_timeout_s if"
            " it was at work"
        )
        return EndedError("timeout", "Silent", message, self.said())


def _two_trainings(word: Word) -> EndedError:
    return EndedError("invalid", "TwoTrainings", f"{word.fault}. Measure a script that trains once")


def _last_line(said: str) -> str:
    lines = said.splitlines()
    return f": {lines[-1]}" if lines else ": it printed nothing"


def _status_of(said: str) -> Status:
    return "oom" if says_out_of_memory(said) else "crashed"
