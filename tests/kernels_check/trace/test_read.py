"""Tests that a recording is judged by its events: each time is counted once, and each name is kept."""

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_check import read_trace
from kernels_check.rules import CATEGORIES

NAMES = json.loads((Path(__file__).parents[1] / "trace_names.json").read_text())
KERNELS = [(name, rule) for rule, names in NAMES["kernels"].items() for name in names]
FLASH = NAMES["kernels"]["ATT-SDPA-FLASH"][0]
SOFTMAX = NAMES["kernels"]["ATT-SOFTMAX"][0]
NF4, DOUBLE, FUSED = (NAMES["kernels"][rule][0] for rule in ("BNB-DEQ-NF4", "BNB-DEQ-8BIT", "BNB-GEMM4"))
GEMM = NAMES["kernels"]["GEMM-BF16"][0]
ADD = NAMES["kernels"]["ATEN"][1]


def kernel(name, ts, dur, *, stream=7, device=0, cat="kernel", **arguments):
    arguments = {"device": device, "stream": stream} | arguments
    return {"ph": "X", "cat": cat, "name": name, "pid": device, "tid": stream, "ts": ts, "dur": dur, "args": arguments}


def host(cat, name, ts, dur, *, tid=1, **arguments):
    return {"ph": "X", "cat": cat, "name": name, "pid": 99, "tid": tid, "ts": ts, "dur": dur, "args": arguments}


@pytest.fixture
def judge(tmp_path):
    def judged(events):
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events, "traceName": "t"}))
        return read_trace(path)

    return judged


def test_a_summary_has_the_shares_of_a_step(judge):
    """The summary has shares and milliseconds by category, attention and 4-bit paths, with the facts from their
    names."""
    summary = judge([
        kernel(NF4, 0, 100), kernel(DOUBLE, 100, 20), kernel(GEMM, 120, 480), kernel(FLASH, 600, 200),
        kernel(ADD, 800, 100), kernel("Memcpy DtoH (Device -> Pinned)", 900, 50, cat="gpu_memcpy"),
        kernel("Memset (Device)", 950, 10, cat="gpu_memset"), kernel("renamed_kernel", 960, 40),
    ])  # fmt: skip
    assert summary.time_ms == pytest.approx(1.0)
    assert summary.calls == 8
    shares = {"dequantize": 0.12, "matmul": 0.48, "attention": 0.2, "elementwise": 0.1, "copy": 0.06, "other": 0.04}
    assert summary.categories == pytest.approx(dict.fromkeys(CATEGORIES, 0.0) | shares)
    assert summary.category_time_ms["matmul"] == pytest.approx(0.48)
    assert summary.busy_share == pytest.approx(1.0)
    flash = summary.attention.backends["flash"]
    assert (flash.calls, flash.forward_calls, flash.backward_calls) == (1, 1, 0)
    assert (flash.dtypes, flash.causal_calls, flash.not_causal_calls) == ({"bfloat16": 1}, 1, 0)
    assert flash.time_share == pytest.approx(0.2)
    assert flash.kernels == {FLASH: 1}
    assert list(summary.fourbit.paths) == ["dequantize", "dequantize_8bit"]
    assert summary.fourbit.quant_types["nf4"].calls == 1
    assert summary.fourbit.dtypes == {"bfloat16": 1}
    assert summary.matmul_dtypes["bfloat16"].time_share == pytest.approx(0.48)
    assert summary.unclassified.names == ("renamed_kernel",)
    assert summary.unclassified.time_share == pytest.approx(0.04)
    (notice,) = summary.notices
    assert notice.startswith("4% of the time is in kernels that no rule knows (most in renamed_kernel)")


def test_a_fused_product_is_another_path_than_dequantizing(judge):
    """Both have the same operator; the kernels distinguish them."""
    summary = judge([kernel(FUSED, 0, 3), kernel(NF4, 3, 1)])
    assert {path: use.time_share for path, use in summary.fourbit.paths.items()} == {"fused": 0.75, "dequantize": 0.25}
    assert summary.categories["matmul"] == 0.75


@pytest.mark.parametrize(
    ("operators", "backend"),
    [
        ((), "math_or_eager"),
        (("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math"), "math"),
        (("aten::scaled_dot_product_attention", "aten::_safe_softmax", "aten::softmax"), "math"),
        (("aten::bmm", "aten::softmax", "aten::_softmax"), "eager"),
        (("aten::scaled_dot_product_attention", "aten::softmax"), "math_or_eager"),
        (("aten::mul",), "math_or_eager"),
    ],
)  # fmt: skip
def test_a_softmax_kernel_needs_its_operator_to_name_the_backend(judge, operators, backend):
    """SDPA's math and eager attention launch the same kernels; without an operator neither is reported."""
    summary = judge([kernel(SOFTMAX, 50, 5), *(host("cpu_op", name, 10 * i, 5) for i, name in enumerate(operators))])
    assert list(summary.attention.backends) == [backend]
    assert summary.device == "gpu"


