"""The worker: what a trial's process is told before it measures, and how it says what went wrong."""

import logging
import threading

import pytest

from harness.protocol import Protocol
from harness.record import TrialRequest
from harness.variant import Variant
from harness.worker import _prepare_process, failure_of, thread_count
from harness.workload import Workload


@pytest.fixture
def request_on_cpu(tmp_path):
    """The least that a trial can be asked."""
    return TrialRequest(
        trial="r1-plain", variant=Variant(), role="variant", replicate=1, seed=0, workload=Workload(),
        protocol=Protocol(), interleaving="replicates", phases=("train",), device="cpu", threads=1,
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
    _prepare_process(request_on_cpu)
    assert undisturbed.level == logging.ERROR
    assert not undisturbed.isEnabledFor(logging.WARNING)


def test_the_process_has_the_threads_of_the_request(request_on_cpu, undisturbed):
    """On a CPU, torch computes with as many threads as the request says."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    _prepare_process(request_on_cpu)
    assert torch.get_num_threads() == 1


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
    """Memory is `oom` whoever ran out of it; all else is `crashed`, and both say where, what and how."""
    try:
        raise error
    except Exception as caught:
        fragment = failure_of(caught, "build")
    assert fragment.status == status
    assert (fragment.failure.phase, fragment.failure.kind) == ("build", type(error).__name__)
    assert fragment.failure.message == (str(error) or type(error).__name__)
    assert "raise error" in fragment.failure.traceback
    assert fragment.failure.traceback in capfd.readouterr().err


def test_a_failure_is_named_in_one_line(capfd):
    """The message is the first line of the exception; the rest is in the traceback."""
    assert failure_of(RuntimeError("first\nsecond"), "turn").failure.message == "first"


def test_threads_are_those_that_the_kernel_counts():
    """One more thread is one more, for as long as it lives."""
    before = thread_count()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert thread_count() == before + 1
    finally:
        stop.set()
        thread.join()
