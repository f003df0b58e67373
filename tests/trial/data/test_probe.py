"""Data whose readers die of it: a refusal that names it, whoever looks; and files that say one text without end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lorameter.errors import UsageError
from lorameter.run.executors.local import LocalExecutor
from lorameter.studies.workload import Workload
from lorameter.trial.data.records import describe_data

SPOILT = Path(__file__).with_name("spoilt")
"""Data sets of a few rows, a few bytes of which were changed: of most the library dies."""


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A folder of each of them."""
    folder = tmp_path_factory.mktemp("spoilt")
    for packed in sorted(SPOILT.iterdir()):
        (folder / packed.name).mkdir()
        for name, text in json.loads(packed.read_text()).items():
            (folder / packed.name / name).write_bytes(text.encode("latin-1"))
    return folder


@pytest.mark.parametrize("name", ["ends-by-SIGSEGV", "ends-by-SIGBUS", "ends-by-SIGABRT", "nested-too-deeply"])
def test_a_spoilt_data_set_is_refused_by_its_name(spoilt, name):
    """The process that looked is gone, or has read what is no text: what lies behind a spoilt offset is chance. This
    one is not gone."""
    data = str(spoilt / name)
    with pytest.raises(UsageError, match=rf"data '{data}'(, row \d+)?: cannot be read: .*ave it again"):
        describe_data(Workload(data=data, held_out_records=1))


def test_data_that_the_tokens_die_of_is_refused_by_its_name(spoilt, tmp_path, small_study):
    """Of what was not looked at before: it lies behind the first records."""
    data = str(spoilt / "ends-by-SIGSEGV")
    local = LocalExecutor()
    local.start(tmp_path, 1)
    try:
        with pytest.raises(UsageError, match=rf"data '{data}'(, row \d+)?: .*([Rr]estore it|ave it again)"):
            local.prepare_tokens(Workload(model=small_study.workload.model, data=data, held_out_records=1))
    finally:
        local.close()


@pytest.fixture
def bomb(tmp_path):
    """A file of less than a kilobyte in which 2000 records have one text of 1 MiB."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), ["x" * (1 << 20)])
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 1000
    return path


PEAK = """
import resource, sys
import pyarrow.parquet
from lorameter.errors import UsageError
from lorameter.studies.workload import Workload
from lorameter.trial.data.records import look_here, read_records
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
try: (look_here if sys.argv[1] == "look" else read_records)(Workload(data=sys.argv[2], held_out_records=1))
except UsageError as error: print(error)
print(peak() - before)
"""


@pytest.mark.parametrize("what", ["look", "read"])
def test_a_file_that_says_one_text_without_end_takes_no_memory(bomb, what):
    """Of looking a few records, of reading what any file may unpack to: then it is refused."""
    done = subprocess.run([sys.executable, "-c", PEAK, what, bomb], capture_output=True, text=True, check=True)
    *refused, peak_bytes = done.stdout.splitlines()
    assert int(peak_bytes) < {"look": 200 << 20, "read": 700 << 20}[what]
    assert bool(refused) == (what == "read")
    assert all("more than 256 MiB of text, over 1000 times what its files hold" in line for line in refused)
