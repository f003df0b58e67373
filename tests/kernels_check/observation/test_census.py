"""All bytes of a base are counted, each once, by the bits that their weights are kept in."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

from kernels_check.controls.small_run import fourbit
from kernels_check.judges import base_layers
from kernels_check.observation.census import take_census

FOUR_BIT = 64 * 64 // 2 + 64 * 4 + 16 * 4
"""Bytes of 64 x 64 weights: two a byte, a scale for each block of 64, and the code."""


def _quantised():
    return fourbit(nn.Linear(64, 64, bias=False), quant_type="nf4", double=False)


def test_scales_count_as_bytes_of_their_weights():
    """And a bias does not."""
    layer = _quantised()
    layer.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
    census = take_census(nn.Sequential(layer, nn.Linear(64, 64, bias=False)))
    assert census.bytes_of == {4: FOUR_BIT, 32: 64 * 4 + 64 * 64 * 4}
    assert census.weights_of == {4: 4096, 32: 64 + 4096}
    assert census.others(4) == [("1.weight (float32)", 16384), ("0.bias (float32)", 256)]


def test_shared_memory_counts_once():
    """A head tied to its embedding, and the integers of LLM.int8, which have two names."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert take_census(model).bytes_of == {32: 256}
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    census = take_census(nn.Sequential(layer.to("cpu")))
    assert census.bytes_of == {8: 64 * 64 + 64 * 4}
    assert census.weights_of == {8: 4096}


def test_a_list_of_layers_is_no_layer():
    """What its first layer keeps is that layer's."""
    census = take_census(nn.ModuleList([_quantised(), _quantised()]))
    assert census.bytes_of == {4: 2 * FOUR_BIT}


def test_what_is_not_saved_is_not_counted_nor_is_an_adapter():
    """A base is what is loaded."""
    base = nn.Sequential(nn.Linear(8, 8, bias=False))
    base.register_buffer("cache", torch.zeros(100), persistent=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=[]))
    assert take_census(model).bytes_of == {32: 256}


def test_layers_of_a_kind_are_one_line():
    """Their numbers are left out of the name."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(3)])})
    assert take_census(model).others(4) == [
        ("layers.*.up.weight (float32)", 3 * 256),
        ("layers.*.up.bias (float32)", 3 * 32),
    ]


def test_packed_integers_count_with_all_that_belongs_to_them():
    """As GPTQ keeps them, in buffers."""
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(64 // 8, 32, dtype=torch.int32))
    layer.register_buffer("qzeros", torch.zeros(2, 4, dtype=torch.int32))
    layer.register_buffer("scales", torch.zeros(2, 32, dtype=torch.float16))
    layer.register_buffer("g_idx", torch.zeros(64, dtype=torch.int32))
    layer.register_buffer("bias", torch.zeros(32, dtype=torch.float16))
    layer.bits, layer.in_features, layer.out_features = 4, 64, 32
    census = take_census(layer)
    assert census.bytes_of == {4: 1024 + 32 + 128 + 256, 16: 64}
    assert census.weights_of[4] == 64 * 32


def test_integers_that_nothing_explains_may_be_of_any_bits():
    """As a parameter, whose weights they may pack; counters and masks are what they are, and so is float8."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    layer.small = nn.Parameter(torch.zeros(32).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("positions", torch.arange(16))
    layer.register_buffer("mask", torch.ones(5, dtype=torch.bool))
    assert take_census(layer).bytes_of == {None: 64 * 64, 8: 32 + 5, 64: 16 * 8}


