"""Tests of what a worker must be able to do before it measures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorameter.errors import InvalidRunError
from lorameter.records.worker_info import WorkerInfo
from lorameter.run.prepare import validate_worker
from lorameter.studies.variant import LoraVariant

PLAIN = LoraVariant(name="plain")
LACKS = "bitsandbytes has loaded its library for CPUs"


@pytest.fixture
def worker(machine):
    """A function that makes the executor of a worker with the given description."""

    def make(**fields):
        hello = WorkerInfo(**{"harness": "1.0", "import_time_s": 1.0, "device": "cpu", "torch": "0"} | fields)
        return SimpleNamespace(hello=lambda: hello, machine=lambda: machine)

    return make


@pytest.mark.parametrize(
    "changes", [{"quantization": "nf4"}, {"quantization": "int8"}, {"optimizer": "paged_adamw_32bit"}]
)
def test_a_variant_that_needs_bitsandbytes_is_refused_where_it_has_no_device(worker, changes):
    """The error names the variant before its first trial; variants without bitsandbytes are measured."""
    needing = LoraVariant(name="needing", **changes)
    with pytest.raises(InvalidRunError, match=f"needing cannot be measured here: {LACKS}"):
        validate_worker(worker(lacks=LACKS), [PLAIN, needing])
    assert validate_worker(worker(lacks=LACKS), [PLAIN]).lacks == LACKS
    assert validate_worker(worker(), [PLAIN, needing]).lacks is None


def test_a_worker_on_another_device_is_refused(worker):
    """The plan was made for one device."""
    with pytest.raises(InvalidRunError, match="'cuda' and the plan was made for 'cpu'"):
        validate_worker(worker(device="cuda"), [PLAIN])
