"""Bits are counted from the bytes that are there; what cannot be read is unknown, with the reason."""

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

from kernels_check.controls.small_run import fourbit
from kernels_check.observation.fourbit import layout_problem
from kernels_check.observation.module_tree import ModelTree
from kernels_check.observation.storage import read_storage, read_wrapped, storage_in


def _quantised(dtype=torch.float32):
    return fourbit(nn.Linear(128, 64, bias=False, dtype=dtype), quant_type="nf4")


class Packed(torch.Tensor):
    """A tensor that calls itself float32 and keeps integers and scales, as those of torchao do."""

    @staticmethod
    def __new__(cls, data, scale, shape):
        """Wrap the two."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, data, scale, shape):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        """What it is made of."""
        return ["data_", "scale"], tuple(self.shape)

    @staticmethod
    def __tensor_unflatten__(inner, shape, size, stride):
        """Put it together."""
        return Packed(inner["data_"], inner["scale"], shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Detaching is all it can do."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale, args[0].shape)
        raise NotImplementedError(str(func))


class Broken(Packed):
    """One that cannot be taken apart."""

    def __tensor_flatten__(self):
        """Not written yet."""
        raise NotImplementedError


class Opaque(torch.Tensor):
    """One that does not say what it is made of."""

    @staticmethod
    def __new__(cls):
        """Wrap nothing."""
        return torch.Tensor._make_wrapper_subclass(cls, (8,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Detaching is all it can do."""
        return cls()


def _layer(weight, **attributes):
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    vars(layer).update(attributes)
    return layer


def _integers(name, words, dtype=torch.int32, **attributes):
    """A layer of another library: integers in a buffer, and what the layer says of them."""
    layer = nn.Module()
    layer.register_buffer(name, torch.zeros(words, dtype=dtype))
    vars(layer).update(attributes)
    return layer


@pytest.mark.parametrize(
    ("dtype", "bits", "kind"),
    [
        (torch.float64, 64, "none"),
        (torch.float32, 32, "none"),
        (torch.bfloat16, 16, "none"),
        (torch.float8_e4m3fn, 8, "float8_e4m3fn"),
        (torch.float8_e5m2, 8, "float8_e5m2"),
    ],
)
def test_floats_are_what_their_type_is(dtype, bits, kind):
    """Eight bits of float are no int8, and no plain base either."""
    stored = read_storage(_layer(torch.zeros(4, 4).to(dtype)))
    assert (stored.bits, stored.quant_type) == (bits, kind)


