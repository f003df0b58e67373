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
    loaded, packages = hooked.exists(), read_missing_packages(hooked)
    if not (path / store.MANIFEST).is_file():
        shutil.rmtree(path, ignore_errors=True)
        say(f"nothing was measured: {packages}" if packages else _why_nothing(code, loaded))
        return True
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        say(f"run {path.name}: a process of the command is still training; its run goes on")
        return required
    run = store.read_run(str(path), path.parent)
    if not run.records:
        return True
    record = _judge_end(run.records[-1], code)
    if manifest.status == "running" or record is not run.records[-1]:
        writer = RunWriter(path.parent, manifest)
        writer.append(record.replaced(tokens=record.tokens | tokens_in(record.samples)))
        writer.finish("complete" if record.settled else "interrupted")
    return record.status != "ok"


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


def _judge_end(record: TrialRecord, code: int) -> TrialRecord:
    """The record of a training whose command ended with this code; the same where there is nothing to add."""
    ended = f"the command ended with {_exit_words(code)}"
    if record.failure is not None and record.failure.kind == UNDER_WAY:
        stopped = code - 128 in STOPPING
        message = f"{ended} before its training did"
        if code == 128 + signal.SIGKILL:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        failure = Failure(phase="train", kind="Interrupted" if stopped else "ProcessDied", message=message)
        status: Status = "interrupted" if stopped else "crashed"
        return record.replaced(
            status=status, failure=failure, wall_time_s=max(0.0, time.time() - record.started_unix_s)
        )
    if record.status != "ok" or not code:
        return record
    if record.values.get(UNSEEN_END):
        message = f"{ended}, and its training was not seen to end: it may have been broken off"
        return record.replaced(status="crashed", failure=Failure(phase="train", kind="ProcessDied", message=message))
    notice = Notice(
        code="exit-code",
        message=f"{ended} after its training had ended well.",
        remedy="What was measured is whole; look at what the script does afterwards.",
    )
    return record.replaced(notices=(*record.notices, notice))
