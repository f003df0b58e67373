"""Tests that the tables of nsys are found by their headings among other output."""

import gzip

import pytest

from kernels_check import TraceError, read_trace

HEADING = "Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name\n"
FLASH = (
    '60.0,6000000,6,1.0,1.0,1,1,0.0,"void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<'
    "(int)64, (int)128, (int)128, (int)4, (bool)0, (bool)0, cutlass::bfloat16_t>, (bool)0, (bool)1, (bool)0, (bool)0, "
    '(bool)1, (bool)1, (bool)0, (bool)0>(pytorch_flash::Flash_fwd_params)"\n'
)  # fmt: skip
NF4 = (
    '30.0,3000000,3,1.0,1.0,1,1,0.0,"void kDequantizeBlockwise<__nv_bfloat16, (int)512, (int)64, (int)8, (int)2>'
    '(float *, unsigned char *, float *, T1 *, int, int)"\n'
)
NEW = "10.0,1000000,2,1.0,1.0,1,1,0.0,renamed_kernel\n"
MEMORY = (
    "\nTime (%),Total Time (ns),Count,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Operation\n"
    "75.0,750000,5,1.0,1.0,1,1,0.0,[CUDA memcpy Host-to-Device]\n25.0,250000,5,1.0,1.0,1,1,0.0,[CUDA memset]\n"
)


@pytest.fixture
def judge(tmp_path):
    def judged(text, pack=bytes):
        path = tmp_path / "kernels.csv"
        path.write_bytes(pack(text.encode()))
        return read_trace(path)

    return judged


def refusal(judge, text):
    with pytest.raises(TraceError) as refused:
        judge(text)
    return str(refused.value)


@pytest.mark.parametrize(
    ("before", "newline", "pack"),
    [("Processing [a.sqlite] with [b.py]...\n", "\r\n", gzip.compress), ("[3/8] Executing 'x'\n\n", "\n", bytes)],
)
def test_a_table_is_judged(judge, before, newline, pack):
    """Casts, preceding progress lines, Windows line ends and compression change nothing."""
    summary = judge((before + HEADING + FLASH + NF4 + NEW).replace("\n", newline), pack)
    assert summary.source == "nsys"
    assert summary.time_ms == pytest.approx(10.0)
    flash = summary.attention.backends["flash"]
    assert (flash.calls, flash.time_share, flash.dtypes, flash.causal_calls) == (6, 0.6, {"bfloat16": 6}, 6)
    assert summary.fourbit.paths["dequantize"].calls == 3
    assert summary.fourbit.quant_types["nf4"].time_share == pytest.approx(0.3)
    assert summary.unclassified.names == ("renamed_kernel",)
    assert summary.unclassified.time_share == pytest.approx(0.1)


def test_a_table_has_no_intervals(judge):
    """Busy share and kernels a step are unknown, and a notice gives the reason."""
    summary = judge(HEADING + FLASH + NF4 + NEW)
    assert summary.busy_share is None
    assert summary.kernels_per_step is None
    assert (
        "an nsys summary has sums and no intervals: neither busy share nor kernels per step can be computed"
        in summary.notices
    )


def test_memory_operations_count_where_their_table_is_there(judge):
    """nsys lists copies in a separate table with its own 100 %."""
    summary = judge(HEADING + FLASH + NF4 + NEW + MEMORY)
    assert summary.time_ms == pytest.approx(11.0)
    assert summary.categories["copy"] == pytest.approx(1 / 11)


def test_other_tables_do_not_count(judge):
    """API calls are on the host; a second kernel table lists the same launches by another key."""
    api = "\nTime (%),Total Time (ns),Num Calls,Avg (ns),Name\n100.0,9000000,5,1.0,cudaLaunchKernel\n"
    once = judge(HEADING + FLASH + NF4 + NEW)
    both = judge(HEADING + FLASH + NF4 + NEW + api + "\n" + HEADING + FLASH + NF4 + NEW)
    assert both.time_ms == once.time_ms


def test_rounded_percentages_are_no_missing_rows(judge):
    """Many small kernels may each show 0.0 %."""
    rows = "".join(f"0.0,100,1,1.0,1.0,1,1,0.0,kernel_{i}\n" for i in range(40))
    assert judge(HEADING + "98.1,210000,1,1.0,1.0,1,1,0.0,ampere_sgemm_128x64_tn\n" + rows).calls == 41


def test_missing_rows_are_noticed(judge):
    """A table that was cut between two rows would give wrong shares."""
    message = refusal(judge, HEADING + FLASH + NF4)
    assert "2 rows add up to 90.0 % of their time: rows are missing" in message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("100.0,1000,1\n", "the row ['100.0', '1000', '1'] is damaged"),
        ("100.0,many,1,1,1,1,1,1,k\n", "is damaged (could not convert string to float: 'many')"),
        ("100.0,1000,0,1,1,1,1,1,k\n", "has no name, calls or time"),
        ("100.0,nan,1,1,1,1,1,1,k\n", "has no name, calls or time"),
        ("100.0,1000,1,1,1,1,1,1,\n", "has no name, calls or time"),
        ('100.0,1000,1,1,1,1,1,1,"k\n', "is neither JSON nor CSV"),
        ("", "has no table of kernels"),
        ("100.0,0,1,1,1,1,1,1,k\n", "what ran has 0.0 ms in all"),
    ],
)
def test_a_damaged_row_is_refused(judge, row, says):
    """The error shows the row; no row is skipped."""
    assert says in refusal(judge, HEADING + row)


def test_cut_and_mangled_names_have_a_notice(judge):
    """The base-name mode of nsys shows FlashAttention-3 as device_kernel; mangled names match no rule."""
    summary = judge("Time (%),Total Time (ns),Instances,Name\n50.0,10,1,device_kernel\n50.0,10,1,_ZN5flash3fwdEv\n")
    assert summary.unclassified.time_share == 1.0
    assert any("names are cut down to the function" in notice for notice in summary.notices)
    assert any("c++filt" in notice for notice in summary.notices)