class Packed(torch.Tensor):
    """A tensor that calls itself float32 and keeps integers and their scales, as those of torchao do."""

    @staticmethod
    def __new__(cls, integers, scales):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scales):
        self.integers, self.scales = integers, scales

    def __tensor_flatten__(self):
        return ["integers", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Packed(**inner)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Detaching is all that it can do."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scales)
        raise NotImplementedError(str(function))


def test_a_tensor_that_is_made_of_others_counts_with_its_scales():
    """In the bits of its integers, of which there are as many as weights; what lies beside it counts by itself."""
    layer = nn.Module()
    integers = torch.zeros(16, 8, dtype=torch.int8)
    layer.weight = nn.Parameter(Packed(integers, torch.ones(16, 1)), requires_grad=False)
    layer.other = nn.Parameter(torch.zeros(100))
    census = take_census(layer)
    assert census.bytes_of == {8: 16 * 8 + 16 * 4, 32: 400}
    assert census.weights_of == {8: 16 * 8, 32: 100}


class Experts(nn.Module):
    """Experts whose weights are one parameter, which bitsandbytes does not quantise with the linear layers."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64).bfloat16())

    def forward(self, hidden):
        """All of them."""
        return torch.einsum("ri,eio->ro", hidden, self.gate_up_proj.to(hidden.dtype))


def _tuned(*layers):
    return peft.get_peft_model(nn.Sequential(*layers), peft.LoraConfig(r=2, target_modules="0"))


def test_experts_that_stayed_in_bfloat16_are_seen(seen):
    """Every targeted layer is in 4 bits, and most of the base is not."""
    model = _tuned(_quantised(), Experts())
    bits = base_layers.judge_bits(seen(model=model), 4).against("base.bits", 4)
    assert bits.met
    share = FOUR_BIT / (FOUR_BIT + 4 * 64 * 64 * 2)
    assert f"of the whole base {1 - share:.1%} of the bytes are not in 4 bits" in bits.reason
    assert "base_model.model.*.gate_up_proj (bfloat16) 32.0 KiB" in bits.reason
    judged = base_layers.judge_bytes_in_4bit(seen(model=model), 0.5).against("base.bytes_in_4bit", 0.5)
    assert judged.status == "fallback"
    assert judged.observed == pytest.approx(share, abs=1e-6)
    assert "(20.0% of the weights)" in judged.reason
    assert "the largest that are not: base_model.model.*.gate_up_proj (bfloat16) 32.0 KiB" in judged.reason
    assert base_layers.judge_bytes_in_4bit(seen(model=model), 0.06).against("base.bytes_in_4bit", 0.06).met


def test_quantised_experts_count(seen):
    """By a parametrisation, which is their layer then."""
    experts = Experts()
    replace_parameter_4bit(experts, "gate_up_proj", quant_type="nf4")
    judged = base_layers.judge_bytes_in_4bit(seen(model=_tuned(_quantised(), experts)), 1.0)
    assert judged.against("base.bytes_in_4bit", 1.0).met, judged.reason
    bits = base_layers.judge_bits(seen(model=_tuned(_quantised(), experts)), 4)
    assert "so is the whole base of" in bits.reason


def test_what_cannot_be_read_may_be_either(seen):
    """It decides nothing: a minimum above all that could be is missed, one below what was seen is met."""
    unread = nn.Module()
    unread.register_buffer("qweight", torch.zeros(FOUR_BIT // 4, dtype=torch.int32))
    unread.forward = lambda hidden: hidden
    model = _tuned(_quantised(), unread, nn.Linear(64, 64, bias=False))

    def judge(minimum):
        judged = base_layers.judge_bytes_in_4bit(seen(model=model), minimum)
        return judged.against("base.bytes_in_4bit", minimum).status

    least = FOUR_BIT / (2 * FOUR_BIT + 64 * 64 * 4)
    assert judge(0.9 * least) == "active"
    assert judge(1.5 * least) == "unknown"
    assert judge(2.5 * least) == "fallback"


def test_a_base_without_any_has_none(seen):
    """Required, it is absent; else it does not apply."""
    model = _tuned(nn.Linear(8, 8))
    found = base_layers.judge_bytes_in_4bit(seen(model=model), None)
    assert found.against("base.bytes_in_4bit", None).status == "not_applicable"
    assert base_layers.judge_bytes_in_4bit(seen(model=model), 0.1).against("base.bytes_in_4bit", 0.1).status == "absent"
