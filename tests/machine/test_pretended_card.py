"""A card that only NVML knows, as in a container without the driver's CUDA: what asks NVML goes its whole way, and what
needs the card says that it is not there."""

from __future__ import annotations

import pytest
import torch

from harness.machine.doctor.survey import CUDA_DRIVER, cannot_load

H100 = {"0.name": "NVIDIA H100 80GB HBM3", "0.uuid": "GPU-1", "driver": "580.1", "0.total": 80 << 30, "0.used": 1 << 30}
CAMPAIGN = """
    import os, json
    from pathlib import Path
    from benchmarks.gpu import __main__ as door, campaign, page, report
    from harness.machine import provenance
    provenance._torch_cuda = lambda: "13.0"
    folder = Path({folder!r})
    page.REPORTS, page.PAGE = folder / "reports", folder / "gpu.md"
    page.PAGE.write_text(page.BEGIN + page.END)
    codes = [
        campaign.main(door.variables_of(os.environ, None), ["--state", str(folder / "state"), "--only", "doctor"])
        for _ in range(2)
    ]
    kept = json.loads(next(page.REPORTS.glob("*_nvidia-h100-80gb-hbm3_gpu/campaign.json")).read_text())
    tell([codes, kept["driver"], [(one["step"], one["outcome"], one["unit"]) for one in kept["steps"]],
          sorted({{one["verdict"] for one in kept["claims"]}}), page.PAGE.read_text()])
"""
CUDA_BUILD = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")


def test_a_campaign_names_the_card_and_decides_only_what_it_saw(nvml, tmp_path):
    """The step is kept and not taken again, no claim is decided by it, and the page has a column for the card."""
    codes, driver, steps, verdicts, text = nvml(CAMPAIGN.format(folder=str(tmp_path)), H100)
    assert (codes, driver, verdicts) == ([0, 0], "580.1", ["not decided"])
    assert steps == [["doctor", "done", "GPU-1"]]
    assert "[NVIDIA H100 80GB HBM3, " in text


def test_the_doctor_asks_for_more_than_nvml(nvml):
    """What NVML shows is looked for with the loader, too; without NVML there is nothing to look for."""
    lines = """
        from pathlib import Path
        from harness.machine.doctor.survey import survey
        found = survey(Path(), look_s=0.0)
        tell([found.card.known, found.lacks_driver])
    """
    assert nvml(lines, H100) == [True, cannot_load(CUDA_DRIVER)]
    assert nvml(lines, driver="none") == [False, None]


@CUDA_BUILD
def test_a_zygote_beside_such_a_card_forks_and_its_child_says_what_is_missing(nvml):
    """torch counts the card by NVML, and finds no driver when it first uses it: no number could come of that."""
    lines = """
        import subprocess, sys
        from harness.run.executors.local import worker_environment
        done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.forked"], env=worker_environment(1),
                              capture_output=True, text=True, check=True)
        tell(json.loads(done.stdout.splitlines()[-1]))
    """
    found = nvml(lines, H100)
    assert (len(found["threads"]), found["refuses_to_fork"]) == (1, None)
    assert "NVIDIA driver" in found["child"]["error"]
