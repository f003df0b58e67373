"""Tests of `lorameter estimate`: the memory of a variant without loading it, next to the peak of an earlier run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.machine import provenance
from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import estimate_memory
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import Arm
from lorameter.studies.study_file import load_study

ROOT = Path(__file__).parents[2]


class Document(dict):
    """A JSON object with its keys as attributes."""

    __getattr__ = dict.get


def test_the_estimate_is_compared_with_an_earlier_run(capsys, small_study, write_run, tmp_path, monkeypatch, machine):
    """The measured value is the largest peak of that variant and workload on this machine."""
    monkeypatch.setattr(provenance, "probe_machine", lambda environment=None: machine)
    monkeypatch.setattr(
        "lorameter.commands.setup.load_variant", lambda spec, **_: (small_study, small_study.variants[0])
    )
    write_run("earlier", {"plain": [1.0, 1.0]}, peak=10**9)
    assert main(["estimate", "small:plain", "--runs-dir", str(tmp_path / "runs"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["train"]
    assert document["measured_bytes"] == 10**9
    assert document["error"] == pytest.approx(document["total_bytes"] / 10**9 - 1)
    assert main(["estimate", "small:plain", "--runs-dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "measured peak" in shown
    assert "953.7" in shown  # MiB
    assert f"{document['error']:+.1%}" in shown


def test_clear_misfits_are_refused_and_doubtful_ones_get_a_warning(machine):
    """The estimate refuses or warns before the run, with the memory that other processes leave free."""
    study = load_study("lora-or-qlora").with_overrides(model="random:llama2-7b")
    variant = study.variants[0]
    shape = shapes.shape(catalogue.resolve(study.workload.model))
    needed = estimate_memory(variant, study.workload, shape).needed_bytes

    def notices(share, free=None):
        small = dataclasses.replace(machine, memory_bytes=int(needed * share))
        return [
            notice.code
            for notice in check_feasible(study, small, [Arm(variant=variant, workload=study.workload)], free_bytes=free)
        ]

    assert "memory-short" not in notices(1.2)
    assert "memory-short" in notices(1.0)
    with pytest.raises(UsageError, match=f"{variant.name}.*needs about .* this machine has"):
        notices(0.8)
    for share, taken in ((1.2, False), (1.0, True), (None, False)):
        assert ("memory-taken" in notices(2.0, share and int(needed * share))) is taken


WIDE = """
title = "Wide"
[workload]
model = "random:llama2-7b"
sequence_length = 1024
batch_size = 6
[[variant]]
name = "lora"
r = 16
[[variant]]
name = "qlora"
r = 16
quantization = "nf4"
gradient_checkpointing = true
"""


@pytest.fixture
def estimated(capsys, tmp_path, monkeypatch, machine):
    """A function that runs the estimate for a study of Llama-2-7B with six sequences of 1024 tokens, on a machine
    without a GPU, and returns the document."""
    monkeypatch.setattr(provenance, "probe_machine", lambda environment=None: machine)
    monkeypatch.setattr(provenance, "free_bytes", lambda machine, environment=None: 6 * 2**30)
    (tmp_path / "wide.toml").write_text(WIDE)

    def run(variant, *options):
        spec = f"{tmp_path / 'wide.toml'}:{variant}" if ":" not in variant else variant
        arguments = ["estimate", spec, *options, "--json", "--runs-dir", str(tmp_path / "runs")]
        assert main(arguments) == 0
        return json.loads(capsys.readouterr().out, object_hook=Document)

    return run


def test_a_4_bit_base_with_checkpointing_fits_on_32_gib(estimated):
    """On a machine without a GPU the estimates are for a GPU and contain no host process."""
    lora, qlora = estimated("lora", "--gpu", "32GiB"), estimated("qlora", "--gpu", "32GiB")
    assert (lora.device, lora.fit.status, qlora.fit.status) == ("cuda", "does-not-fit", "fits")
    assert "process" not in lora.train.kinds
    assert lora.fit.turn == ["gradient_checkpointing = true"]
    assert (qlora.fit.turn, qlora.fit.largest) == ([], [])
    fit = qlora.fit
    assert fit.needs.expected_bytes == qlora.train.total_bytes + qlora.train.outside_allocator["context"]
    assert fit.spare_bytes == fit.device.usable_bytes - fit.needs.high_bytes >= 0


def test_a_model_with_unknown_layers_has_no_fit_estimate(estimated, tmp_path):
    """A model with unknown layers has no estimate of its fit, and a notice gives the reason."""
    config = json.loads((ROOT / "harness" / "lorameter" / "models" / "llama2-7b.json").read_text())
    config = config.get("config", config) | {"model_type": "unheard-of"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    estimate = estimated("lora", "--model", f"random:{tmp_path}", "--gpu", "24GiB", "--max-batch")
    assert estimate.fit is None
    assert "unknown" in estimate.notices[0]


@pytest.mark.parametrize("text", ["A100", "nonsense", "24", "0GiB", "-1GiB", "1e30GiB", "9" * 5000 + "GiB", ""])
def test_an_invalid_gpu_is_refused_before_the_study_is_read(text, capsys, monkeypatch):
    """An invalid --gpu is refused before the study is read and the machine is probed."""
    monkeypatch.setattr(provenance, "probe_machine", lambda environment=None: pytest.fail("asked"))
    assert main(["estimate", "no-such-study", f"--gpu={text}"]) == 2
    said = capsys.readouterr().err
    assert "--gpu" in said
    assert len(said) < 500
