"""How a measuring process is set up before it measures."""

import logging
import time

import pytest

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial import process
from lorameter.trial.process import prepare_process


@pytest.fixture
def request_on_cpu(tmp_path):
    """The least that a trial can be asked."""
    return TrialRequest(
        trial="r1-plain", variant=LoraVariant(), role="variant", replicate=1, seed=0, workload=Workload(),
        protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=str(tmp_path / "tokens"), scratch=str(tmp_path), log_path=str(tmp_path / "log"),
    )  # fmt: skip


@pytest.fixture
def undisturbed(monkeypatch):
    """The logger that bitsandbytes itself warns with, and torch's threads, both as before once the test is over."""
    torch = pytest.importorskip("torch")
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    threads = torch.get_num_threads()
    level = functions.logger.level
    yield functions.logger
    functions.logger.setLevel(level)
    torch.set_num_threads(threads)


def test_int8_layers_do_not_log_inside_the_timed_window(request_on_cpu, undisturbed):
    """The one warning that each int8 layer gives in each forward is off; errors still reach the log."""
    undisturbed.setLevel(logging.NOTSET)
    prepare_process(request_on_cpu)
    assert undisturbed.level == logging.ERROR
    assert not undisturbed.isEnabledFor(logging.WARNING)


def test_a_device_starts_before_what_is_timed_on_it(monkeypatch):
    """How long it took is a number of its own; a CPU is not waited for."""
    monkeypatch.setattr(process, "synchronize", lambda device: time.sleep(0.02))
    begin = time.perf_counter()
    took_s = process.start_device("cuda:0")["device_start_time_s"]
    assert 0.02 <= took_s <= time.perf_counter() - begin
    assert process.start_device("cpu") == {}
