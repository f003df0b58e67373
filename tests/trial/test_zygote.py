"""The worker: how a trial's process is set up before it measures, and how it reports failures."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lorameter.records.os_errors import failed_record
from lorameter.trial import zygote


class OutOfMemoryError(RuntimeError):
    """Named as torch's is, which only a build with CUDA raises."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (OutOfMemoryError("CUDA: tried to allocate 2.00 GiB"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("shapes do not match"), "crashed"),
        (ValueError("can't allocate memory"), "crashed"),
    ],
)
def test_running_out_of_memory_is_told_from_a_crash(error, status, capfd):
    """Out of memory is `oom` wherever it happens; all else is `crashed`, and both say where, what and how."""
    try:
        raise error
    except Exception as caught:
        fragment = failed_record(caught, "build")
    assert fragment.status == status
    assert (fragment.failure.phase, fragment.failure.kind) == ("build", type(error).__name__)
    assert fragment.failure.message == (str(error) or type(error).__name__)
    assert "raise error" in fragment.failure.traceback
    assert fragment.failure.traceback in capfd.readouterr().err


class FakeDriver:
    """libcuda, as far as it is asked here."""

    def __init__(self, answer):
        self.answer = answer

    def cuDeviceGetCount(self, count):  # noqa: N802 the driver's own name
        return self.answer


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True)])
def test_a_driver_that_something_has_started_forbids_a_fork(monkeypatch, answer, started):
    """Torch notices its own start only; anything but "not initialised" is a start."""
    monkeypatch.setattr(zygote.ctypes, "CDLL", lambda name, mode: FakeDriver(answer))
    monkeypatch.setattr(zygote, "other_threads", list)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    refusal = zygote._cannot_fork()
    assert (refusal is not None and "started the CUDA driver" in refusal) is started


@pytest.mark.parametrize(
    ("device", "built", "lacks"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bitsandbytes_without_its_cuda_library_is_told(monkeypatch, device, built, lacks):
    """Where torch sees a device and bitsandbytes does not; before any trial fails on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    library = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=built))
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", library)
    assert ("its library for CPUs" in (zygote._describe(1.0).lacks or "")) is lacks
