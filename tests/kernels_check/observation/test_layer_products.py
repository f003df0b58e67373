"""A product is a layer's if it ran in a call of it."""

import bitsandbytes as bnb
from torch import nn

from kernels_check.observation.calls import Calls, ModuleCall
from kernels_check.observation.layer_products import LayerProducts, fourbit_layers, products_of
from kernels_check.observation.products import Product


def calls(*made):
    """Calls by name and number of the caller; ``again`` marks one of the backward pass, ``reference`` one without."""
    every = []
    for name, caller, *words in made:
        with_grad = "reference" not in words
        entry = {"training": True, "with_grad": with_grad, "in_backward": "again" in words, "thread": 0}
        every.append(ModuleCall(names=(name,), caller=caller, **entry))
    return Calls(all=tuple(every), thread=0)


def product(call=None, dtype="bfloat16", *, compiled=False):
    return Product(op="aten::mm", dtype=dtype, call=call, compiled=compiled)


def attributed(logged, *products, layers=("a.0.q",)):
    return products_of({layer: (layer,) for layer in layers}, nn.Identity(), logged, products)


def test_a_product_is_that_of_the_calls_around_it():
    """At any depth; one outside of all calls is the model's only if it was compiled."""
    logged = calls(("", None), ("a.0.q", 0), ("a.0.q.inner", 1), ("a.0.k", 0))
    mine, deep, others = product(1), product(2), product(0)
    nobodys, compiled = product(), product(compiled=True)
    inside = product(3, compiled=True)
    found = attributed(logged, mine, deep, others, nobodys, compiled, inside)
    assert found.by_layer == {"a.0.q": (mine, deep)}
    assert found.compiled == (compiled,)
    assert found.without == found.passed_by == ()


def test_a_reference_proves_nothing():
    """Its calls record no gradients, where others do."""
    logged = calls(("", None), ("a.0.q", 0), ("", None, "reference"), ("a.0.q", 2, "reference"))
    found = attributed(logged, product(3), product())
    assert (found.by_layer, found.without) == ({}, ("a.0.q",))


def test_a_call_without_a_product_is_told():
    """Of the forward pass: a recomputation may end before it."""
    logged = calls(("", None), ("a.0.q", 0), ("a.0.q", 0))
    assert attributed(logged, product(1)).without == ("a.0.q",)
    again = calls(("", None), ("a.0.q", 0), ("a.0.q", None, "again"))
    assert attributed(again, product(1)).without == ()


def test_a_layer_is_passed_by_where_its_block_ran_and_its_like_in_another_did():
    """What is in no other block, or whose block was not called, is not missed."""
    logged = calls(("", None), ("a.0", 0), ("a.0.q", 1), ("a.1", 0))
    found = attributed(logged, product(2), layers=("a.0.q", "a.1.q", "a.1.k", "a.2.q"))
    assert found.passed_by == ("a.1.q",)
    assert found.names == ["a.0.q", "a.1.q"]


def test_in_what_a_layer_computed():
    """By its own products; by what all compiled code agrees on where it called none and is not known to lack one."""
    own, other = product(1, None), product(compiled=True)
    found = LayerProducts(by_layer={"q": (own, product(1))}, compiled=(other,), without=("k",), passed_by=("v",))
    assert found.dtypes("q") == ["unknown", "bfloat16"]
    assert found.dtypes("o") == ["bfloat16"]
    assert found.dtypes("k") == found.dtypes("v") == []
    both = LayerProducts(by_layer={}, compiled=(other, product(dtype=None, compiled=True)))
    assert both.dtypes("o") == []
    assert LayerProducts(by_layer={}, compiled=(product(dtype=None, compiled=True),)).dtypes("o") == ["unknown"]


def test_a_4_bit_layer_is_linear_and_has_a_4_bit_weight():
    """An embedding calls no product, and what holds a 4-bit layer has no weight of its own."""
    model = nn.ModuleDict({
        "linear": bnb.nn.Linear4bit(4, 4),
        "plain": nn.Linear(4, 4),
        "tokens": bnb.nn.EmbeddingNF4(64, 64),
    })  # fmt: skip
    assert fourbit_layers(model) == {"linear": ("linear",)}
