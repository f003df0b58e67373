"""Tests of real GPU recordings against an independent count of their sums.

The recordings are not part of the project: $LORAMETER_TRACES names their folder, or they are in a folder `shared` next
to the checkout. Recordings that are not in the table must only have almost no unclassified time.
"""

import csv
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from kernels_check import read_trace

FOLDER = Path(os.environ.get("LORAMETER_TRACES", Path(__file__).parents[4] / "shared" / "data" / "traces"))
RECORDINGS = sorted(
    path for ending in ("*.json.gz", "*.json", "*.csv", "*.csv.gz") for path in FOLDER.glob(ending) if path.is_file()
)
MAX_UNCLASSIFIED = 0.03
MAX_DIFFERENCE = 0.02

pytestmark = pytest.mark.skipif(
    not RECORDINGS, reason=f"no recording in {FOLDER}: $LORAMETER_TRACES names their folder"
)


def times_of(path):
    """Return the microseconds of each name on the device, without the readers under test."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    times = {}
    if ".csv" in path.name:
        for row in csv.DictReader(text.splitlines()):
            times[row["Name"]] = times.get(row["Name"], 0.0) + float(row["Total Time (ns)"]) / 1e3
        return times
    for event in json.loads(text)["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times[event["name"]] = times.get(event["name"], 0.0) + float(event["dur"])
    return times


WORDS = (
    (
        "attention",
        r"attn_|attention|_sdpa_|fmha|Fmha|flash_(fwd|bwd)|FlashAttn|cudnn::fusion::|sage_fwd|softmax_warp|cunn_\w*SoftMax(?!.*LogSoftMax)",
    ),
    ("communication", r"nccl|all_?reduce|AllReduce|multimem"),
    (
        "matmul",
        r"[gG]emm(?!.*_triton_)|nvjet|splitK|SplitK|Cijk_|^bmm_|_matmul_ogs|MoeFlatmm|fused_moe_kernel|cutlass::Kernel|"
        r"_mm_|triton_mm|xmma|fprop|wgrad|dgrad|convolution_kernel|igemm|winograd|implicit_con|[cC]onv\w*Kernel|2ck\d+\w*conv",
    ),
    (
        "copy",
        r"^Mem(cpy|set)|copy_kernel_cuda|CatArray|FillFunctor|batched_transpose|nchwToNhwc|nhwcToNchw|SubTensorOp|"
        r"_kvcache|reshape_and_cache|__amd_rocclr_",
    ),
)
"""Categories by words in names: an independent count without the rules."""


def count_shares(times):
    """Return shares of the time by the first matching category; elementwise is the rest."""
    shares = dict.fromkeys(("attention", "communication", "matmul", "copy", "elementwise"), 0.0)
    for name, time in times.items():
        found = next((category for category, words in WORDS if re.search(words, name)), "elementwise")
        shares[found] += time / sum(times.values())
    return shares


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_the_judgement_of_a_recording_agrees_with_its_sums(path):
    """All time is counted, nearly all of it has a category, and each share is within 2 points of the count by words."""
    summary, times = read_trace(path), times_of(path)
    assert summary.time_ms == pytest.approx(sum(times.values()) / 1e3, rel=1e-6)
    assert sum(summary.categories.values()) == pytest.approx(1.0)
    assert summary.unclassified.time_share <= MAX_UNCLASSIFIED, summary.unclassified.names
    shares = count_shares(times)
    found = {category: summary.categories[category] for category in shares}
    found["elementwise"] += sum(summary.categories[name] for name in ("loss", "optimizer", "other", "dequantize"))
    assert found == pytest.approx(shares, abs=MAX_DIFFERENCE)
