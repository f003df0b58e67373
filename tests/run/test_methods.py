"""Tests of PEFT methods and full fine-tuning, measured through the command line with their checks."""

from __future__ import annotations

import json

import pytest

from lorameter.cli import main
from lorameter.models import methods
from lorameter.records import store
from lorameter.trial.building import method_probe

STUDY = """
[workload]
model = "random:tiny-llama"
layout = "bucketed"
sequence_length = 32
train_sequences = 64

[protocol]
replicates = 1
turns = 1
allow_disturbed = true
warmup_steps_max = 3

[[variant]]
name = "lora"
optimizer = "lora+"
optimizer_args = { loraplus_lr_ratio = 16 }

[[variant]]
name = "ia3"
quantization = "nf4"
autocast = "bfloat16"
peft = { peft_type = "IA3" }

[[variant]]
name = "prompt"
optimizer = "Adafactor"
peft = { peft_type = "PROMPT_TUNING", num_virtual_tokens = 4 }

[[variant]]
name = "adalora"
peft = { peft_type = "ADALORA", tinit = 2, tfinal = 2 }

[[variant]]
name = "vera"
peft = "VERA"

[[variant]]
name = "full"
method = "full"
"""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_known_of_methods(tmp_path_factory):
    """Use an empty cache, so that the methods are probed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMETER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(folder, text, *options):
    path = folder / "methods.toml"
    path.write_text(text)
    return main(["run", str(path), "--runs-dir", str(folder / "runs"), *options])


def test_methods_train_with_their_checks(tmp_path, capsys):
    """Each method has a learning adapter and a frozen base; in full fine-tuning the base learns."""
    saved = tmp_path / "adapter_config.json"
    saved.write_text(json.dumps({"peft_type": "VERA", "r": 16, "inference_mode": True, "peft_version": "0.1"}))
    assert run(tmp_path, STUDY.replace('"VERA"', f'"{tmp_path}"'), "--interleave", "replicates") == 0
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    records = {one.name: one for one in store.read_run(str(folder), tmp_path / "runs").records if one.checks}
    assert set(records) == {"lora", "ia3", "prompt", "adalora", "vera", "full"}
    for name, record in records.items():
        found = {check["path"]: check["status"] for check in record.checks}
        wanted = ["base.learning"] if name == "full" else ["peft.attached", "peft.learning", "base.frozen"]
        assert [found[path] for path in wanted] == ["active"] * len(wanted), name
    assert records["full"].values["trainable_parameters"] > 10 * records["lora"].values["trainable_parameters"]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ('peft = { peft_type = "VERRA" }', "has no such method. Did you mean VERA?"),
        ('peft = { peft_type = "VERA", rr = 4 }', "VeraConfig of PEFT "),
        ('peft = { peft_type = "ADALORA", init_r = 12 }\nmerge_adapter = 3', "merge_adapter"),
        ('optimizer = "Adafactr"', "Did you mean Adafactor?"),
        ('method = "full"\nquantization = "nf4"', "quantised weights do not train"),
        ('method = "full"\nr = 8', "full fine-tuning has no adapter"),
        ('peft = { peft_type = "IA3" }\nr = 8', "Write it there, as peft.r"),
        ('peft = "nowhere.json"', "Name an adapter_config.json or its folder"),
        ('optimizer = "lora+"\noptimizer_args = { lr_ratio = 16 }', "loraplus_lr_ratio"),
    ],
)
def test_invalid_methods_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, variant, message):
    """The error is one sentence with the closest valid word. Methods are probed in this process, which has imported
    PEFT."""
    monkeypatch.setattr(methods, "_probe", lambda variants: tuple(map(method_probe.probe, variants)))
    assert run(tmp_path, f'[workload]\nmodel = "random:tiny-llama"\n[[variant]]\nname = "one"\n{variant}\n') == 2
    assert message in " ".join(capsys.readouterr().err.split())
