"""Tests of several GPUs in NVML, with a scripted driver library."""

from __future__ import annotations

import pytest

from tests.machine.two_gpus import MIG, TWO

VISIBLE = """
    from lorameter.machine.gpus import visible_gpus
    report([
        [one.entry, one.name.value, one.board.value, one.power_limit_w.value, one.name.reason]
        for one in visible_gpus().value
    ])
"""
FIRST = ["First", "GPU-aaaa1111-0000-0000-0000-000000000000", 700.0, ""]
SECOND = ["Second", "GPU-aaaa2222-0000-0000-0000-000000000000", 400.0, ""]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [[0, *FIRST], [1, *SECOND]]),
        ("MIG-bbbb,0", [["MIG-bbbb", "Second MIG 1g.10gb", *SECOND[1:]], [0, *FIRST]]),
        ("", []),
        ("7", [[7, None, None, None, "nvmlDeviceGetHandleByIndex: there is no such device"]]),
    ],
)
def test_each_visible_gpu_is_known_by_any_of_its_names(nvml, visible, expected):
    """A MIG instance has its own name, and its parent GPU gives the power limit."""
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvml(VISIBLE, {**MIG, "1.limit": 400000}, **variables) == expected


SITES = """
    import dataclasses
    from lorameter.errors import UsageError
    from lorameter.machine import provenance
    from lorameter.run.workers.local import LocalExecutor
    from lorameter.run.sites import gpus
    provenance._torch_cuda = lambda: "13.0"
    gpus.share_cpus = lambda cpus, sites, requested: [[0]] * sites  # however many this machine has
    machine = provenance.probe_machine()
    try:
        shares = gpus.local_shares(("0", "1"), machine, mixed=MIXED)
        facts = [LocalExecutor(host=share.host).facts() for share in shares]
        report([[one.machine.device_name, one.settings["gpu"]["power_limit_w"]] for one in facts])
    except UsageError as refused:
        report(str(refused))
"""


def test_sites_of_different_gpus_are_refused(nvml):
    """The error has name and power limit; where mixing is allowed each site knows its own GPU."""
    uuids = {"CUDA_VISIBLE_DEVICES": "GPU-aaaa2,GPU-aaaa1"}
    answers = {**TWO, "1.limit": 400000}
    refused = nvml(SITES.replace("MIXED", "False"), answers, **uuids)
    assert "GPUs of different kinds (First at 700 W, Second at 400 W)" in refused
    alike = {**answers, "1.name": "First", "0.limit": 400000}
    assert nvml(SITES.replace("MIXED", "False"), alike, **uuids) == [["First", 400.0]] * 2
    assert nvml(SITES.replace("MIXED", "True"), answers, **uuids) == [["Second", 400.0], ["First", 700.0]]
