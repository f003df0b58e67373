"""Every boundary between records is probed, in both directions, and what is no attention is told from a leak."""

import os

import pytest
import torch
from torch import nn

from kernels_check import probe_isolation
from kernels_check.controls.small_attention import WIDTH, SmallAttention, packed
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.isolation import perturb_records, separating_sets


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7, 20, 21, 71, 300])
def test_of_any_two_records_each_is_changed_without_the_other(count):
    """In few forwards: 14 would do for 3432."""
    sets = separating_sets(count)
    assert len(sets) == count
    assert all(left - right for left in sets for right in sets if left is not right)
    assert max(max(one) for one in sets) < 12


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("boundary", range(1, 7))
def test_any_lost_boundary_is_found(boundary, row):
    """Whichever two neighbours see each other, in whichever row, while all others are isolated."""

    def sees(allowed, numbers):
        merged = torch.where(numbers == boundary, boundary - 1, numbers)
        lost = (merged[:, :, None] == merged[:, None, :]).tril()
        return torch.where((torch.arange(len(numbers)) == row)[:, None, None], lost, allowed)

    batch = packed(3, 1, 4, 2, 5, 1, 3, rows=3)
    check = probe_isolation(SmallAttention(sees), batch)
    assert check.status == "fallback"
    assert f"of row {row} changed" in check.reason
    assert f"those of record {boundary + 1}; 1 of 21 records see others" in check.reason
    assert probe_isolation(SmallAttention(), batch).met


@pytest.mark.parametrize("seen", ["first", "last"])
def test_a_leak_through_a_single_token_is_found(seen):
    """Of the record before, only its first or its last token is seen, by the last of the next."""

    def sees(allowed, numbers):
        allowed = allowed.clone()
        allowed[0, 11, 4 if seen == "first" else 7] = True
        return allowed

    check = probe_isolation(SmallAttention(sees), packed(4, 4, 4))
    assert check.status == "fallback"
    assert "1 other tokens" in check.reason
    assert "first those of record 3; 1 of 9" not in check.reason


def test_a_later_record_that_reaches_an_earlier_one_is_found():
    """The other direction."""

    def sees(allowed, numbers):
        allowed = allowed.clone()
        allowed[0, 1, 9] = True
        return allowed

    check = probe_isolation(SmallAttention(sees), packed(4, 4, 4))
    assert "changing record 3 of row 0 changed the logits of 1 other tokens" in check.reason


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_token_that_sees_ahead_in_its_own_record_is_found(ahead):
    """By one, or by as much as fits."""

    def sees(allowed, numbers):
        same = numbers[:, :, None] == numbers[:, None, :]
        return same.tril(ahead)

    check = probe_isolation(SmallAttention(sees), packed(6, 5))
    assert check.status == "fallback"
    assert "earlier tokens" in check.reason


def test_a_model_that_sees_both_ways_by_nature_is_isolated():
    """An encoder says so; one that says nothing is unknown."""

    def sees(allowed, numbers):
        return numbers[:, :, None] == numbers[:, None, :]

    batch = packed(6, 5)
    check = probe_isolation(SmallAttention(sees, is_causal=False), batch)
    assert check.met
    assert "both ways inside a record" in check.reason
    check = probe_isolation(SmallAttention(sees, is_causal=None), batch)
    assert check.status == "unknown"
    assert "whether it is causal" in check.reason


def _quantised_over_the_batch(hidden):
    """One scale for all tokens, as activations have it that are quantised as they come."""
    scale = hidden.abs().amax() / 7
    return (hidden / scale).round() * scale


