"""What of a base is compared before and after, and what counts as a change."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from kernels_check.controls.small_run import fourbit
from kernels_check.observation.adapter_layers import adapter_layers
from kernels_check.observation.digest import Digest, Hashed, digest


def _digest(sharded=(), **parts):
    return Digest(parts=parts, total_bytes=1, unseen={}, sharded=frozenset(sharded), packed=False)


def _hashed(fingerprint, **more):
    return Hashed(fingerprint=fingerprint, **{"owner": "a", **more})


def test_a_part_that_comes_or_goes_has_changed():
    """Only what is the same is no change."""
    one, other = _digest(a=_hashed("1")), _digest(a=_hashed("2"))
    assert one.since(one).changed == ()
    assert one.since(other).changed == one.since(_digest()).changed == _digest().since(one).changed == ("a",)


def test_what_is_not_saved_with_the_model_is_told_apart():
    """A forward makes it anew."""
    change = _digest(a=_hashed("1", kind="cache")).since(_digest(a=_hashed("2", kind="cache")))
    assert (change.changed, change.caches) == ((), ("a",))


def test_only_a_cast_is_a_cast():
    """The same values in another type; other values in another type have changed."""
    model = nn.Linear(4, 4)
    before = digest(model)
    model.bias.data = model.bias.data.bfloat16()
    change = digest(model).since(before)
    assert (change.changed, change.cast) == ((), ("bias",))
    model.bias.data = (model.bias.data + 1).half()
    assert digest(model).since(before).changed == ("bias",)


def test_what_is_gone_has_changed():
    """Memory that was freed is not read for a comparison."""
    model = nn.Linear(4, 4, bias=False)
    before = digest(model)
    gone = model.weight.data
    model.weight.data = model.weight.data.bfloat16()
    gone.untyped_storage().resize_(0)
    assert digest(model).since(before).changed == ("weight",)


EPS = torch.finfo(torch.float32).eps


def _apart(count, units):
    """Ones, of which the first few differ by so many units in the last place."""
    other = torch.ones(64)
    other[:count] += units * EPS
    return torch.ones(64), other


@pytest.mark.parametrize(
    ("one", "other", "kind", "rounded"),
    [
        (*_apart(1, 4), "merged", True),
        (*_apart(64, 1), "merged", True),
        (*_apart(1, 5), "merged", False),
        (*_apart(64, 2), "merged", False),
        (*_apart(1, 4), "parameter", False),
        (torch.ones(2), torch.ones(1, 2), "merged", False),
        (torch.ones(2).long(), torch.ones(2).long(), "merged", False),
        (torch.ones(0), torch.ones(0), "merged", False),
    ],
)
def test_only_what_a_merge_leaves_is_rounded(one, other, kind, rounded):
    """Of a weight that was merged: four units of the largest at most, and one in the mean."""
    before = _digest(a=_hashed(digest(_holding(one)).parts["a"].fingerprint, kind=kind, tensor=one))
    change = _digest(a=_hashed("other", kind=kind, tensor=other)).since(before)
    assert (change.rounded, change.changed) == ((("a",), ()) if rounded else ((), ("a",)))


def _holding(value):
    model = nn.Module()
    model.a = nn.Parameter(value, requires_grad=False)
    return model


def test_what_was_written_in_place_has_changed():
    """Its memory, compared with itself, would be the same, and memory that was reused is no witness."""
    weight = torch.ones(64)
    before = _digest(a=_hashed(digest(_holding(weight)).parts["a"].fingerprint, kind="merged", tensor=weight))
    weight += 1
    assert _digest(a=_hashed("other", kind="merged", tensor=weight)).since(before).changed == ("a",)
    assert _digest(a=_hashed("other", kind="merged", tensor=weight.clone())).since(before).changed == ("a",)


def test_a_part_is_read_where_it_lay_before():
    """On that kind of device; where nothing lay anywhere, where it is."""
    model = nn.Linear(2, 2)
    meta = {"weight": Hashed(fingerprint="1", tensor=torch.ones(2, 2, device="meta")), "bias": Hashed(fingerprint="2")}
    found = digest(model, _digest(**meta))
    assert (set(found.unseen), found.parts.keys()) == ({"weight"}, {"bias"})


def test_a_torn_layer_is_named():
    """Its weight lies otherwise than its state says; one that is whole is not."""
    model = nn.Sequential(fourbit(nn.Linear(64, 64, bias=False), quant_type="nf4"), nn.Linear(2, 2), nn.ReLU())
    found = digest(model)
    assert (found.torn, found.packed, found.sharded) == ({}, False, frozenset())
    model[0].weight.quant_state.packing_format_for_cpu = True
    found = digest(model)
    assert (found.torn.keys(), found.packed) == ({"0"}, True)
    assert "laid out anew for AVX512" in found.torn["0"]


def test_a_buffer_is_told_by_its_name():
    """What is not there is none."""
    found = _digest(a=_hashed("1", kind="buffer"), b=_hashed("1"))
    assert [found.is_buffer(name) for name in "abc"] == [True, False, False]


def test_a_shard_is_not_compared_with_a_whole():
    """They are different bytes of the same tensor."""
    change = _digest(sharded=("a",), **{"a._local_tensor": _hashed("1")}).since(_digest(a=_hashed("2")))
    assert change.incomparable == ("a", "a._local_tensor")
    assert change.changed == ()


STATE = {
    "absmax": lambda state: state.absmax.__setitem__(0, state.absmax[0] ^ 1),
    "offset": lambda state: state.offset.add_(1e-3),
    "code": lambda state: state.code.__setitem__(3, 0.5),
    "state2.absmax": lambda state: state.state2.absmax.mul_(1.01),
    "state2.code": lambda state: state.state2.code.__setitem__(3, 0.5),
    "blocksize": lambda state: setattr(state, "blocksize", 128),
    "dtype": lambda state: setattr(state, "dtype", torch.float16),
    "shape": lambda state: setattr(state, "shape", torch.Size([64, 256])),
    "quant_type": lambda state: setattr(state, "quant_type", "fp4"),
}


@pytest.mark.parametrize("part", STATE)
def test_every_part_of_a_quantised_weights_state_counts(training, part):
    """In each of them lies what the weight is when it is unpacked."""
    run = training()
    layer = adapter_layers(run.model)[1]
    before = digest(run.model)
    STATE[part](layer.base.weight.quant_state)
    assert digest(run.model).since(before).changed == (f"{layer.name}.base_layer.quant_state.{part}",)


@pytest.mark.parametrize("holder", ["weight", "layer"])
def test_a_state_has_one_name_wherever_it_is_kept(training, holder):
    """On the parameter or on its layer."""
    run = training()
    before = digest(run.model)
    for layer in adapter_layers(run.model):
        (layer.base if holder == "weight" else layer.base.weight).quant_state = None
    assert digest(run.model).since(before).changed == ()


def test_the_first_forward_of_int8_changes_nothing():
    """It moves the scales and the integers from the weight to the state of its layer."""
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    holder = nn.Sequential(layer.to("cpu"))
    before = digest(holder)
    holder(torch.randn(2, 64))
    assert layer.state.SCB is not None
    assert layer.weight.SCB is None
    assert {"0.weight", "0.SCB", "0.CB"} == before.parts.keys()
    assert digest(holder).since(before).changed == ()
    layer.state.SCB[3] += 1
    assert digest(holder).since(before).changed == ("0.SCB",)


def test_integers_apart_from_their_weight_are_seen():
    """LLM.int8 multiplies with those of its state, whatever the weight is."""
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    holder = nn.Sequential(layer.to("cpu"))
    holder(torch.randn(2, 64))
    before = digest(holder)
    layer.state.CB = layer.state.CB.clone()
    assert digest(holder).since(before).changed == ()
    layer.state.CB[0, 0] ^= 1
    assert digest(holder).since(before).changed == ("0.CB",)


def test_what_cannot_be_read_is_named():
    """And nothing else is lost by it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.LazyLinear(2))
    found = digest(model)
    assert found.parts.keys() == {"0.weight", "0.bias"}
    assert set(found.unseen) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert "meta" in found.unseen["1.weight"]


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_a_sparse_parameter_is_compared(layout):
    """By its values and where they are."""
    model = nn.Module()
    model.weight = nn.Parameter(getattr(torch.eye(3), layout)(), requires_grad=False)
    before = digest(model)
    assert digest(model).since(before).changed == ()
    values = model.weight.detach()
    (values._values() if layout == "to_sparse" else values.values()).mul_(2)
    assert digest(model).since(before).changed == ("weight.values",)


