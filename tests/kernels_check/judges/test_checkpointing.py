"""Tests that recomputation is judged block by block, whatever API enabled it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels_check

WIDTH = 8


class Attention(nn.Module):
    """Causal attention of one head."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        parts = (part.unsqueeze(1) for part in self.mix(hidden).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(*parts, is_causal=True).squeeze(1))


class Block(nn.Module):
    """A block that is recomputed in the given way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.attention = way, Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden):
        if self.way == "function inside":
            return checkpoint(self.inner, hidden, use_reentrant=False)
        return self.inner(hidden)

    def inner(self, hidden):
        hidden = hidden + self.attention(hidden)
        return hidden + self.mlp(hidden)


def keep_attention(context, operator, *given, **named):
    kept = "scaled_dot_product" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


OPTIONS = {
    "all": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep_attention)},
}


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, *ways):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(Block(way) for way in ways)

    def forward(self, ids):
        hidden, way = self.embed(ids), self.layers[0].way
        if way == "one function":
            return self.head(checkpoint(self.through, hidden, use_reentrant=False))
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, **OPTIONS[layer.way]) if layer.way in OPTIONS else layer(hidden)
        return self.head(hidden)

    def through(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def judge():
    """A function that returns the checks by path of a step with the given number of micro-batches."""

    def judged(model, *, passes=1, entry=None, aside=lambda: None):
        entry = entry or model
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        ids = torch.randint(5, (2, 4))

        def step():
            optimizer.zero_grad()
            aside()
            for _ in range(passes):
                entry(ids).sum().backward()
            optimizer.step()

        required = {"checkpointing": True, "checkpointing.layers": 0.5, "attention.backend": "flash", "mode": "train"}
        return {check.path: check for check in kernels_check.verify(model, step, required)}

    return judged


@pytest.mark.parametrize("way", ["all", "reentrant", "selective", "function inside", "one function"])
def test_every_way_of_recomputing_is_seen(judge, way):
    """Recomputation may be reentrant or not, selective, inside the block, or one function over several blocks."""
    checks = judge(Model(way, way), passes=2)
    assert checks["checkpointing"].met, checks["checkpointing"].reason
    assert checks["checkpointing.layers"].observed == 1.0
    assert "2 of 2 blocks computed again" in checks["checkpointing"].reason
    assert checks["attention.backend"].met, checks["attention.backend"].reason


def test_nothing_recomputed_is_absent(judge):
    """An evaluation with gradients off is not a recomputation."""
    model = Model("none", "none")

    def evaluate():
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
        model.train()

    checks = judge(model, aside=evaluate)
    assert (checks["checkpointing"].status, checks["checkpointing.layers"].observed) == ("absent", 0.0)
    assert checks["mode"].met, checks["mode"].reason


def test_blocks_that_take_no_gradient_need_no_recomputation(judge):
    """Frozen blocks at the front save no activations."""
    model = Model("none", "all")
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    check = judge(model)["checkpointing"]
    assert check.met, check.reason
    assert "1 further blocks take no gradient" in check.reason


def test_the_whole_model_recomputed_by_a_reentrant_function(judge):
    """The model is called with gradients off, but still counts as trained."""
    model = Model("none", "none")
    start = torch.zeros(2, 4, WIDTH, requires_grad=True)
    checks = judge(model, entry=lambda _: model.head(checkpoint(model.through, start, use_reentrant=True)))
    assert checks["checkpointing"].met, checks["checkpointing"].reason
    assert checks["attention.backend"].met, checks["attention.backend"].reason
