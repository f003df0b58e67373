"""The range of `estimate --gpu` is the one that the published peaks support."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.machine import provenance
from lorameter.models.costs.memory import PEAK_RANGES, PUBLISHED_PEAKS, PUBLISHED_WITHIN


def _module():
    """The script next to this test."""
    spec = spec_from_file_location("published", Path(__file__).with_name("published.py"))
    module = sys.modules["published"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published = _module()


@pytest.fixture(scope="module")
def rows():
    """Every published peak with its estimate."""
    return published.read_rows()


def test_the_range_is_derived_from_the_published_peaks(rows):
    """The constants are those that the script prints, and at least 95 % of the peaks lie within."""
    low, high = published.supported_range(rows)
    assert (low, high) == PEAK_RANGES["cuda"]
    counted = [row.ratio for row in rows if row.one_length]
    within = sum(low <= ratio <= high for ratio in counted)
    assert (within, len(counted)) == (PUBLISHED_WITHIN, PUBLISHED_PEAKS)
    assert within >= 0.95 * len(counted)


def test_the_command_s_range_covers_a_published_peak(rows, capsys, tmp_path, monkeypatch, machine):
    """A peak of Llama-2-7B by litgpt lies in the range of the command for the same settings."""
    monkeypatch.setattr(provenance, "probe_machine", lambda environment=None: machine)
    study = tmp_path / "study.toml"
    study.write_text(
        'title = "t"\n[workload]\nmodel = "random:llama2-7b"\nbatch_size = 2\nsequence_length = 1304\n'
        '[[variant]]\nname = "lora"\nr = 8\ntarget_modules = ["q_proj", "v_proj"]\nlora_dropout = 0.05\n'
        'adapter_dtype = "bfloat16"\nattention = "flash_attention_2"\noptimizer = "adamw"\n'
    )
    assert main(["estimate", f"{study}:lora", "--gpu", "40GiB", "--json", "--runs-dir", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    peak = (
        next(row.peak for row in rows if row.settings == "2 × 1304") + document["train"]["outside_allocator"]["context"]
    )
    needs, error = document["fit"]["needs"], document["fit"]["error"]
    assert needs["low_bytes"] <= peak <= needs["high_bytes"]
    assert needs["high_bytes"] == int(needs["expected_bytes"] * (1 + error["high"]))
    assert f"{PUBLISHED_WITHIN} of {PUBLISHED_PEAKS} published peaks" in error["basis"]
