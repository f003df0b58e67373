"""Tests of the setup of a measuring process."""

import logging
import time

import pytest
import torch

from lorameter.records.os_errors import failed_record
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial import process
from lorameter.trial.process import prepare_process


def test_int8_layers_do_not_log_inside_the_timed_window(monkeypatch, tmp_path):
    """The warning of each int8 layer in each forward is disabled; errors still reach the log."""
    logger, threads = logging.getLogger("bitsandbytes.autograd._functions"), torch.get_num_threads()
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    prepare_process(
        TrialRequest(
            trial="r1-plain", variant=LoraVariant(), role="variant", replicate=1, seed=0, workload=Workload(),
            protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
            tokens_path="", scratch=str(tmp_path), log_path="",
        )
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert logger.level == logging.ERROR


def test_the_start_of_a_device_is_timed(monkeypatch):
    """The start of a GPU is timed; a CPU has no start."""
    monkeypatch.setattr(process, "synchronize", lambda device: time.sleep(0.02))
    assert process.start_device("cuda:0")["device_start_time_s"] >= 0.02
    assert process.start_device("cpu") == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (ValueError("can't allocate memory"), "crashed"),
    ],
)
def test_running_out_of_memory_is_distinguished_from_a_crash(error, status):
    """The record has the command, the exception type and the message."""
    fragment = failed_record(error, "build")
    assert fragment.status == status
    assert (fragment.failure.phase, fragment.failure.kind) == ("build", type(error).__name__)
    assert fragment.failure.message == (str(error) or type(error).__name__)
