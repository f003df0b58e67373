"""Tests that attention is attributed to the layers of the judged model, each of which must run the required backend.

Tests that record boundaries are read from each input that marks them, and that inconsistent inputs are refused by
name.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels_check
from kernels_check.observe.padding import PADDING, LayoutError, find_records, record_numbers

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


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0]])
NUMBERS = [[0, 0, 0, 1, 1, 2]]


def test_a_repeated_position_is_one_filler():
    """A repeated position, as in padding, counts as one filler at either end."""
    positions = torch.tensor([[0, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 2, 0]])
    assert record_numbers(positions).tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2]]


def test_records_of_one_token_each_are_not_padding():
    """One-token records have the positions of padding but differing tokens; with equal tokens they count as one
    record."""
    given = {"position_ids": torch.tensor([[0, 1, 0, 0, 0, 1]] * 2)}
    given["input_ids"] = torch.tensor([[7, 8, 29, 58, 7, 8], [7, 8, 3, 3, 7, 8]])
    assert find_records(given, 2, 6).numbers.tolist() == [[0, 0, 1, 2, 3, 3], [0, 0, 1, 1, 2, 2]]


def _blocks(numbers):
    return (torch.tensor(numbers)[:, :, None] == torch.tensor(numbers)[:, None, :]).tril()[:, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", POSITIONS),
        ("position_ids", POSITIONS[0]),
        ("position_ids", POSITIONS.expand(4, 1, 6)),
        ("position_ids", POSITIONS.expand(3, 1, 6)),
        ("position_ids", torch.cat([POSITIONS[None], torch.full((3, 1, 6), 5)])),
        ("seq_idx", torch.tensor([[4, 4, 4, 7, 7, 4]])),
        ("cu_seq_lens_q", torch.tensor([0, 3, 5, 6])),
        ("cu_seqlens", torch.tensor([3, 5, 6], dtype=torch.int32)),
        ("attention_mask", torch.tensor([[1, 1, 1, 2, 2, 3]])),
        ("attention_mask", _blocks(NUMBERS)),
        ("attention_mask", _blocks(NUMBERS)[:, 0]),
        ("attention_mask", torch.zeros(1, 1, 6, 6).masked_fill(~_blocks(NUMBERS), torch.finfo(torch.float32).min)),
        ("attention_mask", {"full_attention": _blocks(NUMBERS)}),
    ],
)
def test_every_input_that_marks_records_is_read(name, value):
    """Positions, record numbers, cumulative lengths, counting masks and block masks all mark records."""
    found = find_records({name: value}, 1, 6)
    assert (found.numbers.tolist(), found.by, found.count, found.packed) == (NUMBERS, name, 3, True)


def test_the_first_input_that_shows_a_boundary_counts():
    """Positions without a restart do not hide the boundaries of a mask, and a mask of ones does not hide those of
    positions."""
    going_on = {"position_ids": torch.arange(6), "attention_mask": _blocks(NUMBERS)}
    assert find_records(going_on, 1, 6).by == "attention_mask"
    ones = {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 6)}
    assert find_records(ones, 1, 6).by == "position_ids"
    assert not find_records({"position_ids": torch.arange(6)}, 1, 6).packed
    assert find_records({"attention_mask": torch.ones(1, 6), "labels": POSITIONS}, 1, 6) is None


def test_hidden_tokens_are_in_no_record():
    """Masked tokens at either end belong to no record; the other records count from 0."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    found = find_records({"position_ids": torch.tensor([[1, 0, 1, 0, 1, 1]]), "attention_mask": mask}, 1, 6)
    assert found.numbers.tolist() == [[PADDING, 0, 0, 1, 1, PADDING]]
    cumulated = find_records({"cu_seqlens": torch.tensor([0, 2, 4])}, 1, 6)
    assert cumulated.numbers.tolist() == [[0, 0, 1, 1, PADDING, PADDING]]


def test_rows_of_a_mask_that_were_opened_are_padding():
    """A fully masked row is opened so that its softmax is defined; such a row is padding."""
    mask = torch.ones(1, 1, 6, 6).tril().bool() & torch.tensor([0, 0, 1, 1, 1, 1]).bool()
    mask[..., 4:, :4] = False
    for one in (mask, mask | ~mask.any(dim=-1, keepdim=True)):
        found = find_records({"attention_mask": one}, 1, 6)
        assert found.numbers.tolist() == [[PADDING, PADDING, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"position_ids": torch.arange(5)}, r"position_ids of \[5\] does not fit tokens of \[2, 6\]"),
        ({"seq_idx": torch.ones(3, 6)}, r"seq_idx of \[3, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 13])}, r"cu_seqlens ends at \[13\], and there are 2 x 6 tokens"),
        ({"cu_seqlens": torch.tensor([])}, "cu_seqlens ends at"),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, r"cu_seqlens ends at \[2\]"),
    ],
)
def test_inputs_of_another_size_are_refused(given, words):
    """The error gives both sizes."""
    with pytest.raises(LayoutError, match=words):
        find_records(given, 2, 6)


def test_places_of_an_image_begin_no_record():
    """In an image, time is constant and height and width restart; a record begins only where all three are zero."""
    planes = torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
    assert find_records({"position_ids": planes}, 1, 6).numbers.tolist() == [[0] * 6]