@pytest.mark.parametrize(("data", "bits"), [(torch.int8, 8), (torch.uint8, 4)])
def test_a_tensor_is_what_it_is_made_of(data, bits):
    """Not what it calls itself."""
    kept = torch.zeros(8, 8 * bits // 8, dtype=data)
    weight = Packed(kept, torch.ones(8), (8, 8))
    assert weight.dtype == torch.float32
    stored = read_storage(_layer(weight))
    assert (stored.bits, stored.quant_type, stored.compute_dtype) == (bits, f"int{bits}", "float32")
    assert stored.bits_per_weight == bits + 4
    assert "Packed" in stored.note


def test_what_cannot_be_taken_apart_is_unknown():
    """By whatever class, and nothing raises."""
    stored = read_storage(_layer(Broken(torch.zeros(8), torch.ones(1), (8,))))
    assert stored.bits is None
    assert "cannot be read: NotImplementedError" in stored.problem
    opaque = read_storage(_layer(Opaque()))
    assert opaque.bits is None
    assert "it has no memory" in opaque.problem
    odd = read_storage(_layer(Packed(torch.zeros(7, dtype=torch.uint8), torch.ones(1), (8,))))
    assert odd.bits is None


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        (_integers("qweight", (64 // 8, 32), bits=4, in_features=64, out_features=32), 4),
        (_integers("qweight", (64 // 4, 32), bits=8, infeatures=64, outfeatures=32), 8),
        (_integers("qweight", (64, 32 // 8), w_bit=4, in_features=64, out_features=32), 4),
        (_integers("W_q", (64 * 32 // 2, 1), torch.uint8, meta={"nbits": 4, "shape": (32, 64)}), 4),
    ],
    ids=["GPTQ", "GPTQ in 8 bits", "AWQ", "HQQ"],
)
def test_integers_of_other_libraries_are_what_layer_and_bytes_say(layer, bits):
    """Both, or nothing: a claim that the bytes do not bear is none."""
    assert read_storage(layer).bits == bits
    name = "qweight" if "qweight" in layer._buffers else "W_q"
    layer.register_buffer(name, layer._buffers[name].repeat(2, 1))
    stored = read_storage(layer)
    assert stored.bits is None
    assert f"{bits} for each of" in stored.problem


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (_integers("qweight", (8, 8)), "does not say of how many bits"),
        (_integers("qweight", (8, 8), bits=4), "does not say of how many bits"),
        (_integers("qweight", (8, 8), in_features=8, out_features=64), "does not say of how many bits"),
        (_layer(Packed(torch.zeros(8, device="meta"), torch.ones(1), (8,))), "holds no bytes here"),
        (_integers("blocks", (8, 8)), "how it keeps its weight is not known"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
        (nn.LazyLinear(2), "no shape yet"),
        (bnb.nn.Linear4bit(4, 4, device="meta"), "not quantised"),
        (bnb.nn.Linear4bit(64, 64), "not quantised"),
        (SimpleNamespace(weight=1), "is not known"),
        (None, "is not known"),
    ],
    ids=[
        "unsaid",
        "no sizes",
        "no bits",
        "parts on meta",
        "another name",
        "meta",
        "lazy",
        "4-bit on meta",
        "4-bit not yet",
        "no tensor",
        "no layer",
    ],
)
def test_the_unknown_is_unknown(layer, words):
    """With its reason."""
    stored = read_storage(layer)
    assert stored.bits is None
    assert words in stored.problem


def test_embeddings_and_convolutions_are_read():
    """Not only linear layers carry adapters."""
    assert read_storage(bnb.nn.EmbeddingNF4(64, 128).to("cpu")).bits == 4
    assert read_storage(bnb.nn.Embedding8bit(64, 64).to("cpu")).bits == 8
    assert read_storage(nn.Embedding(4, 4)).bits == read_storage(nn.Conv2d(1, 1, 1)).bits == 32
    assert read_storage(nn.MultiheadAttention(4, 2)).bits == 32
    assert read_storage(nn.MultiheadAttention(4, 2, kdim=3)).bits == 32


class Experts(nn.Module):
    """Two experts whose weights are one parameter, without a layer of their own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 64, 64))
        self.down = nn.Parameter(torch.randn(2, 64, 64).bfloat16())

    def forward(self, hidden):
        """Nothing is computed here."""
        return hidden


def _tuned_experts():
    base = nn.Sequential(Experts(), nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["1"], target_parameters=["0.up", "0.down"])
    return peft.get_peft_model(base, config).base_model.model[0]


def test_a_targeted_parameter_is_read_as_what_it_is():
    """PEFT wraps the layer once for each of its parameters."""
    outer = _tuned_experts()
    bits = {layer.parameter_name: read_wrapped(layer).bits for layer in (outer, outer.base_layer)}
    assert bits == {"up": 32, "down": 16}


def test_a_parameter_that_is_unpacked_at_each_access_is_read_packed():
    """bitsandbytes quantises parameters without a layer by a parametrisation."""
    experts = Experts()
    replace_parameter_4bit(experts, "up", compress_statistics=True)
    stored = read_storage(experts, "up")
    assert (stored.bits, stored.quant_type, stored.double_quant) == (4, "nf4", True)
    assert read_storage(experts, "down").bits == 16


def test_a_weight_that_was_unpacked_is_a_float():
    """Whatever state its layer still has."""
    layer = _quantised()
    layer.weight = nn.Parameter(torch.zeros(64, 128), requires_grad=False)
    stored = read_storage(layer)
    assert (stored.bits, stored.quant_type) == (32, "none")


def test_packed_bytes_may_be_stored_as_floats():
    """As FSDP wants them, in one type with the rest."""
    layer = fourbit(nn.Linear(128, 64, bias=False), quant_type="nf4")
    layer.weight.data = layer.weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
    assert read_storage(layer).bits == 4


def test_a_weight_may_be_a_plain_attribute():
    """As PEFT leaves it in the projection of an attention for the time of a forward."""
    layer = nn.Linear(4, 4)
    weight = layer.weight.data.bfloat16()
    del layer.weight
    layer.weight = weight
    assert read_storage(layer).bits == 16


def test_a_shard_is_read_by_the_state_of_its_layer():
    """A parameter that a library registered anew has lost its class and its state."""
    layer = _quantised()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert read_storage(layer).bits == 4


LIES = {
    "quant_state is of shape": lambda layer: setattr(layer.weight.quant_state, "shape", torch.Size([128, 64])),
    "quant_state describes": lambda layer: setattr(layer.weight.quant_state, "shape", torch.Size([64, 64])),
    "bytes of uint8 scales": lambda layer: setattr(layer.weight.quant_state, "blocksize", 128),
    "was quantised in blocks of 128": lambda layer: setattr(layer.weight, "blocksize", 128),
    "quantised in blocks of 64, bitsandbytes takes 256": lambda layer: setattr(
        layer.weight.quant_state.state2, "blocksize", 64
    ),
    "of fp4, the weight of nf4": lambda layer: setattr(layer.weight.quant_state, "quant_type", "fp4"),
    "the code of quant_state is not that of nf4": lambda layer: layer.weight.quant_state.code.add_(0.1),
    "no code of 16 values": lambda layer: setattr(layer.weight.quant_state, "code", None),
    "the offset of the scales is None": lambda layer: setattr(layer.weight.quant_state, "offset", None),
    "the offset of the scales is not theirs": lambda layer: layer.weight.quant_state.offset.zero_(),
    "with it a scale is nan": lambda layer: layer.weight.quant_state.offset.fill_(torch.nan),
    "states of another dtype": lambda layer: setattr(layer, "quant_state", _quantised(dtype=torch.float16).quant_state),
    "hold different scales": lambda layer: setattr(layer, "quant_state", _quantised().quant_state),
    "laid out anew for AVX512 and the weight is not": lambda layer: setattr(
        layer.weight.quant_state, "packing_format_for_cpu", True
    ),
    "4097 bytes for 8192 weights": lambda layer: setattr(
        layer.weight, "data", torch.cat([layer.weight.data, layer.weight.data[:1]])
    ),
    "the offset of the scales is tensor": lambda layer: setattr(
        layer.weight.quant_state, "offset", layer.weight.quant_state.offset.repeat(2)
    ),
    "the weight has the layout": lambda layer: setattr(layer.weight, "data", layer.weight.data.view(64, 64)),
}


@pytest.mark.parametrize("words", LIES)
def test_a_state_that_is_not_its_weights_is_found(words):
    """Of another layer, of another layout, or of nobody."""
    layer = _quantised()
    assert read_storage(layer).problem is None
    LIES[words](layer)
    stored = read_storage(layer)
    assert stored.bits is None
    assert words in stored.problem


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("weights", ["normal", "zeros", "one large", "ascending"])
def test_a_sound_state_has_no_problem(double, weights):
    """Whatever the values: scales of nothing, and one that is a thousand times the others."""
    linear = nn.Linear(256, 512, bias=False)
    value = linear.weight.data
    if weights == "zeros":
        value.zero_()
    elif weights == "one large":
        value[0, 0] = 1000
    elif weights == "ascending":
        value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
    assert read_storage(fourbit(linear, quant_type="nf4", double=double)).problem is None


@pytest.mark.parametrize("other", [copy.copy, lambda state: None])
def test_a_layer_need_not_hold_the_state_of_its_weight_itself(other):
    """A copy says the same, and none says nothing."""
    layer = _quantised()
    layer.quant_state = other(layer.weight.quant_state)
    assert read_storage(layer).problem is None


@pytest.mark.parametrize(
    ("shape", "weight", "packed", "words"),
    [
        ((4, 4), (8, 1), True, "and the weight is not"),
        ((4, 4), (4, 2), True, None),
        ((4, 4), (8, 1), False, None),
        ((4, 4), (8,), False, "the weight has the layout (8,)"),
        ((4, 3), (6, 1), True, "and the weight is not"),
        ((4, 2), (4, 1), True, None),
        ((2, 4, 4), (16, 1), True, None),
    ],
)
def test_a_layout_is_told_from_another_where_they_differ(shape, weight, packed, words):
    """Rows of one byte look the same in both, and only what has two dimensions is ever laid out anew."""
    state = SimpleNamespace(shape=torch.Size(shape), packing_format_for_cpu=packed)
    problem = layout_problem(None, torch.zeros(weight, dtype=torch.uint8), state)
    assert (problem is None) if words is None else words in problem


@pytest.mark.parametrize(
    ("scales", "words"), [(None, "no scales for 4 rows of int8"), (3, "3 scales for 4 rows of int8"), (4, None)]
)
def test_int8_takes_a_scale_a_row(scales, words):
    """Wherever it is kept; without them the integers are no weights."""
    layer = bnb.nn.Linear8bitLt(8, 4, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(4, 8), requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    layer.weight.SCB = None if scales is None else torch.ones(scales)
    stored = read_storage(layer)
    assert (stored.bits, stored.problem) == ((8, None) if words is None else (None, words))


def test_int8_that_was_not_quantised_yet_is_what_it_is():
    """Its class says nothing of its bytes."""
    assert read_storage(bnb.nn.Linear8bitLt(8, 4, bias=False, has_fp16_weights=False)).bits == 32


@pytest.mark.parametrize(("words", "bits"), [(320, None), (319, 4), (256, 4), (255, None)])
def test_integers_may_be_stored_with_less_than_a_bit_more(words, bits):
    """What a library pads; what a layer calls its shape is not asked where it says its sizes."""
    layer = _integers("qweight", (words,), bits=4, in_features=64, out_features=32, shape=(1, 1))
    assert read_storage(layer).bits == bits


@pytest.mark.parametrize(
    ("data", "shape", "bits"),
    [
        (torch.zeros(8, 8), (8, 8), 32),
        (torch.zeros(8, 8, dtype=torch.float64), (8, 8), None),
        (torch.zeros(8, 8).bfloat16(), (8, 8), 16),
        (torch.zeros(4, 8), (8, 8), 16),
        (torch.zeros(4, dtype=torch.uint8), (3,), None),
        (torch.zeros(16, 8, dtype=torch.uint8), (8, 8), None),
    ],
)
def test_parts_are_believed_as_far_as_they_fit(data, shape, bits):
    """In whole bits, no more than what it calls itself would take, and of integers four or eight."""
    stored = read_storage(_layer(Packed(data, torch.ones(0), shape)))
    assert stored.bits == bits
    assert (stored.problem is None) is (bits is not None)


def test_a_type_that_backward_passes_go_through_is_noted():
    """Where it is another than that of the products."""
    layer = _quantised()
    layer.compute_dtype = torch.bfloat16
    stored = read_storage(layer)
    assert (stored.compute_dtype, "dequantises to float32 first" in stored.note) == ("bfloat16", True)
    layer.compute_dtype = torch.float32
    assert read_storage(layer).note is None
    layer.compute_dtype = None
    assert read_storage(layer).compute_dtype is None


def test_a_layer_that_several_ask_for_is_read_once():
    """Each of its parameters by itself."""
    model = nn.Linear(4, 4)
    tree = ModelTree.of(model)
    assert storage_in(tree, model) is storage_in(tree, model)
    assert storage_in(tree, model, "bias") is not storage_in(tree, model)
