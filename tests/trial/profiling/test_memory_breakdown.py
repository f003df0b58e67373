"""Tests of the memory breakdown of a step: tensors are counted to the byte, and the remainder is reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorameter.trial.memory import resident_tensors
from lorameter.trial.profiling.memory import LiveTensors, measure_breakdown, read_pages

ROWS, WIDTH = 16, 32


class Net(nn.Module):
    """An embedding and a frozen layer with an adapter next to it, whose product saves both of its factors."""

    def __init__(self, *, checkpointed):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.base, self.adapter = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.requires_grad_(False)
        self.adapter.weight.requires_grad_(True)
        self.checkpointed = checkpointed

    def forward(self, tokens):
        entered = self.embed(tokens)
        if self.checkpointed:
            return checkpoint(self.block, entered, use_reentrant=False).sum()
        return self.block(entered).sum()

    def block(self, entered):
        hidden = self.base(entered) + self.adapter(entered)
        return hidden.exp() * hidden


@pytest.mark.parametrize(("checkpointed", "kept"), [(False, 3), (True, 1)])
def test_activations_are_the_tensors_saved_for_the_backward_pass(checkpointed, kept):
    """Activations are the adapter's input, the exponential and its argument; with checkpointing only the input of the
    block."""
    net = Net(checkpointed=checkpointed)
    optimizer = torch.optim.SGD([net.adapter.weight])
    addresses = {t.untyped_storage().data_ptr() for found in resident_tensors(net, optimizer).values() for t in found}
    seen: list[dict[str, int]] = []
    live = LiveTensors(resident=addresses, vocabulary=0, device="cpu", on_change=lambda kinds: seen.append(dict(kinds)))
    tokens = torch.arange(ROWS)
    with live.watching([net.adapter.weight]):
        loss = net(tokens)
        assert live.bytes["activations"] == kept * ROWS * WIDTH * 4
        loss.backward()
    del loss
    assert live.bytes["activations"] == 0
    assert live.bytes["gradients"] == WIDTH * WIDTH * 4
    assert max(kinds["temporaries"] for kinds in seen) >= ROWS * WIDTH * 4


def test_a_step_of_known_size_is_explained_on_the_host():
    """64 MiB of saved activations, the product and its gradient are counted; the remainder is small."""
    wide = nn.Linear(1, 1, bias=False)
    size = 64 * 2**20
    optimizer = torch.optim.SGD(wide.parameters())

    def step():
        product = torch.ones(size // 4) * wide.weight.view(1)  # keeps the ones
        product.sum().backward()

    step()
    optimizer.zero_grad()
    found = measure_breakdown(wide, optimizer, step, birth=read_pages(), device="cpu")
    assert found.kinds["activations"] >= size
    assert found.kinds["activations"] + found.kinds["temporaries"] == pytest.approx(3 * size, rel=0.01)
    assert found.unexplained_bytes == found.peak_bytes - sum(found.kinds.values())
    assert abs(found.unexplained_bytes) < 0.05 * 3 * size


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_explained_within_two_percent():
    """The allocator's peak for four layers of 4096, of which the first trains, agrees with the counted bytes."""
    layers = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4))).cuda().requires_grad_(False)
    layers[0].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layers[0].weight], fused=True)
    rows = torch.randn(2048, 4096, device="cuda")

    def step():
        layers(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    found = measure_breakdown(layers, optimizer, step, birth=read_pages(), device="cuda")
    assert abs(found.share) < 0.02
    assert found.outside_allocator["fragmentation"] >= 0