# --- time ------------------------------------------------------------------------------------------------------------


def test_annotations_and_host_events_are_not_gpu_time(judge):
    """A nested annotation on the GPU spans its kernels and a runtime call waits for them, but neither is GPU work."""
    kernels = [kernel(GEMM, 10, 10), kernel(FLASH, 30, 10)]
    around = [
        kernel("ProfilerStep#3", 0, 100, cat="gpu_user_annotation"), kernel("layer", 5, 50, cat="gpu_user_annotation"),
        host("user_annotation", "ProfilerStep#3", 0, 100), host("cpu_op", "aten::mm", 0, 90),
        host("cuda_runtime", "cudaDeviceSynchronize", 0, 95), host("overhead", "Buffer", 0, 5),
        {"ph": "M", "name": "process_name", "pid": 0, "args": {}}, {"ph": "i", "name": "end", "ts": 99, "s": "g"},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": 10},
    ]  # fmt: skip
    summary = judge(kernels + around)
    assert summary.calls == 2
    assert summary.time_ms == pytest.approx(0.020)
    assert summary.busy_share == pytest.approx(20 / 30)
    assert summary.unclassified.names == ()


def test_a_repeated_event_counts_once(judge):
    """Merged files repeat events; a notice gives the number."""
    once = [kernel(GEMM, 0, 10, correlation=1), kernel(ADD, 10, 10, correlation=2)]
    summary = judge(once + once[:1])
    assert summary.calls == 2
    assert summary.time_ms == pytest.approx(0.020)
    assert summary.notices == ("1 events are in the file more than once and were counted once",)


@pytest.mark.parametrize("time", [{"dur": -5}, {"dur": "nan"}, {"ts": "Infinity"}])
def test_a_launch_without_a_usable_time_is_counted(judge, time):
    """Its name still proves that it ran; a notice reports the missing time."""
    summary = judge([kernel(GEMM, 0, 10), kernel(FLASH, 10, 5) | time])
    assert summary.attention.backends["flash"].calls == 1
    assert summary.attention.backends["flash"].time_share == 0.0
    assert summary.categories["matmul"] == summary.busy_share == 1.0
    assert summary.notices == ("1 events have no usable start or duration: counted, with no time",)


# --- steps -----------------------------------------------------------------------------------------------------------


