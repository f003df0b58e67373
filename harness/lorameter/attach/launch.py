"""Runs an unchanged command with the hook in its processes, and completes the command's run after its end.

No user file is changed and nothing is installed. The first folder on PYTHONPATH contains a module that every
interpreter imports at its start (`hook/sitecustomize.py`). Launchers pass the environment on to their processes, so the
hook is in each of them, but it acts only in a process that trains.

The observer in the training process writes the run. If that process is killed or exits without a message, the process
that started it writes how it ended. `lorameter wrap` makes a temporary folder, which is removed when the command has
ended. It contains the command line, a file written by the hook, and the times of the ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lorameter.attach.observer import print_notice
from lorameter.errors import UsageError, redact, shorten
from lorameter.machine.processes import STOP_SIGNALS, exit_words, explain_kill
from lorameter.records import store
from lorameter.records.record import Failure, TrialRecord
from lorameter.records.store import RunWriter
from lorameter.studies.script import hide_credentials

ENV_OBSERVER = "LORAMETER_OBSERVER"
"""Factory of the observer for the first training of the process: `package.module:callable`. The hook repeats the names
of this variable, of `HOOKED` and of `SOCKET`, because it imports nothing before a training."""
DEFAULT_OBSERVER = "lorameter.attach.writer:Writer"
"""The observer that writes a run."""
HOOKED = "LORAMETER_HOOKED"
"""A file that the hook writes when an interpreter has loaded it; it lists the packages that the interpreter lacks."""
RUN = "LORAMETER_RUN"
"""The directory of the run for the command's first training."""
WRAP = "LORAMETER_WRAP"
"""The temporary folder of the program that wraps the command."""
REQUIRE = "LORAMETER_REQUIRE"
"""JSON of the kernels_check paths that a step must have."""
SOCKET = "LORAMETER_TURN_SOCKET"
"""The name of the parent's socket, an abstract one of Linux, since a path might be too long. It is set if the script is
started to be measured, without side effects (`lorameter.attach.disable_side_effects`)."""
HOOK = Path(__file__).with_name("hook")
"""The folder that is put first on the path."""
NOT_HOOKED = (
    "no Python of the command has loaded the hook. It must start a Python that reads PYTHONPATH (not -I, -E or -S, and "
    "not in a separate container)"
)
UNSEEN_END = "ended_unseen"
"""Key in the values of a record: no source observed the end of the training, and its process has ended."""

TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""Signals that a terminal sends to all of its processes, including the command."""
FORWARDED_SIGNALS = (*STOP_SIGNALS, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def child_environment(
    inherited: Mapping[str, str], variables: Mapping[str, str], *, observer: str = DEFAULT_OBSERVER
) -> dict[str, str]:
    """The environment variables of a process whose first training is measured.

    Args:
        inherited: variables that it would have otherwise.
        variables: further variables.
        observer: factory of the observer, as `package.module:callable`; it is called without arguments when the
            training begins.
    """
    path = os.pathsep.join(filter(None, [str(HOOK), inherited.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": path, ENV_OBSERVER: observer, **variables}


def socket_address(name: str) -> str:
    """The address of a Linux abstract socket, which begins with a byte that no variable can contain."""
    return "\0" + name.removeprefix("@")


def read_missing_packages(hooked: Path) -> str:
    """The packages that an interpreter with the hook lacks, as text; empty if none is missing."""
    return hooked.read_text(encoding="utf-8", errors="replace") if hooked.is_file() else ""


def format_command(words: Sequence[str]) -> str:
    """The words as one line, without credentials: values of options or names that look like credentials are omitted.
    Bytes that are not text become question marks."""
    return shlex.join(map(redact, hide_credentials(words))).encode(errors="replace").decode()


def read_command() -> str:
    """The wrapped command, from its file (a variable is limited to 128 KiB); else the command of this process."""
    if folder := os.environ.get(WRAP):
        return os.fsdecode((Path(folder) / "command").read_bytes())
    program, *words = sys.orig_argv or [sys.executable]
    return format_command([PurePath(program).name, *words])


def run_command(words: Sequence[str], path: Path, require: Mapping[str, Any], folder: Path) -> int:
    """Run a command with the hook in it, and wait for its end.

    Args:
        words: program and arguments, started unchanged.
        path: directory of the run for its training; not created here.
        require: kernels_check paths that its watched step must have.
        folder: temporary folder for the processes of the command.

    Returns:
        Its exit code, or 128 plus the number of the signal that ended it.

    Raises:
        UsageError: there is no such program.
    """
    (folder / "command").write_bytes(os.fsencode(format_command(words)))
    variables = {
        RUN: str(path),
        REQUIRE: json.dumps(dict(require)),
        WRAP: str(folder),
        HOOKED: str(folder / "hooked"),
    }
    try:
        process = subprocess.Popen(list(words), env=child_environment(os.environ, variables))
    except OSError as error:
        program = shorten(shlex.quote(words[0]))
        raise UsageError(
            f"wrap: {program}: {error.strerror}. Write the command as it runs without lorameter."
        ) from None
    with forward_signals(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def forward_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward signals to a command while the block runs, except those that a terminal has already sent to it."""

    def forward(number: int, frame: object) -> None:
        if number not in TERMINAL_SIGNALS or not _in_terminal():
            process.send_signal(number)

    handlers = {number: signal.getsignal(number) for number in FORWARDED_SIGNALS}
    before = {number: one for number, one in handlers.items() if one not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_terminal() -> bool:
    """Whether this process is in the foreground of a terminal, which then signals the command itself."""
    with contextlib.suppress(OSError), open("/dev/tty", "rb", buffering=0) as terminal:  # noqa: PTH123 not a user path
        return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    return False


def finalize_run(path: Path, code: int, folder: Path, *, required: bool) -> bool:
    """Write the end of a run that the training process could not write, and report what is missing.

    Args:
        path: directory of the run.
        code: exit code of the command.
        folder: the folder of `run_command`.
        required: whether the command had requirements.

    Returns:
        True if there is no valid trial.
    """
    if not (path / store.MANIFEST).is_file():
        shutil.rmtree(path, ignore_errors=True)
        print_notice(f"nothing was measured: {_explain_missing_run(code, folder)}")
        return True
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        print_notice(f"run {path.name}: a process of the command is still training, and its run continues")
        return required
    run = store.read_run(str(path), path.parent)
    if not run.records:
        return True
    record = _judge_end(run.records[-1], code)
    if manifest.status == "running" or record is not run.records[-1]:
        record = record.replaced(tokens=record.tokens | tokens_in(record.samples))
        RunWriter(path.parent, manifest).finish_with(record)
    print_notice(f"run {path.name} is written")
    return record.status != "ok"


def tokens_in(samples: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """The tokens in a trial's record: real tokens and padding of all timed steps."""
    counts = {"real_tokens": samples.get("turn_tokens", ()), "padded_tokens": samples.get("turn_padded_tokens", ())}
    return {name: int(sum(found)) for name, found in counts.items() if found}


def _explain_missing_run(code: int, folder: Path) -> str:
    hooked = folder / "hooked"
    if not hooked.exists():
        return NOT_HOOKED
    ended = f"the command ended with {exit_words(_exit_status(code))}" if code else "the command has ended"
    return read_missing_packages(hooked) or (
        f"{ended}, and no Trainer and no optimizer of torch had begun to train; an update that torch.compile compiles "
        "is not seen"
    )


def _exit_status(code: int) -> int:
    """The exit status of the command's process; a shell gives a signal as 128 plus its number."""
    return 128 - code if code > 128 and code - 128 in set(signal.Signals) else code


def _judge_end(record: TrialRecord, code: int) -> TrialRecord:
    """The record of a training whose command ended with this code; unchanged if there is nothing to add."""
    maybe_broken_off = record.status == "ok" and code and record.values.get(UNSEEN_END)
    if not record.under_way and not maybe_broken_off:
        return record
    status = _exit_status(code)
    stopped = -status in STOP_SIGNALS
    message = f"the training was not seen to end: the command ended with {exit_words(status)}{explain_kill(status)}"
    return record.replaced(
        status="interrupted" if stopped else "crashed",
        failure=Failure(phase="train", kind="Interrupted" if stopped else "ProcessDied", message=message),
        wall_time_s=max(0.0, time.time() - record.started_unix_s),
    )