def test_a_partition_of_deepspeed_is_what_lies_here():
    """The parameter itself is empty between two forwards."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_tensor = torch.ones(8)
    model.weight.data = torch.empty(0)
    before = digest(model)
    assert before.total_bytes == 32
    model.weight.ds_tensor[3] += 1
    assert digest(model).since(before).changed == ("weight",)


def test_nothing_of_a_base_is_left_out_and_nothing_of_an_adapter_is_in(training):
    """Tied weights count once; what is quantised brings its scales."""
    model = nn.Sequential(nn.Embedding(33, 33), nn.Linear(33, 33, bias=False))
    model[1].weight = model[0].weight
    assert digest(model).total_bytes == 4 * 33 * 33
    names = digest(training().model).parts
    assert not any("lora_" in name for name in names)
    assert any(name.endswith("quant_state.state2.absmax") for name in names)


def test_buffers_of_an_adapter_are_no_base():
    """VeRA keeps its projections in buffers."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.VeraConfig(r=2, target_modules=["0"]))
    assert all(name.endswith(("base_layer.weight", "base_layer.bias")) for name in digest(model).parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes two kinds of device")
@pytest.mark.parametrize("back", [False, True])
def test_what_only_moved_to_another_device_has_not_changed(back):
    """It is read where it lay before, since each kind of device has fingerprints of its own."""
    places = ("cuda", "cpu") if back else ("cpu", "cuda")
    model = nn.Linear(300, 300).to(places[0])
    before = digest(model)
    model.to(places[1])
    assert digest(model, before).since(before).changed == ()
    with torch.no_grad():
        model.weight[7, 7] += 1
    assert digest(model, before).since(before).changed == ("weight",)
