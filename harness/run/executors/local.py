"""Trials on this machine, in one interpreter: the zygote is started once, each launch is a fork of it.

The interpreter is the present one, or that of a `Host`: then two executors side by side are the two sides of an A/B.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from harness.errors import InvalidRunError, UsageError
from harness.machine import provenance
from harness.machine.provenance import Facts, Machine
from harness.records import codec
from harness.records.preparation import Hello, TokenSummary
from harness.records.record import SCHEMA, Failure, Fragment
from harness.run.executors import Executor, Place, Worker, WorkerLostError
from harness.run.executors.channel import Channel
from harness.run.executors.forked import START_TIMEOUT_S, ForkedWorker, exit_words, silence
from harness.run.executors.host import Host, describe
from harness.studies.request import TrialRequest
from harness.studies.workload import Workload

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

    def __init__(self, *, host: Host | None = None, label: str = "") -> None:
        self._host = host or Host()
        self._whose = f"the worker of {label!r}" if label else "the worker"
        self._suffix = f"-{label}" if label else ""
        self._threads = 1
        self._disk: _Disk | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Channel | None = None

    def machine(self) -> Machine:
        """The present one."""
        return provenance.probe_machine()

    def free_bytes(self) -> int | None:
        """On its device, or in this container, now."""
        return provenance.free_bytes(self.machine())

    def facts(self) -> Facts:
        """Of the present machine, and of the host if that is another. Raises `UsageError` if it does not answer."""
        return provenance.read_facts(self.machine(), None if self._host == Host() else describe(self._host))

    def start(self, folder: Path, threads: int) -> None:
        """Start the zygote, which begins to import."""
        self._threads = threads
        self._disk = _Disk(folder)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = self._spawn("zygote", theirs.fileno(), self._zygote_log)
        self._control = Channel(ours)

    def _spawn(
        self, what: str, descriptor: int, log: Path, *, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a measuring process of the host that answers on a descriptor and prints into a log."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._host.command("harness.worker", what, str(descriptor)),
                pass_fds=[descriptor],
                env=worker_environment(self._threads, self._host),
                cwd=self._host.cwd,
                stdin=stdin,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def _zygote_log(self) -> Path:
        return self._required_disk().logs / f"zygote{self._suffix}.log"

    def hello(self) -> Hello:
        """Wait until the zygote has imported. Raises `InvalidRunError`, also when it speaks another schema."""
        hello = self._required_control().receive(START_TIMEOUT_S)
        if hello is None:
            log = self._zygote_log
            self.close()
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
            if _OLD_DOOR in last[0]:
                raise InvalidRunError(self._refusal("a schema before 5", "unknown"))
            raise InvalidRunError(
                f"{self._whose} did not start: {last[0]}. Its log is {log}. "
                f"Check that torch, transformers, peft and bitsandbytes import in {self._host.python}."
            )
        if hello.get("schema") != SCHEMA:
            raise InvalidRunError(self._refusal(f"schema {hello.get('schema')}", hello.get("harness", "unknown")))
        return codec.from_json(Hello, hello, "greeting of the worker")

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
        worker = ForkedWorker(int(answer["pid"]), Channel(ours), control)
        hello = worker.channel.receive(START_TIMEOUT_S)
        if hello is None:
            raise worker.lost("start", START_TIMEOUT_S)
        worker.start_latency_s = float(hello["started_monotonic_s"]) - begin
        return worker

    def cold_start(self, request: TrialRequest) -> Fragment:
        """A new interpreter that loads the saved adapter; its output goes to the trial's log."""
        read, write = os.pipe()
        with open(read, encoding="utf-8") as reply:  # noqa: PTH123
            begin = time.monotonic()
            process = self._spawn("cold", write, Path(request.log_path), stdin=subprocess.PIPE)
            os.close(write)
            message = json.dumps({"request": codec.to_json(request), "spawned_monotonic_s": begin})
            timeout = request.protocol.step_timeout_s
            try:
                process.communicate(message.encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise WorkerLostError("timeout", silence("cold", timeout)) from None
            except BaseException:
                process.kill()
                process.wait()
                raise
            text = reply.read()
        if process.returncode != 0 or not text:
            lines = Path(request.log_path).read_text(errors="replace").strip().splitlines()[-1:]
            message = f"the cold interpreter ended with {exit_words(process.returncode)}: {' '.join(lines)}"
            raise WorkerLostError("crashed", Failure(phase="cold", kind="ColdStartFailed", message=message))
        return codec.from_json(Fragment, json.loads(text), "cold start")

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Tokenise in a process of its own."""
        disk = self._required_disk()
        request = json.dumps(
            {"workload": codec.to_json(workload), "folder": str(disk.folder if keep else disk.scratch)}
        )
        log_path = disk.logs / f"tokens{self._suffix}.log"
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
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        answer = None
        if done.returncode == 0 and lines:
            with contextlib.suppress(codec.NotJsonError):
                answer = codec.parse(lines[-1])
        if not isinstance(answer, dict):
            last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
            raise InvalidRunError(f"the tokens could not be prepared: {' '.join(last)}. The log is {log_path}.")
        if "error" in answer:
            raise UsageError(str(answer["error"]))
        return codec.from_json(TokenSummary, answer, "summary of the tokens")

    def make_place(self, trial: str, log: str) -> Place:
        """In a temporary folder of this executor; the log lies with the run from the start."""
        disk = self._required_disk()
        scratch = disk.scratch / trial
        scratch.mkdir(parents=True, exist_ok=True)
        return Place(scratch=str(scratch), log_path=str(disk.logs / f"{log}.log"))

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Moved: nothing else of the trial needs it."""
        return Path(shutil.move(self._required_disk().scratch / trial / name, folder / name))

    def clear_place(self, trial: str) -> None:
        """Adapters and compile caches of a long run would fill the disk."""
        shutil.rmtree(self._required_disk().scratch / trial, ignore_errors=True)

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
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _required_disk(self) -> _Disk:
        if self._disk is None:
            raise InvalidRunError("the worker is not started. Call start() first.")
        return self._disk

    def _required_control(self) -> Channel:
        if self._control is None:
            raise InvalidRunError("the worker is not started. Call start() first.")
        return self._control


class _Disk:
    """Where a run's files lie, by absolute paths: a host may run in another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="lorameter-")
        self.scratch = Path(self._temporary.name)

    def close(self) -> None:
        """Remove what was not to be kept."""
        self._temporary.cleanup()


def open_executor(*, host: Host | None = None, label: str = "") -> Executor:
    """What `harness.run.executors.open_executor` asks of its module."""
    return LocalExecutor(host=host, label=label)
