"""Runs trials on this machine in one interpreter: the zygote starts once, and each worker is a fork of it.

The interpreter is the current one, or that of a `Host`: two executors can be the two sides of an A/B.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import time
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, TypeVar

from lorameter import wire
from lorameter.attach.launch import ENV_OBSERVER
from lorameter.errors import InvalidRunError, LorameterError, redact, require, shorten
from lorameter.machine.processes import CPUS, CRASH_SIGNALS, PARENT, exit_words, kill_group
from lorameter.records import codec
from lorameter.records.os_errors import REFUSED, SystemLimitError
from lorameter.records.record import BaseSummary, Failure, PartialRecord, TokenSummary, WorkerInfo
from lorameter.run.workers import MAX_OUTPUT, Executor, Worker, WorkerLostError, timeout_error
from lorameter.run.workers.environment import Host
from lorameter.studies.request import BaseRequest, Request, base_words
from lorameter.studies.workload import Workload

T = TypeVar("T")
START_TIMEOUT_S = 180.0
"""Imports take 3 to 5 s on a quiet machine, and up to a minute with a cold disk and other load."""
END_TIMEOUT_S = 10.0
"""A zygote that has sent its first message ends once its parent has closed the connection and its children have been
reaped."""
TOKENS_TIMEOUT_S = 3600.0
"""Maximum time to download a data set or a model."""
ARROW = "JE_ARROW_MALLOC_CONF"
"""The variable that pyarrow's jemalloc reads when it is loaded."""


def worker_environment(threads: int, host: Host | None = None) -> dict[str, str]:
    """The environment of every measuring process of a host.

    Forks are safe because the zygote has one BLAS thread and no thread of pyarrow's allocator; a library that imports
    scikit-learn or pandas loads pyarrow. OpenMP uses `threads`: one on a CPU by default, because two become very slow
    under contention. Tokenizers start no threads, and NVML counts the CUDA devices without initialising them. The meter
    does not measure trainings in these processes, even if lorameter itself is wrapped.
    """
    inherited = (host or Host()).variables(os.environ)
    arrow = filter(None, [inherited.get(ARROW), "background_thread:false"])  # the last of two wins
    fixed = {
        ARROW: ",".join(arrow),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order of NVML
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "KINETO_LOG_LEVEL": "99",
        "TEARDOWN_CUPTI": "1",  # otherwise the profiler of the check slows down later launches, which are timed
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        PARENT: str(os.getpid()),
        ENV_OBSERVER: "",
    }
    return inherited | fixed


