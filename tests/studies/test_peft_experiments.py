"""Tests of PEFT's own experiments as a study."""

from __future__ import annotations

import json

import pytest

from lorameter.errors import UsageError
from lorameter.studies.peft_experiments import study_of_experiments
from lorameter.studies.variant import FullVariant, PeftVariant

DEFAULTS = {
    "model_id": "random:tiny-llama", "dtype": "bfloat16", "max_seq_length": 64, "batch_size": 4, "batch_size_eval": 50,
    "max_steps": 50, "eval_steps": 25, "compile": False, "use_gc": False, "seed": 0, "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}, "lr_scheduler": "cosine",
    "use_amp": False, "autocast_adapter_dtype": True, "attn_implementation": None, "generation_kwargs": {},
    "query_template": "Question: {query}", "init_kv_cache_prefix": None,
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": 32, "inference_mode": False, "peft_version": "0.1", "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path):
    def write(place, name, content):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).write_text(json.dumps(content))

    write(".", "default_training_params.json", DEFAULTS)
    write("experiments/lora/rank32", "adapter_config.json", LORA)
    write("experiments/lora/rank32-fa", "adapter_config.json", LORA)
    fa = {"optimizer_type": "lora-fa", "optimizer_kwargs": {"lr": 3e-4, "r": 32, "lora_alpha": 64}}
    write("experiments/lora/rank32-fa", "training_params.json", fa)
    write("experiments/ia3/default", "adapter_config.json", {"peft_type": "IA3"})
    write("experiments/ia3/default", "training_params.json", {"optimizer_kwargs": {"lr": 5e-3}, "batch_size": 2})
    write("experiments/full/lr", "training_params.json", {"autocast_adapter_dtype": False})
    return tmp_path


def test_every_experiment_is_a_variant_with_its_own_parameters(folder):
    """Parameters of the experiment override the defaults, and torch's own default of AdamW is kept."""
    study = study_of_experiments(str(folder))
    assert [one.name for one in study.variants] == ["full--lr", "ia3--default", "lora--rank32", "lora--rank32-fa"]
    assert study.reference == "lora--rank32"
    full, ia3, plain, fa = study.variants
    assert isinstance(full, FullVariant)
    assert (full.learning_rate, full.weight_decay) == (1e-4, 0.1)
    assert isinstance(ia3, PeftVariant)
    assert (ia3.learning_rate, ia3.weight_decay) == (5e-3, 0.01)
    assert plain.peft == {"peft_type": "LORA", "r": 32, "target_modules": ["q_proj"]}
    assert (plain.schedule, plain.warmup_ratio, plain.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert (fa.optimizer, fa.optimizer_args) == ("lora-fa", {"r": 32, "lora_alpha": 64})
    assert (study.workload.layout, study.workload.sequence_length) == ("bucketed", 64)
    assert study.workloads == {"ia3--default": {"batch_size": 2}}


def test_globs_select_and_quality_trains_all_steps(folder):
    """Without `quality` the study times a few tens of steps."""
    assert len(study_of_experiments(str(folder), ["lora/*"]).variants) == 2
    every = study_of_experiments(str(folder)).variants
    assert len(study_of_experiments(str(folder), ["!lora/*"]).variants) == len(every) - 2
    assert len(study_of_experiments(str(folder), ["lora/*", "!*/rank32"]).variants) == 1
    study = study_of_experiments(str(folder), ["*/rank32"], quality=True)
    assert study.protocol.all_steps(study.workload.train_sequences, study.workload.batch_size) == 50
    assert study_of_experiments(str(folder)).protocol.epochs == 0


@pytest.mark.parametrize(
    ("select", "params", "expected"),
    [
        ("lora/rnk32", {}, "Did you mean 'lora/rank32'?"),
        ("*", {"batchsize": 2}, "Did you mean 'batch_size'?"),
        ("!*", {}, "nothing is left"),
        ("*", {"use_amp": True}, "gradients are not scaled here"),
    ],
)
def test_unknown_names_and_settings_are_refused(folder, select, params, expected):
    """An unknown name, an unknown key and an unsupported setting are refused."""
    (folder / "experiments/lora/rank32/training_params.json").write_text(json.dumps(params))
    with pytest.raises(UsageError, match=expected.replace("?", r"\?")):
        study_of_experiments(str(folder), [select])
