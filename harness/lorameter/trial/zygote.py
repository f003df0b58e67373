"""The zygote: a process that imports the libraries and forks the trials' processes.

Importing torch, transformers, peft and bitsandbytes takes seconds and does not depend on the variant, so it is done
once; every trial then starts in milliseconds in an interpreter that has run no model. The zygote must have one thread
when it forks (a BLAS thread would leave the child with a locked mutex) and must never have used the device.

Its commands are `fork`, followed by the file descriptor of the new process's connection, and `reap`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from lorameter import wire
from lorameter.errors import InvalidRunError
from lorameter.machine.nvml import compute_capability
from lorameter.machine.processes import fork_process, kill_group, outlive_parent
from lorameter.machine.provenance import harness_identity
from lorameter.records.record import WorkerInfo
from lorameter.trial.serve import serve

PRELOAD = ("torch", "transformers", "peft", "bitsandbytes", "lorameter.trial.trial")
"""Modules that every trial imports."""
LAZY = (
    *(f"transformers.models.{family}.modeling_{family}" for family in ("gemma", "llama", "mistral", "qwen2")),
    "transformers.generation.utils",
    "peft.tuners.lora.bnb",
)
"""Submodules that the libraries load at first use, among them the models of the catalogue. Without this, each trial
would import them during its load or first step."""


def import_libraries() -> None:
    """Import the modules of every trial. Garbage collection is off during the imports, since it would take a fifth of
    the time, and ignores the imported objects afterwards."""
    gc.disable()
    with _capability_from_nvml():
        for name in PRELOAD:
            importlib.import_module(name)
    for name in LAZY:
        with contextlib.suppress(ImportError):  # an optimisation: a library may rename its submodules
            importlib.import_module(name)
    gc.freeze()  # garbage collection would otherwise write to shared pages in every child
    gc.enable()


def zygote(control: Connection) -> None:
    """Import, report the libraries, then fork and reap on request until the parent closes the connection."""
    begin = time.perf_counter()
    import_libraries()
    worker = _describe(time.perf_counter() - begin)
    outlive_parent()  # from now on, a closed connection ends this process after its children
    children: set[int] = set()

    def carry_out(command: wire.Command) -> int | None:
        if command.name == "fork":
            pid = _fork(recv_handle(control), control)
            children.add(pid)
            return pid
        status = _reap(command.arguments["pid"])
        children.discard(command.arguments["pid"])
        return status

    try:
        wire.serve(control, carry_out, wire.Hello(harness=worker.harness, worker=worker))
    finally:
        for pid in children:
            kill_group(pid)


REAP_TIMEOUT_S = 20.0
"""Maximum wait for the end of a child, since the kernel may be unable to end it (a hanging driver)."""


def _reap(pid: int) -> int | None:
    """Exit status of a child that is ending; None if it does not end within the timeout."""
    ended = os.pidfd_open(pid)
    try:
        if not wait([ended], REAP_TIMEOUT_S):
            return None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(ended)


@contextlib.contextmanager
def _capability_from_nvml() -> Iterator[None]:
    """Read the compute capability from NVML during the imports. bitsandbytes reads it at import, and torch would
    initialise CUDA to get it, after which no child could use the device."""
    import torch

    if not torch.cuda.is_available():
        yield
        return

    def capability(device: Any = 0) -> tuple[int, int]:
        index = getattr(device, "idx", getattr(device, "index", device))
        reading = compute_capability(torch.cuda._get_nvml_device_index(index))
        if reading.value is None:
            raise InvalidRunError(f"the compute capability of the device is not known: {reading.reason}")
        return reading.value

    original, torch.cuda.get_device_capability = torch.cuda.get_device_capability, capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


_CUDA_NOT_INITIALISED = 3
"""CUDA_ERROR_NOT_INITIALIZED of the driver's cuda.h."""


def _driver_started() -> bool:
    """Whether any code in this process has called cuInit; torch knows only its own calls."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # the driver is not loaded
        return False
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != _CUDA_NOT_INITIALISED


def other_threads() -> list[str]:
    """Names of the other threads of this process, from the kernel; native code names its own."""
    own, names = threading.get_native_id(), []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            if int(task.name) != own:
                names.append((task / "comm").read_text().strip())
    return sorted(names)


def _fork(descriptor: int, control: Connection) -> int:
    """Fork a process that serves the connection with this descriptor; returns its PID."""
    try:
        require_safe_fork()
        return fork_process(lambda: _host_trials(descriptor, control))
    except OSError as error:
        raise InvalidRunError(f"the zygote cannot fork: {error.strerror}; free memory or processes") from None
    finally:
        os.close(descriptor)  # the child never reaches this line


def _host_trials(descriptor: int, control: Connection) -> None:
    control.close()
    os.setsid()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # an ignored signal stays ignored
        # An exception would first close the connection, and the parent would report that it killed the process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with Connection(descriptor) as connection:
        serve(connection)


def require_safe_fork() -> None:
    """Raise `InvalidRunError` if a fork would be unsafe."""
    if others := other_threads():
        raise InvalidRunError(
            f"the zygote has {1 + len(others)} threads and forks safely with one only; the others are "
            f"{', '.join(others)}. Measure in an environment without the library that starts it at import, or "
            "set background_thread:false in MALLOC_CONF where it is jemalloc's (jemalloc_bg_thd)"
        )
    if _driver_started():
        raise InvalidRunError(
            "something in the zygote has started the CUDA driver, and no fork of it could use the device: torch does "
            "so itself where NVML does not answer, as for a MIG instance or in a container without it"
        )


def _describe(import_time_s: float) -> WorkerInfo:
    """The device as torch sees it, without initialising CUDA (PYTORCH_NVML_BASED_CUDA_CHECK).

    If bitsandbytes does not find the device, it loads its CPU library without an error, and later calls fail.
    """
    import torch

    cuda, lacks = torch.cuda.is_available(), None
    if cuda and not sys.modules["bitsandbytes.cextension"].lib.compiled_with_cuda:
        lacks = (
            "bitsandbytes has loaded its library for CPUs although torch sees a CUDA device; `python -m bitsandbytes` "
            "says why. A MIG instance whose driver does not answer NVML, or a CUDA version without a build, are usual "
            "reasons"
        )
    return WorkerInfo(
        harness=harness_identity(),
        import_time_s=import_time_s,
        device="cuda" if cuda else "cpu",
        torch=torch.__version__,
        lacks=lacks,
    )