class LocalExecutor(Executor):
    """Implements `Executor` with a zygote: a process that has imported the libraries and forks each worker. If it dies,
    the run ends and can be resumed.

    `label` names the side of an A/B in messages and log names (`zygote-base.log`), so that two executors can share a
    folder.
    """

    def __init__(self, *, host: Host | None = None, label: str = "") -> None:
        self.host = host or Host()
        self._worker_name = f"the worker of {label!r}" if label else "the worker"
        self._suffix = f"-{label}" if label else ""
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: Connection
        self._unresponsive = True
        """Whether the zygote may not notice a closed connection: it is still importing, or it does not answer."""

    def max_parallel(self, threads: int) -> int:
        """The number of cores divided by the threads. One on a GPU, and on a share of a machine (`CPUS`): other sites
        are timed there at the same time, and several busy processes would disturb them more than one."""
        machine = self.machine()
        if machine.device != "cpu" or CPUS in self.host.variables(os.environ):
            return 1
        return max(1, machine.cpus // threads)

    def start(self, folder: Path, threads: int) -> None:
        """Start the zygote, which begins its imports."""
        super().start(folder, threads)
        self._zygote_log = self.logs / f"zygote{self._suffix}.log"
        self._control, theirs = Pipe()
        with theirs:
            self._zygote = self._spawn("zygote", theirs.fileno(), self._zygote_log)

    def _spawn(self, what: str, descriptor: int, log: Path, *, threads: int = 0) -> subprocess.Popen[bytes]:
        """Start a measuring process of the host, which answers on a descriptor and prints into a log.

        It has its own session: signals that a terminal sends to all of its processes reach only the parent.
        """
        with log.open("ab") as file:
            return subprocess.Popen(
                [self.host.python, "-m", "lorameter.worker", what, str(descriptor)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=worker_environment(threads or self.threads, self.host),
                cwd=self.host.cwd,
                start_new_session=True,
            )

    def hello(self) -> WorkerInfo:
        """Wait until the zygote has imported the libraries. Raises `InvalidRunError` if it does not start, or uses
        another schema."""
        try:
            hello = wire.receive(self._control, wire.Hello, START_TIMEOUT_S)
        except wire.GarbledError:
            hello = wire.Hello(schema=0)  # of a revision with another protocol
        except (TimeoutError, wire.ClosedError):
            ended = self._describe_zygote_end()  # first, since only then is its log complete
            last = _last_line(self._zygote_log) or f"no output; {ended}"
            raise InvalidRunError(
                f"{self._worker_name} did not start: {last}. Its log is {self._zygote_log}. "
                f"Check that torch, transformers, peft and bitsandbytes import in {self.host.python}."
            ) from None
        self._unresponsive = False
        wire.check_schema(hello, self._worker_name)
        assert hello.worker is not None
        return hello.worker

    def launch(self) -> Worker:
        """Fork a worker from the zygote. Raises `InvalidRunError` if the zygote has ended or cannot fork, and
        `WorkerLostError` if the process ends before its first message."""
        ours, theirs = Pipe()
        begin = time.monotonic()
        with theirs:
            pid = self._ask_zygote(wire.Command("fork"), int, theirs)
        worker = ForkedWorker(pid, ours, self)
        with worker.handle_loss("start", START_TIMEOUT_S):
            worker.start_latency_s = wire.receive(ours, wire.Hello, START_TIMEOUT_S).started_monotonic_s - begin
        return worker

    def kill(self, pid: int) -> int | None:
        """Kill a child of the zygote and all processes that it started; returns its exit status, None if unknown."""
        if self._zygote is None or self._zygote.poll() is not None:
            return None  # its children have died with it, and their PIDs may be reused
        kill_group(pid)
        with contextlib.suppress(InvalidRunError):
            return self._ask_zygote(wire.Command("reap", arguments={"pid": pid}), Any)  # type: ignore[no-any-return]
        return None

    def _ask_zygote(self, command: wire.Command, kind: Any, attached: Connection | None = None) -> Any:
        """The zygote's answer. Raises `InvalidRunError` if the zygote is dead or does not answer."""
        assert self._zygote is not None  # it was started
        try:
            wire.send(self._control, command)
            if attached is not None:
                send_handle(self._control, attached.fileno(), self._zygote.pid)
            return wire.receive_answer(self._control, kind, START_TIMEOUT_S)
        except (OSError, wire.ClosedError):  # TimeoutError is an OSError
            self._unresponsive = True
        except wire.GarbledError:
            self._zygote.kill()  # its next message may belong to another command
        raise InvalidRunError(f"{self._worker_name}: {self._describe_zygote_end()}. Its log is {self._zygote_log}.")

    def _describe_zygote_end(self) -> str:
        """The exit status of the zygote, or a statement that it gave no answer."""
        assert self._zygote is not None
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection closes shortly before the process ends
            return f"the zygote ended with {exit_words(self._zygote.wait(0.5))}"
        return f"the zygote gave no answer within {START_TIMEOUT_S:g} s"

    def start_interpreter(self, log_path: str, timeout_s: float, request: Request | None = None) -> PartialRecord:
        """Start a new interpreter that imports the libraries, and with a `request` loads the saved adapter and answers;
        its output goes to the log."""
        log = Path(log_path)
        log_start = log.stat().st_size if log.is_file() else 0
        content = None if request is None else codec.to_json(request)
        arguments = {"request": content, "spawned_monotonic_s": time.monotonic()}
        try:
            answer, code = self._ask_process("cold", arguments, PartialRecord, log, timeout_s)
        except TimeoutError:
            raise timeout_error("cold", timeout_s) from None
        except (wire.GarbledError, LorameterError) as error:
            message = f"the cold interpreter gave an unreadable answer: {error}"
            raise WorkerLostError("crashed", Failure(phase="cold", kind="Garbled", message=message)) from None
        if answer is None:
            output = redact(log.read_bytes()[log_start:].decode(errors="replace")).strip()
            last = output.splitlines()[-1:] or ["it printed nothing"]
            message = f"the cold interpreter ended with {exit_words(code)}: {last[0]}"
            failure = Failure(phase="cold", kind="ColdStartFailed", message=message, traceback=output[-MAX_OUTPUT:])
            raise WorkerLostError("crashed", failure)
        return answer

    def prepare_tokens(self, workload: Workload, *, keep: bool = True) -> TokenSummary:
        """Tokenise in a separate process."""
        arguments = {"workload": codec.to_json(workload), "folder": str(self.folder if keep else self.scratch)}
        log = self.logs / f"tokens{self._suffix}.log"
        try:
            summary, code = self._ask_process("tokens", arguments, TokenSummary, log, TOKENS_TIMEOUT_S, threads=1)
        except TimeoutError:
            raise InvalidRunError(
                f"preparing the tokens took longer than {TOKENS_TIMEOUT_S:g} s; the log is {log}."
            ) from None
        except wire.GarbledError as error:
            raise InvalidRunError(f"the tokens could not be prepared: {error}. The log is {log}.") from None
        if summary is not None:
            return summary
        require(
            -code not in CRASH_SIGNALS,
            f"data {shorten(repr(workload.data))}: the process that reads it with {workload.model}'s tokenizer "
            f"ended with {exit_words(code)}: the file may be damaged. Restore it, or save it again. "
            f"The log is {log}.",
        )
        why = _last_line(log) or f"their process ended with {exit_words(code)}"
        raise InvalidRunError(f"the tokens could not be prepared: {why}. The log is {log}.")

    def _ask_process(
        self, what: str, arguments: dict[str, Any], kind: type[T], log: Path, timeout_s: float, *, threads: int = 0
    ) -> tuple[T | None, int]:
        """The answer of a process started for one command, and its exit code; raises as `wire.ask_process` does."""
        ours, theirs = Pipe()
        with ours:
            with theirs:
                process = self._spawn(what, theirs.fileno(), log, threads=threads)
            answer = wire.ask_process(process, ours, wire.Command(what, arguments=arguments), kind, timeout_s)
        return answer, process.returncode

    def prepare_base(self, request: BaseRequest) -> BaseSummary:
        """Prepare the base in a process forked from the zygote; its log is `base.log`."""
        request = dataclasses.replace(request, log_path=str(self.logs / f"base{self._suffix}.log"))
        with contextlib.closing(self.launch()) as worker:
            fragment = worker.ask("base", "base", TOKENS_TIMEOUT_S, request=codec.to_json(request))
        if fragment.failure is not None:
            if fragment.failure.kind == REFUSED:
                raise SystemLimitError(
                    f"the base {base_words(request.variant, request.workload)}: {fragment.failure.message}"
                )
            raise WorkerLostError(fragment.status, fragment.failure)
        return codec.from_json(BaseSummary, fragment.tokens["base"], "summary of a base")

    def close(self) -> None:
        """End the zygote; its children die with it. A zygote that is still importing, or does not answer, is killed."""
        if self._zygote is not None:
            self._control.close()
            if self._unresponsive:
                self._zygote.kill()
            try:
                self._zygote.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
            self._zygote, self._unresponsive = None, True
        super().close()


def _last_line(log: Path) -> str:
    return "".join(log.read_text(errors="replace").strip().splitlines()[-1:])


class ForkedWorker(Worker):
    """A process that the zygote of an executor has forked."""

    def __init__(self, pid: int, connection: Connection, executor: LocalExecutor) -> None:
        self.pid, self.connection = pid, connection
        self._executor = executor
        self._ended = False
        self._code: int | None = None

    def close(self) -> int | None:
        """Close the connection, and kill the process and all processes that it started."""
        self.connection.close()
        if not self._ended:
            self._ended, self._code = True, self._executor.kill(self.pid)
        return self._code