def _experts_of_limited_capacity(hidden):
    """The first tokens that ask for an expert are served, in the order of the batch."""
    asks = hidden.flatten(0, 1)[:, 1] > 0
    served = asks & (asks.cumsum(0) <= len(asks) // 3)
    return hidden + served.reshape(hidden.shape[:2])[..., None] * hidden.flip(-1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("after", [_quantised_over_the_batch, _experts_of_limited_capacity])
def test_what_crosses_rows_is_no_leak(after, rows):
    """No attention does that, so it is unknown, with the reason; a batch of one row is compared with its copy."""
    check = probe_isolation(SmallAttention(after=after), packed(4, 4, 4, rows=rows))
    assert check.status == "unknown"
    assert "changing one row of the batch changes the logits of another" in check.reason


def test_a_leak_beyond_what_crosses_rows_is_one():
    """A hundredth of what attention does hides nothing."""

    def faint(hidden):
        return hidden + 1e-4 * hidden.mean()

    def whole(allowed, numbers):
        return torch.ones_like(allowed).tril()

    assert probe_isolation(SmallAttention(after=faint), packed(4, 4, 4)).status == "unknown"
    assert probe_isolation(SmallAttention(whole, after=faint), packed(4, 4, 4, rows=2)).status == "fallback"


def test_a_batch_norm_is_no_leak_and_keeps_its_statistics():
    """It is computed over the whole batch in training, which is not attention's doing."""
    model = SmallAttention()
    norm = nn.BatchNorm1d(WIDTH)
    model.add_module("norm", norm)
    model.after = lambda hidden: norm(hidden.flatten(0, 1)).reshape(hidden.shape)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert probe_isolation(model, packed(4, 4, rows=2)).met
    assert norm.training
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


class _Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, hidden):
        return hidden + self.draw(hidden)


def test_random_numbers_of_a_generator_are_drawn_again():
    """Those of the process, and those of a generator that a module holds."""
    model = SmallAttention()
    model.own = torch.Generator().manual_seed(1)
    model.after = lambda hidden: hidden + torch.rand(hidden.shape, generator=model.own) + torch.rand(hidden.shape)
    batch = packed(4, 4)
    before = model.own.get_state(), torch.get_rng_state()
    assert probe_isolation(model, batch).met
    assert torch.equal(model.own.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    model.sees = lambda allowed, numbers: torch.ones_like(allowed).tril()
    assert probe_isolation(model, packed(4, 4)).status == "fallback"


def test_noise_that_nobody_can_repeat_is_named():
    """Its module, and what to do."""
    model = SmallAttention()
    model.noise = _Noise(lambda hidden: int.from_bytes(os.urandom(4)) / 2**32)
    model.after = lambda hidden: model.noise(hidden)
    check = probe_isolation(model, packed(4, 4))
    assert check.status == "unknown"
    assert "two forwards of the same batch differ" in check.reason
    assert "first in noise (_Noise)" in check.reason
    assert "make it deterministic" in check.reason


def test_a_first_forward_of_its_own_is_no_noise():
    """Something is set up at first use."""
    model = SmallAttention()
    calls = []

    def settles(hidden):
        calls.append(hidden)
        return hidden * (2.0 if len(calls) == 1 else 1.0)

    model.after = settles
    assert probe_isolation(model, packed(4, 4)).met


def test_embeddings_in_the_place_of_tokens():
    """They are changed as well as tokens can be."""
    batch = packed(4, 4, 4)
    for model, status in (
        (SmallAttention(), "active"),
        (SmallAttention(lambda a, n: torch.ones_like(a).tril()), "fallback"),
    ):
        given = {"inputs_embeds": model.embed(batch["input_ids"]).detach(), "position_ids": batch["position_ids"]}
        assert probe_isolation(model, given).status == status


def test_logits_that_are_not_finite_prove_nothing():
    """A NaN is equal to nothing and hides everything."""
    model = SmallAttention(after=lambda hidden: hidden / 0.0)
    check = probe_isolation(model, packed(4, 4))
    assert (check.status, "not finite" in check.reason) == ("unknown", True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"position_ids": None}, "nothing tells where records begin: pass position_ids"),
        ({"position_ids": torch.arange(5)}, "position_ids of [5] does not fit tokens of [1, 8]"),
        ({"position_ids": torch.arange(8)[None]}, "no row of the batch packs two records, as position_ids has it"),
        ({"input_ids": torch.arange(8)}, "no input_ids or inputs_embeds of [rows, tokens] among its arguments"),
        ({"extra": 1}, "it takes no extra"),
    ],
)
def test_what_is_missing_is_said(given, said):
    """With what to pass; no exception is shown bare."""
    check = probe_isolation(SmallAttention(), packed(4, 4) | given)
    assert check.status == "unknown"
    assert said in check.reason


def test_a_model_that_is_sharded_is_unknown():
    """Its forwards are those of all processes, which need not probe the same."""
    model = SmallAttention()
    model.head.weight.ds_id = 0
    check = probe_isolation(model, packed(4, 4))
    assert check.status == "unknown"
    assert "sharded over processes" in check.reason
    assert "before it is sharded" in check.reason


