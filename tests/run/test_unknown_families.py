"""Tests of a model with unknown layers: nothing is refused on a guess, and unknown values are reported as unknown."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.run.feasibility import check_feasible

CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 100, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
"""A width that is not a multiple of 64, as a linear layer in 4 bits would need."""
SENTENCE = "the linear layers of model type 'mixtral' are not known"
REMEDY = "add an entry for it to harness/lorameter/models/families.py"


@pytest.fixture
def model(tmp_path):
    """The model's name in a study."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return f"random:{tmp_path}"


@pytest.fixture
def study(small_study, model):
    """A small study on this model."""
    return dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, model=model))


def test_unknown_families_are_not_refused(study, machine):
    """Memory, widths and ranks are not checked; one notice has what is unknown and the remedy."""
    tiny = dataclasses.replace(machine, memory_bytes=1)
    wide = dataclasses.replace(
        study, variants=(*study.variants, dataclasses.replace(study.variants[0], name="r", r=999))
    )
    (layers, weights) = check_feasible(wide, tiny)
    assert (layers.code, weights.code) == ("layers-unknown", "random-weights")
    assert SENTENCE in layers.message
    assert REMEDY in layers.message


def test_a_dry_run_gives_the_reason(model, capsys, tmp_path):
    """Unknown numbers are null in JSON, with the reason; the time is that of its steps."""
    assert main(["run", "lora-or-qlora", "--dry-run", "--json", "--model", model, "--runs-dir", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["time_s"] > 0
    assert document["memory_bytes"] is document["disk_bytes"] is None
    assert SENTENCE in document["unknown"]


def test_sizes_are_counted_by_peft_and_noted_as_unconfirmed(tmp_path, capsys):
    """Sizes are counted without a formula, and a note says that no formula confirmed them."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ["list", "sizes", "llama2-lora-parameters", "--model", f"random:{tmp_path}"]
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "32,768" in shown  # r 64, two blocks, 64 in and 192 out
    assert "the linear layers of model type 'gpt2' are not known" in shown
    assert main([*line, "--json"]) == 0
    assert "'gpt2'" in json.loads(capsys.readouterr().out)["unknown"]
