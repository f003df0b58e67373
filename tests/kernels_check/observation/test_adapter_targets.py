"""Each name that is asked for must match something; what PEFT adds by itself is not asked for."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DeepseekV3Config, LlamaConfig

from kernels_check.observation.adapter_targets import layers_left_to_experts, unmatched_names

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture
def instrument():
    """Nothing is watched."""
    return "profile"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, []),
        ({"target_modules": ["q_proj", "qurey"]}, ["target_modules 'qurey'"]),
        ({"target_modules": ["self_attn.q_proj", "mlp.q_proj"]}, ["target_modules 'mlp.q_proj'"]),
        ({"target_modules": r".*\.(q|k)_proj"}, []),
        ({"target_modules": "all-linear"}, []),
        ({}, []),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, []),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, ["target_modules 'k_proj'"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, []),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, ["modules_to_save 'lm_haed'"]),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1]}}, []),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, []),
        ({"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}, []),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight", "up_proj.weigth"]},
            ["target_parameters 'up_proj.weigth'"],
        ),
    ],
)
def test_a_name_that_matches_nothing_is_found(training, options, missing):
    """One name among others that match, of every field that holds names."""
    run = training(quant=None, adapter=lambda: peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    assert unmatched_names(run.model) == missing


def test_the_head_of_a_task_is_asked_for_by_nobody():
    """PEFT lists two names for it, of which a model has one."""
    base = AutoModelForSequenceClassification.from_config(LlamaConfig(num_labels=2, pad_token_id=0, **SIZES))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}
    assert unmatched_names(model) == []


ATTENTION = ["q_a_proj", "kv_b_proj"]
LOST = [
    f"target_modules {asked} (PEFT makes target_parameters {made!r} of it in models of this type)"
    for asked, made in (("'down_proj'", "down_proj"), ("'gate_proj' and 'up_proj'", "gate_up_proj"))
]


def deepseek(dense, **options):
    """Of two layers, as many dense as given; the others have experts."""
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    sizes |= {"topk_group": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    config = DeepseekV3Config(first_k_dense_replace=dense, v_head_dim=8, **SIZES, **sizes)
    base = AutoModelForCausalLM.from_config(config)
    if dense > 2:  # nothing there is of a name of experts
        for layer in base.model.layers:
            layer.mlp = torch.nn.Identity()
    return peft.get_peft_model(base, peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    ("dense", "options", "missing"),
    [
        (1, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}, []),
        (1, {"target_modules": "all-linear"}, []),
        (2, {"target_modules": ATTENTION}, []),
        (2, {"target_modules": [*ATTENTION, "down_proj"]}, LOST[:1]),
        (2, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}, LOST),
        (2, {"target_modules": r".*(q_a_proj|mlp\.(gate|up|down)_proj)"}, LOST),
        (2, {"target_modules": "all-linear"}, LOST),
        (3, {"target_modules": "all-linear"}, []),
        (3, {"target_modules": [*ATTENTION, "down_proj"]}, ["target_parameters 'down_proj'"]),
        (
            1,
            {"target_modules": ATTENTION, "target_parameters": ["dwon_proj", "down_proj"]},
            ["target_parameters 'dwon_proj'"],
        ),
        (3, {"target_modules": "all-linear", "target_parameters": ["dwon_proj"]}, ["target_parameters 'dwon_proj'"]),
    ],
)
def test_what_peft_takes_for_experts_is_asked_for_only_where_somebody_did(dense, options, missing):
    """Dense layers lose their adapter to experts that a model has not; names that "all-linear" adds are nobody's."""
    assert unmatched_names(deepseek(dense, **options)) == missing


def test_layers_that_are_left_to_experts_are_named():
    """The dense layer and the shared expert of a model whose experts are adapted; none where nobody asked for these."""
    asked = [*ATTENTION, "down_proj"]
    assert layers_left_to_experts(deepseek(1, target_modules=asked)) == [
        "base_model.model.model.layers.0.mlp.down_proj",
        "base_model.model.model.layers.1.mlp.shared_experts.down_proj",
    ]
    assert layers_left_to_experts(deepseek(1, target_modules=ATTENTION)) == []
    assert layers_left_to_experts(deepseek(2, target_modules=asked)) == []


def test_only_adapters_in_use_are_asked(training):
    """An adapter that rests may have been misspelt without harm."""
    run = training(quant=None)
    run.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj", "qurey"], task_type="CAUSAL_LM"))
    run.model.set_adapter("default")
    assert unmatched_names(run.model) == []
    run.model.set_adapter("other")
    assert unmatched_names(run.model) == ["target_modules 'qurey'"]


def test_an_adapter_without_a_peft_model_is_asked_too():
    """`inject_adapter_in_model` leaves the configuration on the model; a prompt has no targets."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "7"]), base)
    assert unmatched_names(model) == ["target_modules '7'"]
    assert unmatched_names(torch.nn.Linear(2, 2)) == []
