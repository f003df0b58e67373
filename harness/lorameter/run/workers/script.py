"""Trials of scripts: each script is started with its command, waits before its first step, and then takes its turns.

A launcher starts processes in new sessions, outside the process group of the first process. Every process of the trial
has the name of the trial's socket in its environment; the executor finds and kills all of them by that name.

There is no zygote: a script does its own imports. It runs with the interpreter of the variant or of a side of an A/B,
or else with the one that the command names in the current environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from lorameter import wire
from lorameter.attach.launch import HOOKED, NOT_HOOKED, SOCKET, read_missing_packages, socket_address
from lorameter.errors import UsageError, redact
from lorameter.machine import provenance
from lorameter.machine.nvml import open_device
from lorameter.machine.processes import (
    OrphanReaper,
    exit_words,
    explain_kill,
    find_marked,
    has_children,
    kill_group,
    kill_marked,
)
from lorameter.machine.telemetry import Telemetry
from lorameter.records import codec
from lorameter.records.os_errors import mentions_out_of_memory
from lorameter.records.record import Failure, Notice, PartialRecord, Status, WorkerInfo
from lorameter.run.workers import MAX_OUTPUT, Executor, Worker, WorkerLostError
from lorameter.run.workers.environment import Host, describe, inspect
from lorameter.run.workers.script_sandbox import (
    resolve_command,
    script_environment,
    shared_notices,
    take_snapshot,
    working_folder,
)
from lorameter.studies.form import AnyVariant
from lorameter.studies.request import Request
from lorameter.studies.variant import ScriptVariant


def has_own_interpreter(host: Host) -> bool:
    """Whether a side names an interpreter or requirements, rather than a revision, which has a folder."""
    return host != Host() and host.cwd is None


UNRELATED = (
    "host_involuntary_switches_train", "device_others_train", "device_others_train_bytes", "device_hidden_train_bytes",
)  # fmt: skip
"""Telemetry of this process, not of the script: its switches, and the processes on the GPU that are not its own."""
POLL_S = 0.05
"""Seconds between two looks at a process that has not connected yet."""
END_TIMEOUT_S = 10.0
"""A process that does not end within this time after its connection has closed is killed."""


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end, from the kernel (unix(7), SO_PEERCRED: pid, uid and gid)."""
    _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


