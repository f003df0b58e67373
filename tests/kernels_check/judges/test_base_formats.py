"""Tests that the bits of a base follow from its bytes, in the formats of several libraries."""

import pytest
import torch
from torch import nn

import kernels_check


class Adapted(nn.Module):
    """An adapter on a base layer of another library, without the base's product."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(64, 2), nn.Linear(2, 32)

    def forward(self, x):
        return self.lora_B(self.lora_A(x))


def packed(name, shape, dtype=torch.int32, **attributes):
    """Return a layer that stores integers in a buffer and describes them in attributes."""
    layer = nn.Module()
    layer.register_buffer(name, torch.zeros(shape, dtype=dtype))
    vars(layer).update(attributes)
    return layer


def plain(dtype):
    """Return a linear layer of a floating point type."""
    return nn.Linear(64, 32, bias=False).to(dtype).requires_grad_(False)


@pytest.mark.parametrize(
    ("base", "bits"),
    [
        (packed("qweight", (64 // 8, 32), bits=4, in_features=64, out_features=32), 4),
        (packed("qweight", (64, 32 // 8), w_bit=4, in_features=64, out_features=32), 4),
        (packed("W_q", (64 * 32 // 2, 1), torch.uint8, meta={"nbits": 4, "shape": (32, 64)}), 4),
        (plain(torch.bfloat16), 16),
        (plain(torch.float8_e4m3fn), 8),
        (packed("qweight", (64 // 8, 32), bits=8, in_features=64, out_features=32), None),
        (packed("qweight", (64 // 8, 32)), None),
    ],
    ids=["GPTQ", "AWQ", "HQQ", "bfloat16", "float8", "a false claim", "no claim"],
)
def test_the_bits_of_a_base_are_those_of_its_bytes(base, bits):
    """An attribute that contradicts the bytes, and integers without an attribute, are unknown."""
    model = nn.Sequential(Adapted(base))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()

    checks = kernels_check.verify(model, step, {"base.bits": bits or 4})
    check = next(check for check in checks if check.path == "base.bits")
    assert check.status == ("unknown" if bits is None else "active"), check.reason
    assert check.observed == bits
