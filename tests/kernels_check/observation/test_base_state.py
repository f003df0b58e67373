"""What belongs to a base is named by its kind, wherever a library keeps it."""

from types import SimpleNamespace

import peft
import torch
from torch import nn

from kernels_check.observation.base_state import base_state, beside


def kinds(model):
    return {part.name: part.kind for part in base_state(model)}


def test_weights_that_peft_merges_into_are_told_from_all_others():
    """Of attention whose forward calls no layer: both weights, but neither their biases nor what lies beside them."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    plain = kinds(model)
    assert set(plain.values()) == {"parameter"}
    found = kinds(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn"])))
    merged = {name.removeprefix("base_model.model.") for name, kind in found.items() if kind == "merged"}
    assert merged == {"attn.base_layer.in_proj_weight", "attn.base_layer.out_proj.base_layer.weight"}
    assert len(found) == len(plain)


def test_what_a_packed_layer_keeps_in_attributes_is_its_state():
    """Tensors, and dictionaries of them; what is private, and what a layer keeps that packs nothing, is not."""
    kept = {"scale": torch.ones(2), "zero": torch.zeros(2), "bits": 4}
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    plain = nn.Linear(2, 2)
    for layer in (packed, plain):
        layer.meta, layer._private, layer.offsets, layer.bits = kept, dict(kept), torch.zeros(3), 4
    assert {key for key, _ in beside(packed)} == {"meta.scale", "meta.zero", "offsets"}
    assert list(beside(plain)) == []


class Sharded(nn.Linear):
    """Keeps what FSDP2 keeps of its parameters: in one group, in several, or in none."""

    def _get_fsdp_state(self):
        return self.fsdp_state


def shard(module, name):
    info = SimpleNamespace(module=module, shared_modules=[], param_name=name, shared_param_names=[])
    kept = SimpleNamespace(_module_info=info, sharded_param=torch.full((1,), 7.0))
    return SimpleNamespace(fsdp_params=[kept])


def read(**state):
    layer = Sharded(2, 2)
    groups = {"weight": shard(layer, "weight"), "bias": shard(layer, "bias"), "none": None}
    held = {
        key: [groups[name] for name in names] if isinstance(names, list) else groups[names]
        for key, names in state.items()
    }
    layer.fsdp_state = SimpleNamespace(**held)
    return {part.name: part.value.numel() for part in base_state(layer)}


def test_the_shards_of_a_parameter_are_read_and_not_the_whole():
    """However many groups of them this version of torch keeps; a module without a group has nothing sharded."""
    assert read(_fsdp_param_groups=["weight", "bias"]) == {"weight": 1, "bias": 1}
    assert read(_fsdp_param_group="weight") == {"weight": 1, "bias": 2}
    assert read(_fsdp_param_groups=[], _fsdp_param_group="bias") == {"weight": 4, "bias": 1}
    assert read(_fsdp_param_groups=["none", "weight"]) == {"weight": 1, "bias": 2}
    assert read(_fsdp_param_group="none") == {"weight": 4, "bias": 2}