class ScriptProcess:
    """A started script, which connects to a socket when its training begins."""

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], *, folder: Path, log: Path, turns: str
    ) -> None:
        """Start the script in a new session; it ends with this process. Raises OSError if the system cannot start it.

        Args:
            words: words of the command, with the program resolved.
            variables: the environment, including the socket's name.
            folder: the working folder.
            log: the file to which its output is appended.
            turns: name of the socket (`lorameter.attach.launch.socket_address`).
        """
        self._hooked = Path(variables[HOOKED])
        self._marker = f"{SOCKET}={turns}".encode()
        self._log, self._log_begin = log, log.stat().st_size if log.is_file() else 0
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            stack.callback(OrphanReaper(self._marker).close)
            self._listener.bind(socket_address(turns))
            self._listener.listen(8)
            stack.callback(kill_marked, self._marker)  # before the start, which a signal may interrupt at its end
            self.begun_s = time.monotonic()
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    list(words),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=dict(variables),
                    cwd=folder,
                    start_new_session=True,
                )
            stack.callback(self.kill)
            self._started = stack.pop_all()

    def connect(self, timeout_s: float) -> Connection:
        """Wait until its training begins. Raises `WorkerLostError` if the script ends or times out before that."""
        deadline = time.monotonic() + timeout_s
        self._listener.settimeout(POLL_S)
        while time.monotonic() < deadline:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                others = set(find_marked(self._marker)) - {self._process.pid}  # left by a launcher that has ended
                if self._process.poll() is not None and not others:
                    break
                continue
            if _user_of(connection) == os.geteuid():  # an abstract socket has no permissions
                connection.settimeout(None)
                return Connection(connection.detach())
            connection.close()
        raise self._without_training(timeout_s)

    def _without_training(self, timeout_s: float) -> WorkerLostError:
        code, output, lacking = self._process.poll(), self.output(), read_missing_packages(self._hooked)
        crash, last = _judge_output(output)
        causes: tuple[tuple[object, Status, str, str], ...] = (
            (not self._hooked.exists() and not code, "invalid", "NotHooked", NOT_HOOKED),
            (lacking, "invalid", "Lacking", f"nothing can be measured: {lacking}"),
            (code is None, "timeout", "Silent",
             f"the script did not begin to train within {timeout_s:g} s and was killed: it hangs, or loads longer. "
             "Raise step_timeout_s if it still worked"),
            (code == 0, "invalid", "NeverTrained",
             "the script ended with exit code 0 without training: no Trainer ran, no Meter was used, and no optimizer "
             "took a step. Give the command that trains."),
            (True, crash, "Crashed", f"the script ended with {exit_words(code)} before it trained{last}"),
        )  # fmt: skip
        status, kind, message = next(cause[1:] for cause in causes if cause[0])
        return WorkerLostError(status, Failure(phase="build", kind=kind, message=message, traceback=output))

    def wait(self) -> int | None:
        """Wait for the end of its first process; returns its exit code, None if it continues."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_TIMEOUT_S)
        return None

    def output(self) -> str:
        """The end of its output."""
        with contextlib.suppress(OSError):
            printed = self._log.read_bytes()[self._log_begin :].decode(errors="replace")
            return redact(printed).strip()[-MAX_OUTPUT:]
        return ""

    def kill(self) -> None:
        """Kill the script and all processes that it has started."""
        kill_group(self._process.pid)
        kill_marked(self._marker)
        self.wait()

    def close(self) -> None:
        """Kill the script and close its listening socket."""
        self._started.close()


def _judge_output(output: str) -> tuple[Status, str]:
    """The status of a process that died with this output, and its last line."""
    lines = output.splitlines()
    last = f": {lines[-1]}" if lines else ": it printed nothing"
    return "oom" if mentions_out_of_memory(last) else "crashed", last


class ScriptWorker(Worker):
    """The process of one script, started when its trial is prepared; inside it, `ScriptTrial` answers the commands."""

    start_latency_s = 0.0
    """The time to the first step is `ready_time_s` in the record."""

    def __init__(self, start: Callable[[Request], ScriptProcess]) -> None:
        self._start = start
        self._process: ScriptProcess | None = None
        self._request: dict[str, Any] = {}
        self._may_pin = False
        self._telemetry = Telemetry("train")

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> PartialRecord:
        """Carry out a command. Raises `WorkerLostError`."""
        if command == "prepare":
            self._request = arguments["request"]
            try:
                self._process = self._start(codec.from_json(Request, self._request, "trial request"))
            except (OSError, UsageError) as error:
                failure = Failure(
                    phase=command, kind="CannotStart", message=f"the command could not be started: {error}"
                )
                raise WorkerLostError("crashed", failure) from None
            return PartialRecord()
        process = self._process
        assert process is not None  # a trial whose `prepare` fails gets no further commands
        try:
            if command == "build":
                record = self._build(process, trial, timeout_s)
            elif command == "turn":
                record = self._turn(trial, timeout_s, **arguments)
            else:
                record = super().ask(command, trial, timeout_s, **arguments)
        except WorkerLostError:
            self.close()
            raise
        if command == "finish_training" or record.status != "ok":  # the script must not continue after its last step
            process.kill()
        return record

    def _build(self, process: ScriptProcess, trial: str, timeout_s: float) -> PartialRecord:
        self.connection = process.connect(timeout_s)
        with self.handle_loss("build", timeout_s):
            hello = wire.receive(self.connection, wire.Hello, timeout_s)
            wire.check_schema(hello, "the script's lorameter")
        ready = {"ready_time_s": time.monotonic() - process.begun_s}
        self.pid = hello.pid
        super().ask("prepare", trial, timeout_s, request=self._request)
        record = super().ask("build", trial, timeout_s)
        if hello.device == "cuda":
            self._telemetry = Telemetry("train", open_device)
        alone = record.values.get("threads") == record.values.get("ranks") == 1.0
        self._may_pin = alone and hello.device == "cpu" and not has_children(hello.pid)
        return msgspec.structs.replace(record, values=record.values | ready)

    def _turn(self, trial: str, timeout_s: float, steps: int) -> PartialRecord:
        """Timed steps, and the state of the machine during them. Per-process counters would describe this process, and
        the other processes on the GPU are other scripts, so neither is kept."""
        self._telemetry.begin()
        record = super().ask("turn", trial, timeout_s, steps=steps)
        values = self._telemetry.end()
        for name in UNRELATED:
            values.pop(name, None)
        return msgspec.structs.replace(record, values=record.values | values)

    def death_error(self, phase: str) -> WorkerLostError:
        """The error for a script that ended after its training had begun."""
        assert self._process is not None
        code = self._process.wait()
        output = self._process.output()
        status, last = _judge_output(output)
        message = f"the script's process is gone ({exit_words(code)}) during {phase}{last}{explain_kill(code)}"
        return WorkerLostError(status, Failure(phase=phase, kind="ProcessDied", message=message, traceback=output))

    def close(self) -> None:
        """End all processes that were started."""
        if self._process is not None:
            self._process.close()
        if self.pid:
            self.connection.close()

    def cpus(self) -> tuple[int, ...]:
        """The CPUs that the training may use; empty if it uses several threads, ranks or processes, which would compete
        for a single CPU."""
        return super().cpus() if self._may_pin else ()


class ScriptExecutor(Executor):
    """Implements `Executor`, except for tokens, bases and cold starts, which plans of scripts do not have."""

    def __init__(self, *, host: Host | None = None, label: str = "") -> None:
        """`label` is not used: no file of a script has its side in the name."""
        self._side = host or Host()
        self._snapshots: dict[Path, Path] = {}
        self._private_folders: dict[str, Path] = {}
        """The private folder of each trial's process."""

    def hello(self) -> WorkerInfo:
        """The facts that are known without a worker; a script reports its device when its training begins."""
        own = self.host == Host()
        torch = provenance.library_version("torch") if own else describe(self.host)["libraries"].get("torch")
        return WorkerInfo(
            harness=provenance.harness_identity(),
            import_time_s=0.0,
            device=self.machine().device,
            torch=torch or "unknown",
        )

    def check_variants(self, variants: Iterable[AnyVariant]) -> tuple[Notice, ...]:
        """Notices about files that the processes of a script share. Raises `UsageError` for a missing file."""
        return tuple(
            notice
            for variant in variants
            if isinstance(variant, ScriptVariant)
            for notice in shared_notices(variant, Path.cwd())
        )

    def clear_place(self, trial: str) -> None:
        """Remove the folder of the script as well."""
        super().clear_place(trial)
        if (private := self._private_folders.pop(trial, None)) is not None:
            shutil.rmtree(private, ignore_errors=True)

    def launch(self) -> Worker:
        """Create a worker; it starts its process when its trial is prepared."""
        return ScriptWorker(self._start_trial)

    @functools.cached_property
    def host(self) -> Host:  # type: ignore[override]
        """The host of the side, with the interpreter that the word `python` stands for: the side's, else the one on
        PATH, as in a shell; the current interpreter if that one has no torch."""
        program = shutil.which("python") or shutil.which("python3") or sys.executable
        here = Path(program).absolute() == Path(sys.executable).absolute()  # may be links to one file
        if here or has_own_interpreter(self._side):
            return self._side
        with contextlib.suppress(UsageError):  # the interpreter cannot be run
            if inspect(Host(python=program), ["torch"]).origins["torch"]:
                return dataclasses.replace(self._side, python=program)
        return self._side

    def _start_trial(self, request: Request) -> ScriptProcess:
        variant, host = request.variant, self.host
        assert isinstance(variant, ScriptVariant)
        # Random and of fixed length: the size of the environment shifts the stack and changes times, and trial names
        # would do so for one side in every replicate (Mytkowicz et al., ASPLOS 2009).
        private = self._private_folders[request.trial] = self.scratch / secrets.token_hex(4)
        origin = working_folder(variant, Path(host.cwd or Path.cwd()))
        if origin not in self._snapshots:
            self._snapshots[origin] = take_snapshot(origin, self.scratch / f"snapshot-{len(self._snapshots)}")
        folder = Path(shutil.copytree(self._snapshots[origin], private / "work", symlinks=True))
        turns = f"@lorameter-{secrets.token_hex(8)}"
        side = host.python if has_own_interpreter(self._side) else ""
        # That variable keeps the current folder off the path while an interpreter is inspected. A script has its own
        # folder first on its path, as when a user starts it.
        environment = {name: value for name, value in host.environment.items() if name != "PYTHONSAFEPATH"}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        variables = script_environment(
            variant,
            dataclasses.replace(host, environment=environment).variables(os.environ),
            scratch=private,
            threads=self.threads,
            port=port,
            socket=turns,
            side=side,
        )
        words = resolve_command(variant, host.python, variables, folder, origin=origin, side=side)
        return ScriptProcess(words, variables, folder=folder, log=Path(request.log_path), turns=turns)
