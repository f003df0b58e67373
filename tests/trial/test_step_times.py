"""Steps and requests of a whole model are foretold from two of its layers."""

from __future__ import annotations

import json

import pytest

from lorameter.models import catalogue
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.step_times import LAYERS, shorten_config, time_parts


@pytest.fixture
def times(tmp_path):
    """A function that gives the times of a variant on the small model with so many layers."""

    def measure(layers, **variant):
        config = json.loads(catalogue.CATALOGUE["tiny-llama"].config.read_text()) | {"num_hidden_layers": layers}
        for name in ("model", "scratch"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        workload = Workload(model=f"random:{tmp_path / 'model'}", sequence_length=32, batch_size=2, new_tokens=4)
        request = TrialRequest(
            trial="t", variant=LoraVariant(name="one", r=4, **variant), role="variant", replicate=0, seed=1,
            workload=workload, protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu",
            threads=1, tokens_path="", scratch=str(tmp_path / "scratch"), log_path="",
        )  # fmt: skip
        return time_parts(request).values

    return measure


@pytest.mark.parametrize("variant", [{}, {"quantization": "nf4", "gradient_checkpointing": True}])
def test_each_part_takes_longer_the_more_layers_there_are(times, variant):
    """Forward, backward and the tokens of a request; 60 layers take several times as long as two."""
    few, many = times(LAYERS, **variant), times(60, **variant)
    assert few.keys() == many.keys() == {"load", "step", "evaluate", "request"}
    for part in ("step", "evaluate", "request"):
        assert many[part] > 4 * few[part] > 0, part


def test_a_shortened_configuration_lists_two_layers():
    """By any name, nested or not; what is no list of layers stays."""
    config = {"n_layer": 4, "layer_types": ["a", "b", "a", "b"], "architectures": ["Some"], "vocab_size": 7}
    short = {"n_layer": 2, "layer_types": ["a", "b"], "architectures": ["Some"], "vocab_size": 7}
    assert shorten_config(config, 4) == short
    assert shorten_config({"text_config": config, "kept": 1}, 4) == {"text_config": short, "kept": 1}