def launch(correlation, ts):
    return host("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=correlation)


def test_a_kernel_belongs_to_the_step_that_launched_it(judge):
    """The GPU runs behind the host: two of the first step's three kernels run during the host's second step."""
    events = [host("user_annotation", "ProfilerStep#4", 0, 100), host("user_annotation", "ProfilerStep#5", 100, 100)]
    for correlation, (launched, ran) in enumerate([(10, 20), (20, 120), (30, 140), (110, 160)]):
        events += [launch(correlation, launched), kernel(GEMM, ran, 5, correlation=correlation)]
    events += [launch(9, 150), kernel("Memset (Device)", 170, 1, cat="gpu_memset", correlation=9)]
    steps = judge(events).kernels_per_step
    assert steps is not None
    assert (steps.steps, steps.lowest, steps.median, steps.highest) == (2, 1, 2.0, 3)


@pytest.mark.parametrize("where", ["gpu_user_annotation", "user_annotation"])
def test_without_a_launch_the_interval_of_the_step_decides(judge, where):
    """The GPU annotation is preferred, since it moves with the kernels."""
    events = [kernel("ProfilerStep#1", 100, 50, cat=where), kernel("ProfilerStep#2", 150, 50, cat=where)]
    events += [kernel(GEMM, 110, 5), kernel(GEMM, 120, 5), kernel(GEMM, 160, 5), kernel(GEMM, 400, 5)]
    steps = judge(events).kernels_per_step
    assert steps is not None
    assert (steps.steps, steps.lowest, steps.highest) == (2, 1, 2)


def test_without_marked_steps_nothing_is_claimed(judge):
    """A custom range is not a step."""
    assert judge([kernel(GEMM, 0, 5), host("user_annotation", "my step", 0, 10)]).kernels_per_step is None


# --- host only -------------------------------------------------------------------------------------------------------


def test_a_trace_without_a_gpu_is_judged_by_its_operators(judge):
    """Operators that attention calls count as attention, times are self times, and the summary names the device."""
    attention = "aten::_scaled_dot_product_attention_math"
    summary = judge([
        host("cpu_op", "aten::scaled_dot_product_attention", 0, 40), host("cpu_op", attention, 5, 30),
        host("cpu_op", "aten::bmm", 10, 10), host("cpu_op", "aten::_safe_softmax", 20, 10),
        host("cpu_op", "bitsandbytes::gemm_4bit", 50, 20), host("cpu_op", "bitsandbytes::dequantize_4bit", 52, 8),
        host("cpu_op", "bitsandbytes::dequantize_4bit", 53, 6), host("cpu_op", "aten::linear", 60, 10),
        host("cpu_op", "my_op", 60, 20, tid=2),
    ])  # fmt: skip
    assert summary.device == "cpu"
    assert "no GPU kernel in this trace: judged by 9 operators of the host" in summary.notices[0]
    assert summary.busy_share is None
    assert summary.time_ms == pytest.approx(0.080)
    assert {name: use.calls for name, use in summary.attention.backends.items()} == {"math": 1}
    assert summary.categories["attention"] == pytest.approx(30 / 80)
    assert summary.categories["dequantize"] == pytest.approx(8 / 80)
    assert summary.categories["matmul"] == pytest.approx(12 / 80)
    assert summary.fourbit.paths["dequantize"].calls == 1
    assert summary.unclassified.names == ("my_op",)


def test_a_real_trace_of_a_cpu_names_flash_and_dequantizing(tmp_path):
    """torch records one layer of SDPA and one NF4 product, forward and backward."""
    import bitsandbytes
    import torch
    from torch.profiler import ProfilerActivity, profile

    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        layer(y.reshape(-1, 64)).float().sum().backward()
    recorded.export_chrome_trace(str(tmp_path / "real.json"))
    summary = read_trace(tmp_path / "real.json")
    assert summary.device == "cpu"
    flash = summary.attention.backends["flash"]
    assert (flash.forward_calls, flash.backward_calls) == (1, 1)
    assert summary.fourbit.paths["dequantize"].calls == 2
    assert sum(summary.categories.values()) == pytest.approx(1.0)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("wrap", [lambda events: {"traceEvents": events}, lambda events: events])
def test_content_decides_the_kind_of_a_file(tmp_path, wrap, pack, bom):
    """A file may be plain or compressed, an object or a list, with or without a byte order mark, under any name."""
    path = tmp_path / "recording.data"
    path.write_bytes(pack(bom + json.dumps(wrap([kernel(GEMM, 0, 10)])).encode()))
    assert read_trace(path).categories["matmul"] == 1.0
    assert read_trace(str(path)) == read_trace(path)


# --- properties ------------------------------------------------------------------------------------------------------

events = st.lists(
    st.builds(
        kernel,
        st.sampled_from([name for name, _ in KERNELS] + ["unknown_a", "unknown_b"]),
        st.integers(0, 60),
        st.integers(0, 20),
        stream=st.integers(7, 9),
        device=st.integers(0, 1),
    ),
    min_size=1,
    max_size=40,
).filter(lambda some: any(event["dur"] for event in some))


def read(directory, some):
    path = directory / "trace.json"
    path.write_text(json.dumps({"traceEvents": some}))
    return read_trace(path)


@settings(deadline=None, max_examples=30)
@given(some=events, seed=st.integers(0, 1000))
def test_shares_add_up_and_order_does_not_matter(tmp_path_factory, some, seed):
    """Categories and milliseconds are complete, the busy share equals that of a unit grid, and a shuffled file gives
    the same summary."""
    directory = tmp_path_factory.mktemp("traces")
    summary = read(directory, some)
    assert sum(summary.categories.values()) == pytest.approx(1.0)
    assert sum(summary.category_time_ms.values()) == pytest.approx(summary.time_ms)
    assert summary.unclassified.time_share <= summary.categories["other"] + 1e-12
    first = min(event["ts"] for event in some)
    window = max(event["ts"] + event["dur"] for event in some) - first
    devices = {event["pid"] for event in some}
    units = {(event["pid"], at) for event in some for at in range(event["ts"], event["ts"] + event["dur"])}
    assert summary.busy_share == pytest.approx(len(units) / (window * len(devices)))
    shuffled = some[:]
    random.Random(seed).shuffle(shuffled)
    again = read(directory, shuffled)
    assert again.busy_share == pytest.approx(summary.busy_share)
    assert dataclasses.replace(again, busy_share=summary.busy_share) == summary
    assert again.unclassified.names == summary.unclassified.names
