"""Tests that attention is attributed to the layers of the judged model, each of which must run the required backend."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels_check

WIDTH, HEADS, TOKENS = 32, 4, 6


def split(x):
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def fused(q, k, v):
    return joined(nn.functional.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True))


def written_out(q, k, v):
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return joined(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)


def written_out_in_three_dimensions(q, k, v):
    q, k, v = (split(x).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    return joined((scores.float().softmax(-1).to(v.dtype) @ v).unflatten(0, (-1, HEADS)))


def without_a_mask(q, k, v):
    q, k, v = split(q), split(k), split(v)
    return joined((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def by_exponential(q, k, v):
    """Compute attention without a softmax or a product."""
    q, k, v = split(q), split(k), split(v)
    weights = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1).exp().tril()
    return joined(((weights / weights.sum(-1, keepdim=True)).unsqueeze(-1) * v.unsqueeze(2)).sum(3))


def by_hand(q, k, v):
    """Compute attention that no operator shows."""
    weights = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).exp()
    return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2) / weights.sum(-1, keepdim=True)


class Attention(nn.Module):
    """One layer with the given computation."""

    def __init__(self, compute):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.compute = compute

    def forward(self, x):
        return x + self.compute(self.q(x), self.k(x), self.v(x))


class Other(Attention):
    """Another class in the same position."""


class Feed(nn.Module):
    """A layer without attention."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.up(x).relu()


class Block(nn.Module):
    """Optional attention and a feed-forward layer."""

    def __init__(self, attention):
        super().__init__()
        self.attn, self.mlp = attention, Feed()

    def forward(self, x):
        return self.mlp(x if self.attn is None else self.attn(x))


class Model(nn.Module):
    """Blocks in sequence."""

    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(*computed):
    return Model(*(Block(Attention(compute)) for compute in computed))


@pytest.fixture
def verified():
    """A function that returns the checks of a model by path; ``step`` takes the model and an input."""

    def verify(model, required="flash", step=None, path="attention.backend"):
        torch.manual_seed(0)
        x = torch.randn(2, TOKENS, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def plain(model, x):
            model(x).square().mean().backward()

        def once():
            optimizer.zero_grad()
            (step or plain)(model, x)
            optimizer.step()

        checks = kernels_check.verify(model, once, {path: required})
        return next(check for check in checks if check.path == path)

    return verify


@pytest.mark.parametrize("other", [lambda: Block(Other(by_hand)), lambda: Block(None)])
def test_another_class_in_the_place_of_attention_is_found(verified, other):
    """A block without attention that mixes no tokens is not a fault."""
    block = other()
    check = verified(Model(Block(Attention(fused)), block))
    assert check.met is (block.attn is None)


def test_feed_forward_layers_are_not_taken_for_attention(verified):
    """Feed-forward layers have names like those of attention but mix no tokens."""
    flat = nn.Sequential(Attention(fused), Feed(), Attention(fused), Feed())
    assert verified(flat).met
    assert not verified(nn.Sequential(Attention(fused), Feed(), Attention(by_hand), Feed())).met
    assert not verified(nn.Sequential(Attention(fused), Other(without_a_mask))).met


@pytest.mark.parametrize(
    ("compute", "backend", "mask"),
    [
        (fused, "flash", "causal"),
        (written_out, "eager", "explicit"),
        (written_out_in_three_dimensions, "eager", "explicit"),
        (without_a_mask, "eager", "none"),
        (by_exponential, "eager", "explicit"),
    ],
)
def test_each_way_of_writing_attention_is_recognised(verified, compute, backend, mask):
    """Its mask is recognised as well, however it is applied to the scores."""
    assert verified(stack(compute, compute), backend).met
    assert verified(stack(compute, compute), mask, path="attention.mask").met
    assert verified(stack(compute, compute), "float32", path="attention.dtype").met


def test_layers_of_another_configured_kind_need_no_attention(verified):
    """A layer with another kind in the configuration need not attend, whatever its class."""

    model = stack(fused, by_hand)
    assert not verified(model).met
    model.config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    assert verified(model).met


def test_a_router_softmax_is_not_attention(training):
    """A router's softmax has fewer dimensions than attention scores."""
    run = training()
    for name, module in run.model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(
                lambda module, inputs, output: output * output.softmax(-1).sum(-1, keepdim=True)
            )
    check = run.check("attention.backend", "flash")
    assert (check.status, check.observed) == ("active", "flash")
