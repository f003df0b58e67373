"""Tests of a base that does not fit on the disk: the error is reported, and no part of the base is left."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.models import bases
from lorameter.records.os_errors import SystemLimitError
from lorameter.run.workers.local import LocalExecutor
from lorameter.studies.request import BaseRequest


def test_a_base_that_does_not_fit_is_refused(small_study, tiny_disk, tmp_path, monkeypatch):
    """A real process meets a full disk: the message has the remedy, and with free space the base is made."""
    home = tmp_path / "bases"
    monkeypatch.setenv(bases.ENV_BASES, str(home))
    workload = dataclasses.replace(small_study.workload, data_seed=501)  # no other test has made its base
    variant = small_study.variants[0]
    request = BaseRequest(workload=workload, variant=variant, device="cpu", threads=1, log_path="")
    ballast = tiny_disk(home, 512, 16 * 1024)
    executor = LocalExecutor()
    executor.start(tmp_path / "run", 1)
    try:
        executor.hello()
        with pytest.raises(
            SystemLimitError, match=r"the base tiny-llama, bfloat16: .*No space left on device\. Free space"
        ):
            executor.prepare_base(request)
        assert not list(home.glob("*/*"))
        ballast.unlink()
        assert executor.prepare_base(request).conversions == 1
    finally:
        executor.close()
