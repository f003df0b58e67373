"""A large trace is read in less memory than its file takes."""

import json
import subprocess
import sys

import pytest

MEGABYTE = 1 << 20
SHARE = 0.7
READ = """
import json, re, sys
from kernels_check import read_trace
import kernels_check.trace.read

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

before = peak()
summary = read_trace(sys.argv[1])
print(json.dumps([summary.calls, summary.busy_share, summary.kernels_per_step.median, peak() - before]))
"""


def write(path, *, size_bytes):
    """One ProfilerStep after another of 1000 operators, launches and kernels each, as torch.profiler writes them."""
    with path.open("w") as file:
        file.write('{"schemaVersion": 1,\n "traceEvents": [\n')
        steps = 0
        while file.tell() < size_bytes:
            file.write(_step(steps))
            steps += 1
        file.write(" {}\n]}\n")
    return steps


STEP = '{"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#%d", "pid": 9, "tid": 9, "ts": %d, "dur": 10000},\n'
THREE = (
    '{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 9, "tid": 9, "ts": %d.125, "dur": 5.5, "args": '
    '{"External id": %d, "Record function id": 0, "Ev Idx": 1, "Input Dims": [[2, 2048, 4096], [4096, 4096]], '
    '"Input type": ["c10::BFloat16", "c10::BFloat16"]}},\n'
    '{"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 9, "ts": %d.5, "dur": 2, '
    '"args": {"External id": 1, "cbid": 211, "correlation": %d}},\n'
    '{"ph": "X", "cat": "kernel", "name": "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "pid": 0, "tid": 7, "ts": %d, '
    '"dur": 5, "args": {"External id": 1, "queued": 0, "device": 0, "context": 1, "stream": 7, "correlation": %d, '
    '"registers per thread": 168, "shared memory": 213320, "blocks per SM": 1.0, "warps per SM": 12.0, '
    '"grid": [132, 1, 1], "block": [384, 1, 1], "est. achieved occupancy %%": 19}},\n'
)


def _step(step):
    """The kernels run 5 ms after their launch, half of them in the next step."""
    start = step * 10_000
    parts = [STEP % (step, start)]
    for i in range(1000):
        at, correlation = start + 10 * i, step * 1000 + i
        parts.append(THREE % (at, correlation, at, correlation, at + 5_003, correlation))
    return "".join(parts)


def test_memory_stays_bounded(tmp_path):
    """60 MB of some 180,000 events: the peak grows by less than the file takes, and each kernel is in its own step.

    Read as a whole, as `json.load` does, they take several times of it.
    """
    path = tmp_path / "large.json"
    steps = write(path, size_bytes=60 * MEGABYTE)
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    calls, busy_share, median, grown_bytes = json.loads(done.stdout)
    assert calls == steps * 1000
    assert busy_share == pytest.approx(0.5, rel=1e-3)
    assert median == 1000
    size_bytes = path.stat().st_size
    assert grown_bytes < SHARE * size_bytes, f"{grown_bytes / MEGABYTE:.0f} MB for {size_bytes / MEGABYTE:.0f} MB"
