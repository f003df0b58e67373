"""Each name that is asked for must match something; what PEFT adds by itself is not asked for."""

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
)

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


def deepseek_config(dense):
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    sizes |= {"topk_group": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    return DeepseekV3Config(first_k_dense_replace=dense, v_head_dim=8, **SIZES, **sizes)


def deepseek(dense, **options):
    """Of two layers, as many dense as given; the others have experts."""
    base = AutoModelForCausalLM.from_config(deepseek_config(dense))
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


def test_a_model_that_adapters_were_put_into_is_asked_as_one_that_was_wrapped():
    """As libraries do that wrap nothing and keep the configurations at the model itself."""
    config = peft.LoraConfig(r=2, target_modules=["q_a_proj"], target_parameters=["down_proj"])
    found = []
    for dense in (1, 2):
        base = AutoModel.from_config(deepseek_config(dense))
        peft.inject_adapter_in_model(config, base)
        base.peft_config = {"default": config}
        found.append((unmatched_names(base), layers_left_to_experts(base)))
    left = ["layers.0.mlp.down_proj", "layers.1.mlp.shared_experts.down_proj"]
    assert found == [([], left), (LOST[:1], [])]


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


class Projections(torch.nn.Module):
    """A model of a type that PEFT knows, with one of the layers it would choose."""

    def __init__(self):
        super().__init__()
        self.config, self.q_proj = PhiConfig(), torch.nn.Linear(4, 4)


def test_what_peft_chose_by_the_type_of_the_model_was_asked_for_by_nobody():
    """Its table lists four names, of which this model has one; the same names misspelt were asked for."""
    model = peft.get_peft_model(Projections(), peft.LoraConfig(r=2))
    chosen = model.peft_config["default"].target_modules
    assert len(chosen) > 1
    assert unmatched_names(model) == []
    model.peft_config["default"].target_modules = [*chosen, "qurey"]
    assert "target_modules 'qurey'" in unmatched_names(model)


@pytest.mark.parametrize("asked", ["all-linear", frozenset({"0"})])
def test_what_asks_for_no_single_name_needs_any_layer(asked):
    """The word for every linear layer, and collections that PEFT's matching does not take."""
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    model.peft_config["default"].target_modules = asked
    assert unmatched_names(model) == []


@pytest.mark.parametrize("inject", [False, True])
def test_a_pattern_is_asked_of_the_names_that_peft_matched(inject):
    """Those within the model that was wrapped: of a model that keeps its layers in one called ``model``, with that."""
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    config = peft.LoraConfig(r=2, target_modules=r"model\.layers\.\d\.self_attn\.q_proj")
    model = peft.inject_adapter_in_model(config, base) if inject else peft.get_peft_model(base, config)
    assert unmatched_names(model) == []


def test_the_head_of_a_task_is_asked_for_where_the_task_is_another():
    """PEFT adds it for classification alone: by any other it was asked for by name."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["score"], task_type="FEATURE_EXTRACTION")
    assert unmatched_names(peft.inject_adapter_in_model(config, base)) == ["modules_to_save 'score'"]