@pytest.mark.parametrize(("count", "forwards"), [(2, 2), (3, 3), (6, 4), (7, 5), (70, 8)])
def test_no_forward_is_made_in_vain(count, forwards):
    """As many subsets of half of them as there are records."""
    assert max(max(one) for one in separating_sets(count)) + 1 == forwards


class Exact(nn.Module):
    """Adds to the logits of the last two tokens what it is told, so that differences are whole numbers.

    Args:
        batch: what it is given unchanged.
        own: added if any token of those before it in its row is another.
        others: added if any in another row is.
    """

    def __init__(self, batch, *, own, others=0.0):
        super().__init__()
        self.register_buffer("first", batch["input_ids"][0])
        self.own, self.others, self.is_causal = own, others, True

    def forward(self, input_ids, position_ids):
        """Logits of [rows, tokens, 50]."""
        logits = nn.functional.one_hot(input_ids, 50).float()
        own = (input_ids != self.first)[:, :-2].any(dim=1)
        others = torch.stack([own[torch.arange(len(own)) != row].any() for row in range(len(own))])
        logits[:, -2:, 0] += (self.own * own + self.others * others)[:, None]
        return logits


def test_ten_times_what_crosses_rows_is_not_beyond_it():
    """Both numbers are said; a little more is a leak."""
    batch = packed(2, 2)
    check = probe_isolation(Exact(batch, own=10.0, others=1.0), batch)
    assert check.status == "unknown"
    assert "another by up to 1, which no attention does" in check.reason
    assert "a change of 10 inside a row" in check.reason
    assert probe_isolation(Exact(batch, own=10.5, others=1.0), batch).status == "fallback"


def test_of_leaks_alike_the_first_is_named():
    """The third record sees both before it."""
    batch = packed(2, 2, 2)
    assert "changing the first record of row 0" in probe_isolation(Exact(batch, own=1.0), batch).reason


def test_a_row_of_one_record_need_show_nothing():
    """It packs nothing, so that nothing is proved by it."""
    batch = packed(4, 4, rows=2)
    batch["position_ids"][1] = torch.arange(8)
    deaf = SmallAttention(after=lambda hidden: hidden * torch.tensor([1.0, 0.0])[: len(hidden), None, None])
    deaf.is_causal = False
    assert probe_isolation(deaf, batch).met


@pytest.mark.parametrize(
    ("silent", "said"),
    [(slice(0, 4), "changing a record did not"), (slice(3, 4), "changing the last token or the second half did not")],
)
def test_what_does_not_change_its_own_logits_proves_nothing(silent, said):
    """A record, or the part of it that is changed."""

    def after(hidden):
        hidden = hidden.clone()
        hidden[:, silent] = 0
        return hidden

    check = probe_isolation(SmallAttention(after=after), packed(4, 4))
    assert check.status == "unknown"
    assert f"{said} even change its own logits (record 1 of row 0)" in check.reason


@pytest.mark.parametrize(("token", "ahead"), [(0, 5), (8, 9)])
def test_what_a_token_sees_ahead_of_it_is_found(token, ahead):
    """The last of one record, and of the next what lies beyond its half."""

    def sees(allowed, numbers):
        allowed = allowed.clone()
        allowed[:, token, ahead] = True
        return allowed

    check = probe_isolation(SmallAttention(sees), packed(6, 6))
    assert check.status == "fallback"
    assert "earlier tokens" in check.reason


def test_an_argument_that_is_none_is_the_same_for_all_rows():
    """What crosses rows is seen all the same."""
    batch = packed(4, 4, 4) | {"inputs_embeds": None}
    check = probe_isolation(SmallAttention(after=_quantised_over_the_batch), batch)
    assert check.status == "unknown"
    assert "changes the logits of another" in check.reason


@pytest.mark.parametrize(
    ("arguments", "said"), [({"words": torch.ones(3)}, "(words [3])"), ({"words": 3}, "(no tensors)")]
)
def test_arguments_without_tokens_are_named(arguments, said):
    """With their shapes."""
    model = SmallAttention()
    assert said in perturb_records(model, [ModelCall(module=model, arguments=arguments)]).unclear
