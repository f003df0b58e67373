"""Tests that the zygote refuses a fork that could not use the device."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lorameter.trial import zygote


class FakeDriver:
    """libcuda with one function."""

    def __init__(self, answer):
        self.answer = answer

    def cuDeviceGetCount(self, count):  # noqa: N802 the driver's own name
        return self.answer


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True)])
def test_a_started_cuda_driver_forbids_a_fork(monkeypatch, answer, started):
    """Any result of the driver but CUDA_ERROR_NOT_INITIALIZED means that it has started."""
    monkeypatch.setattr(zygote.ctypes, "CDLL", lambda name, mode: FakeDriver(answer))
    monkeypatch.setattr(zygote, "other_threads", list)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    refusal = zygote._cannot_fork()
    assert (refusal is not None and "started the CUDA driver" in refusal) is started


@pytest.mark.parametrize(
    ("device", "built", "lacks"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bitsandbytes_without_its_cuda_library_is_reported(monkeypatch, device, built, lacks):
    """The case that torch sees a device and bitsandbytes does not is reported before a trial fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    library = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=built))
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", library)
    assert ("its library for CPUs" in (zygote._describe(1.0).lacks or "")) is lacks
