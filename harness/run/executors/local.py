"""Trials on this machine, in one interpreter: the zygote is started once, each launch is a fork of it.

The interpreter is the present one, or that of a `Host`: then two executors side by side are the two sides of an A/B.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.errors import InvalidRunError, UsageError
from harness.machine.processes import kill_group
from harness.records import codec
from harness.records.record import SCHEMA, Failure, Fragment
from harness.run.executors import Worker, WorkerLostError
from harness.run.executors.channel import Channel
from harness.run.executors.host import Host
from harness.studies.request import TrialRequest
from harness.studies.workload import Workload

START_TIMEOUT_S = 180.0
"""Importing takes 3 to 5 s on a quiet machine; a cold disk and a busy one can make it a minute."""


TOKENS_TIMEOUT_S = 3600.0
"""A data set is downloaded in this time or not at all."""


def worker_environment(threads: int, host: Host | None = None) -> dict[str, str]:
    """The environment of every measuring process of a host.

    One BLAS thread in the zygote keeps forking safe; one OpenMP thread on a CPU because two collapse under
    contention; no tokenizer threads; CUDA counted through NVML, which does not initialise the device.
    """
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "KINETO_LOG_LEVEL": "99",
        "TEARDOWN_CUPTI": "1",  # else the profiler of the check goes on slowing down the launches that are timed later
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    return (host or Host()).variables(os.environ) | fixed


_OLD_DOOR = "invalid literal for int() with base 10: 'zygote'"
"""What the door of a harness before schema 5 says, whose only process was the zygote."""


class LocalExecutor:
    """Implements `Executor` with one zygote. Raises `InvalidRunError` when the zygote cannot be started.

    `label` names the side of an A/B, in the messages and in the names of the logs (`zygote-base.log`), so that two
    executors can share a folder.
    """

    def __init__(self, *, threads: int, log_dir: Path, host: Host | None = None, label: str = "") -> None:
        self._threads = threads
        self._host = host or Host()
        self._whose = f"the worker of {label!r}" if label else "the worker"
        suffix = f"-{label}" if label else ""
        self._zygote_log = log_dir / f"zygote{suffix}.log"
        self._tokens_log = log_dir / f"tokens{suffix}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Channel | None = None

    def start(self) -> None:
        """Start the zygote, which begins to import."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, self._zygote_log.open("ab") as log:
            self._process = subprocess.Popen(
                self._host.command("harness.worker", "zygote", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=worker_environment(self._threads, self._host),
                cwd=self._host.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._control = Channel(ours)

    def hello(self) -> dict[str, Any]:
        """Wait until the zygote has imported. Raises `InvalidRunError`, also when it speaks another schema."""
        hello = self._required_control().receive(START_TIMEOUT_S)
        if hello is None:
            self.close()
            last = self._zygote_log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
            if _OLD_DOOR in last[0]:
                raise InvalidRunError(self._refusal("a schema before 5", "unknown"))
            raise InvalidRunError(
                f"{self._whose} did not start: {last[0]}. Its log is {self._zygote_log}. "
                f"Check that torch, transformers, peft and bitsandbytes import in {self._host.python}."
            )
        if hello.get("schema") != SCHEMA:
            raise InvalidRunError(self._refusal(f"schema {hello.get('schema')}", hello.get("harness", "unknown")))
        return hello

    def _refusal(self, schema: str, harness: str) -> str:
        return (
            f"{self._whose} speaks {schema}, this program {SCHEMA} (its harness: {harness}). Choose a revision or an "
            f"environment whose harness speaks schema {SCHEMA}, or run the A/B with the lorameter of that revision; "
            "two revisions of lorameter that lie on either side of a schema cannot be measured beside each other."
        )

    def launch(self) -> Worker:
        """Fork a worker from the zygote."""
        control = self._required_control()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        begin = time.monotonic()
        with theirs:
            control.send({"do": "fork"}, theirs)
        answer = control.receive(START_TIMEOUT_S)
        if answer is None or "pid" not in answer:
            ours.close()
            message = (answer or {}).get("error", f"the zygote is gone; its log is {self._zygote_log.name}")
            raise WorkerLostError("crashed", Failure(phase="start", kind="CannotFork", message=message))
        worker = LocalWorker(int(answer["pid"]), Channel(ours), control)
        hello = worker.channel.receive(START_TIMEOUT_S)
        if hello is None:
            raise worker.lost("start", START_TIMEOUT_S)
        worker.start_latency_s = float(hello["started_monotonic_s"]) - begin
        return worker

    def cold_start(self, request: TrialRequest) -> Fragment:
        """A new interpreter that loads the saved adapter; its output goes to the trial's log."""
        read, write = os.pipe()
        with open(read, encoding="utf-8") as reply, Path(request.log_path).open("ab") as log:  # noqa: PTH123
            begin = time.monotonic()
            process = subprocess.Popen(
                self._host.command("harness.worker", "cold", str(write)),
                pass_fds=[write],
                env=worker_environment(self._threads, self._host),
                cwd=self._host.cwd,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            os.close(write)
            message = json.dumps({"request": codec.to_json(request), "spawned_monotonic_s": begin})
            timeout = request.protocol.step_timeout_s
            try:
                process.communicate(message.encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise WorkerLostError("timeout", _silent("cold", timeout)) from None
            except BaseException:
                process.kill()
                process.wait()
                raise
            text = reply.read()
        if process.returncode != 0 or not text:
            lines = Path(request.log_path).read_text(errors="replace").strip().splitlines()[-1:]
            message = f"the cold interpreter ended with {_describe(process.returncode)}: {' '.join(lines)}"
            raise WorkerLostError("crashed", Failure(phase="cold", kind="ColdStartFailed", message=message))
        return codec.from_json(Fragment, json.loads(text), "cold start")

    def prepare_tokens(self, workload: Workload, folder: str) -> dict[str, Any]:
        """Tokenise in a process of its own."""
        request = json.dumps({"workload": codec.to_json(workload), "folder": str(Path(folder).resolve())})
        log_path = self._tokens_log
        try:
            with log_path.open("ab") as log:
                done = subprocess.run(
                    self._host.command("harness.worker", "tokens"),
                    input=request.encode(),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=worker_environment(1, self._host),
                    cwd=self._host.cwd,
                    check=False,
                    timeout=TOKENS_TIMEOUT_S,
                )
        except subprocess.TimeoutExpired:
            raise InvalidRunError(f"the tokens took over {TOKENS_TIMEOUT_S:g} s; the log is {log_path}.") from None
        lines = done.stdout.decode().strip().splitlines()
        if done.returncode != 0 or not lines:
            last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
            raise InvalidRunError(f"the tokens could not be prepared: {' '.join(last)}. The log is {log_path}.")
        answer: dict[str, Any] = json.loads(lines[-1])
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer

    def close(self) -> None:
        """End the zygote; its children die with it."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _required_control(self) -> Channel:
        if self._control is None:
            raise InvalidRunError("the worker is not started. Call start() first.")
        return self._control


class LocalWorker:
    """A forked process; implements `Worker`."""

    def __init__(self, pid: int, channel: Channel, control: Channel) -> None:
        self.pid = pid
        self.channel = channel
        self.start_latency_s = float("nan")
        self._control = control
        self._reaped = False

    def ask(self, command: str, trial: str, timeout_s: float, **arguments: Any) -> Fragment:
        """Send a command and block until its answer, the process's death, or `timeout_s`."""
        self.channel.send({"do": command, "trial": trial, **arguments})
        answer = self.channel.receive(timeout_s)
        if answer is None:
            raise self.lost(command, timeout_s)
        return codec.from_json(Fragment, answer, f"answer to {command}")

    def lost(self, phase: str, timeout_s: float) -> WorkerLostError:
        """What became of a process that did not answer: killed for silence, or dead by itself."""
        silent = not self.channel.closed_by_peer
        code = self._reap()
        if silent:
            return WorkerLostError("timeout", _silent(phase, timeout_s))
        message = f"the trial's process ended with {_describe(code)} during {phase}"
        if code == -signal.SIGKILL:
            message += ": killed from outside, or by the kernel for want of memory (see dmesg)"
        return WorkerLostError("crashed", Failure(phase=phase, kind="ProcessDied", message=message))

    def close(self) -> None:
        """Close the connection, which ends the child's loop, and reap it."""
        self.channel.close()
        self._reap(grace_s=10.0)

    def _reap(self, grace_s: float = 0.0) -> int | None:
        if self._reaped:
            return None
        self._reaped = True
        deadline = time.monotonic() + grace_s
        while grace_s and time.monotonic() < deadline and _runs(self.pid):
            time.sleep(0.01)
        kill_group(self.pid)
        self._control.send({"do": "reap", "pid": self.pid})
        answer = self._control.receive(START_TIMEOUT_S)
        return None if answer is None else answer.get("status")


def _runs(pid: int) -> bool:
    """Whether a process still runs (a zombie that waits to be reaped does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _silent(phase: str, timeout_s: float) -> Failure:
    message = f"no answer within {timeout_s:g} s during {phase}; it was killed. Raise step_timeout_s if it was at work"
    return Failure(phase=phase, kind="Silent", message=message)


def _describe(code: int | None) -> str:
    if code is None:
        return "an unknown status"
    if code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"
