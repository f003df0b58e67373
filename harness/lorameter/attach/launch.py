"""A command that is run as it is while the training in it is followed, seen from outside of it.

The follower in the training process writes the run. What it cannot write is how that process ended where it was killed
or left without a message; the process that started it sees that, and writes it then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorameter.attach.environment import REQUIRE, RUN, WRAP, child_environment, read_missing_packages, write_command
from lorameter.attach.observer import say
from lorameter.attach.samples import UNSEEN_END, tokens_in
from lorameter.errors import UsageError, shorten
from lorameter.machine.processes import exit_words
from lorameter.records import store
from lorameter.records.record import UNDER_WAY, Failure, Notice, Status, TrialRecord
from lorameter.records.store import RunWriter

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program."""
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""Those that a terminal sends to all of its processes, so that the command has them already."""
PASSED_ON = (*STOPPING, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
HOOKED_FILE = "hooked"


def run_command(words: Sequence[str], path: Path, require: Mapping[str, Any], folder: Path) -> int:
    """Run a command with the hook in it, and wait for its end.

    Args:
        words: program and arguments; they are started as they are.
        path: of the run that its training is written to; not made here.
        require: paths of kernels_check that its watched step must have.
        folder: a temporary one for the processes of the command.

    Returns:
        Its exit code; 128 and the number of the signal that ended it.

    Raises:
        UsageError: there is no such program.
    """
    (folder / "command").write_bytes(os.fsencode(write_command(words)))
    variables = {RUN: str(path), REQUIRE: json.dumps(dict(require)), WRAP: str(folder)}
    environment = child_environment(os.environ, hooked=folder / HOOKED_FILE, variables=variables)
    with _passing_on() as pass_on_to:  # also what comes before the command is there: it would end this process alone
        try:
            process = subprocess.Popen(list(words), env=environment)
        except OSError as error:
            program = shorten(shlex.quote(words[0]))
            raise UsageError(
                f"wrap: {program}: {error.strerror}. Write the command as it runs without lorameter."
            ) from None
        pass_on_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_on() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Meanwhile signals to this process are the command's, as soon as its process is known; what has come
    until then is sent to it then, also by a terminal, which knew of no command yet."""
    command: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            command[0].send_signal(number)

    def pass_on(number: int, frame: object) -> None:
        if not command:
            came.append(number)
        elif number not in FROM_TERMINAL or not _in_terminal():
            send(number)

    def begin(process: subprocess.Popen[bytes]) -> None:
        command.append(process)
        for number in came:
            send(number)

    before = {number: signal.getsignal(number) for number in PASSED_ON}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield begin
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _in_terminal() -> bool:
    """Whether this process is in the foreground of a terminal, which then tells the command by itself."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def finalize_run(path: Path, code: int, folder: Path, *, required: bool) -> bool:
    """Write what the training process could not, and say what there is to say.

    Args:
        path: of the run.
        code: how the command ended.
        folder: that of `run_command`.
        required: whether something was required of it.

    Returns:
        Whether there is no valid trial.
    """
    hooked = folder / HOOKED_FILE
    loaded, lacking = hooked.exists(), read_missing_packages(hooked)
    if not (path / store.MANIFEST).is_file():
        shutil.rmtree(path, ignore_errors=True)
        say(f"nothing was measured: {lacking}" if lacking else _why_nothing(code, loaded))
        return True
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        say(f"run {path.name}: a process of the command is still training; its run goes on")
        return required
    run = store.read_run(str(path), path.parent)
    (record,) = run.records[-1:] or (None,)
    if record is not None and manifest.status == "running":
        record = _ended(record, code)
        record = record.replaced(tokens=record.tokens | tokens_in(record.samples))
        writer = RunWriter(path.parent, manifest)
        writer.append(record)
        writer.finish("complete" if record.settled else "interrupted")
    elif record is not None and record.status == "ok" and code:
        if record.values.get(UNSEEN_END):
            record = msgspec.structs.replace(record, status="crashed", failure=_unseen_end(code))
        else:
            record = record.replaced(notices=(*record.notices, _exit_notice(code)))
        writer = RunWriter(path.parent, manifest)
        writer.append(record)
        writer.finish(manifest.status)
    return record is None or record.status != "ok"


def _why_nothing(code: int, loaded: bool) -> str:
    if not loaded:
        return (
            "nothing was measured: no Python of the command has loaded the hook. It must start a Python that reads "
            "PYTHONPATH (not -I, -E or -S, and not in a container of its own)"
        )
    said = "no Trainer and no optimizer of torch had begun to train; an update that torch.compile compiles is not seen"
    if code:
        return f"nothing was measured: the command ended with {_exit_words(code)}, and {said}"
    return f"nothing was measured: the command has ended, and {said}"


def _exit_words(code: int) -> str:
    return exit_words(128 - code) if code > 128 and code - 128 in set(signal.Signals) else exit_words(code)


def _ended(record: TrialRecord, code: int) -> TrialRecord:
    """The record of a training whose process ended without a word."""
    if record.failure is not None and record.failure.kind != UNDER_WAY:
        return record
    stopped = code - 128 in STOPPING
    message = f"the command ended with {_exit_words(code)} before its training did"
    if code == 128 + signal.SIGKILL:
        message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
    status: Status = "interrupted" if stopped else "crashed"
    failure = Failure(phase="train", kind="Interrupted" if stopped else "ProcessDied", message=message)
    return msgspec.structs.replace(
        record, status=status, failure=failure, wall_time_s=max(0.0, time.time() - record.started_unix_s)
    )


def _unseen_end(code: int) -> Failure:
    message = (
        f"the command ended with {_exit_words(code)}, and its training was not seen to end: it may have been broken off"
    )
    return Failure(phase="train", kind="ProcessDied", message=message)


def _exit_notice(code: int) -> Notice:
    return Notice(
        code="exit-code",
        message=f"the command ended with {_exit_words(code)} after its training had ended well.",
        remedy="What was measured is whole; look at what the script does afterwards.",
    )
