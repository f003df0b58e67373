"""The default study with Llama-2-7B on a real card: both bases run what they claim, and the report is kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[1]


def test_llama2_7b_in_bf16_and_in_nf4_writes_a_report(tmp_path):
    """Random weights of the exact shape: every trial ok, every required path active, tables under reports/."""
    command = [sys.executable, "-m", "harness.cli"]
    measured = subprocess.run(
        [*command, "run", "lora-or-qlora", "--model", "random:llama2-7b", "--variant", "lora-r16", "--variant",
         "qlora-nf4-r16", "--phase", "train", "--phase", "generate", "--runs-dir", str(tmp_path), "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    document = json.loads(measured.stdout)
    text = subprocess.run(
        [*command, "report", document["path"], "--runs-dir", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    ).stdout  # fmt: skip
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    kept = ROOT / "reports" / f"{time.strftime('%Y-%m-%d')}_{device}_lora-or-qlora-llama2-7b"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "report.txt").write_text(text, encoding="utf-8")  # also of a run that failed: it says why
    for path in (*Path(document["path"]).glob("*.json"), *Path(document["path"]).glob("*.jsonl")):
        shutil.copy(path, kept / path.name)
    assert set(document["trials"]) == {"ok"}, text
    assert measured.returncode in (0, 4), text  # 4: only its control, which fails by chance in at most 5 % of runs
    for words in ("lora-r16", "qlora-nf4-r16", "GiB] GPU", "active"):
        assert words in text
