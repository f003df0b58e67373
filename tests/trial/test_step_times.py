"""Tests of step and request times of a whole model, estimated from two of its layers."""

from __future__ import annotations

import json

from lorameter.models import catalogue
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.step_times import LAYERS, shorten_config, time_parts


def measure(folder, layers):
    """Return the times of a variant on the small model with the given number of layers."""
    config = json.loads(catalogue.CATALOGUE["tiny-llama"].config.read_text()) | {"num_hidden_layers": layers}
    for name in ("model", "scratch"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    workload = Workload(model=f"random:{folder / 'model'}", sequence_length=32, batch_size=2, new_tokens=4)
    request = TrialRequest(
        trial="t", variant=LoraVariant(name="one", r=4, quantization="nf4", gradient_checkpointing=True),
        role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(), interleaving="replicates",
        measures=("steps",), device="cpu", threads=1, tokens_path="", scratch=str(folder / "scratch"), log_path="",
    )  # fmt: skip
    return time_parts(request).values


def test_times_grow_with_the_number_of_layers(tmp_path):
    """Step, evaluation and request of 60 layers take several times as long as with two."""
    few, many = (measure(tmp_path, layers) for layers in (LAYERS, 60))
    assert few.keys() == many.keys() == {"load", "step", "evaluate", "request"}
    for part in ("step", "evaluate", "request"):
        assert many[part] > 4 * few[part] > 0, part


def test_a_shortened_configuration_lists_two_layers():
    """Lists of layers are shortened under any key, nested or not; other lists stay."""
    config = {"n_layer": 4, "layer_types": ["a", "b", "a", "b"], "architectures": ["Some"], "vocab_size": 7}
    short = {"n_layer": 2, "layer_types": ["a", "b"], "architectures": ["Some"], "vocab_size": 7}
    assert shorten_config(config, 4) == short
    assert shorten_config({"text_config": config, "kept": 1}, 4) == {"text_config": short, "kept": 1}
