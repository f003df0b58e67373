"""A script that is talked to: it takes the steps that it is let take, and how it ended is told where it does not.

Whatever becomes of a script is an `EndedError` with a status, a kind and a message that names the cause as far as it
can be known from here: what its training said, its exit code, and the last line that it printed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.attach.follower import StepReading
from harness.errors import redact
from harness.machine.processes import exit_words
from harness.records import codec
from harness.records.record import Status
from harness.records.refusals import says_out_of_memory
from harness.run.executors.script_process import END_TIMEOUT_S, ScriptProcess

STOP_TIMEOUT_S = 60.0
"""A training that was told to take no further step ends in this time, or is ended by force, which is said."""
MOST_SAID = 8000
"""Characters of what a script printed before it died that its record keeps; the log has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a script says of its training when it stands before its first step."""

    pid: int
    source: str
    planned_steps: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    trainable_dtypes: dict[str, int] = field(default_factory=dict)
    """Number of trainable parameters by their type."""
    accumulation: int | None = None
    required: dict[str, Any] = field(default_factory=dict)
    """What the script itself says that a step must have."""
    ranks: int = 1
    threads: int | None = None
    cuda: bool = False
    """Whether it computes on a card."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peaks until then, by their names in a record."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions of its packages, and of its `python` and `cuda`."""


class EndedError(Exception):
    """A script's trial is over before it had taken its steps."""

    def __init__(self, status: Status, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(redact(message))
        self.status: Status = status
        self.kind, self.message, self.traceback = kind, redact(message), redact(traceback)
        self.partial: list[StepReading] = []
        """Steps that it had taken of those that were asked."""


class Script:
    """A script's process under way. Its methods raise `EndedError`, and `GarbledError` for what is no message."""

    def __init__(self, process: ScriptProcess, log: Path, log_begin: int) -> None:
        """`log_begin` is how long the log was before this process."""
        self.process = process
        self.steps = 0
        """Taken so far."""
        self._log, self._log_begin = log, log_begin

    def begin(self, timeout_s: float) -> Begun:
        """Wait until it stands before its first step."""
        word = self.process.first_word(timeout_s)
        if word is None:
            raise self._never_began(timeout_s)
        return codec.from_json(Begun, word.get("begin"), "the script's first word")

    def take(self, steps: int, timeout_s: float, *, watch: dict[str, Any] | None = None) -> list[StepReading]:
        """Let it take steps; what they showed. With `watch` the first of them is watched for these requirements."""
        self.process.tell({"do": "go", "steps": steps, **({} if watch is None else {"watch": watch})})
        answer = self._hear(timeout_s)
        read = [codec.from_json(StepReading, one, "a step of the script") for one in answer.get("steps", ())]
        self.steps += len(read)
        if "fault" in answer:
            raise EndedError("invalid", "TwoTrainings", f"{answer['fault']}. Measure a script that trains once")
        if "end" in answer:
            ended = self._ended(answer["end"], steps)
            ended.partial = read
            raise ended
        return read

    def peaks(self, timeout_s: float) -> dict[str, int]:
        """Bytes since its first step, by their names in a record."""
        self.process.tell({"do": "peaks"})
        return codec.from_json(dict[str, int], self._hear(timeout_s).get("peaks"), "peaks of the script")

    def stop(self) -> str:
        """Have it take no further step, and wait until its training has ended; why it had to be killed, or ""."""
        self.process.tell({"do": "end"})
        try:
            answer = self._hear(STOP_TIMEOUT_S)
        except EndedError as ended:
            return f"its training had not ended after {STOP_TIMEOUT_S:g} s" if ended.status == "timeout" else ""
        told = answer.get("end") or {}
        if told.get("error"):
            return redact(f"{told['error']}: {told.get('message', '')}")
        return redact(str(answer.get("fault", "")))

    def said(self) -> str:
        """What it has printed, its end."""
        with contextlib.suppress(OSError):
            return self._log.read_bytes()[self._log_begin :].decode(errors="replace").strip()[-MOST_SAID:]
        return ""

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        answer = self.process.hear(timeout_s)
        if answer is None:
            raise self._died() if self.process.closed else self._silent(timeout_s)
        return answer

    def _ended(self, told: dict[str, Any], asked: int) -> EndedError:
        """Its training has ended although steps were asked of it."""
        error = told.get("error")
        if error is None:
            return EndedError(
                "invalid",
                "EndedEarly",
                f"the script's first training ended by itself after {self.steps} steps, and more are measured. Have it "
                "train longer (it is stopped when it has taken them), or ask for fewer turns in [protocol].",
            )
        message = f"{error} in step {self.steps + 1}: {told.get('message', '')}"
        said = f"{error}: {told.get('message', '')}"
        return EndedError(_status_of(said), str(error), message, str(told.get("traceback", "")))

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
        message = f"the script's process is gone ({exit_words(code)}) after {self.steps} steps{last}"
        if code == -9:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return EndedError(_status_of(last), "ProcessDied", message, said)

    def _silent(self, waited_s: float) -> EndedError:
        message = (
            f"the script took no step within {waited_s:g} s after {self.steps}, and was killed. Raise step_timeout_s if"
            " it was at work"
        )
        return EndedError("timeout", "Silent", message, self.said())


def _last_line(said: str) -> str:
    lines = said.splitlines()
    return f": {lines[-1]}" if lines else ": it printed nothing"


def _status_of(said: str) -> Status:
    return "oom" if says_out_of_memory(said) else "crashed"
