"""Which calls of a step are probed for isolation, and what stands for those that tell nothing of their records."""

from types import SimpleNamespace

import pytest
import torch

from kernels_check.controls.small_attention import SmallAttention, packed
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.packed_step import isolation_of_step

ALONE = {"position_ids": torch.arange(8)[None]}
"""Positions of one record."""


class Model(SmallAttention):
    """Isolates its records, takes whatever it is given, and tells of its tokens."""

    def __init__(self, note=lambda tokens: None):
        super().__init__()
        self.note = note

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **more):
        """Only tokens and positions matter."""
        self.note(input_ids)
        positions = packed(4, 4)["position_ids"] if position_ids is None else position_ids
        return super().forward(input_ids, positions, inputs_embeds)


def step(*given, batch=None, model=None):
    model = model or Model()
    return isolation_of_step(model, [ModelCall(module=model, arguments=one) for one in given], batch)


def probed(*given):
    """How many of the calls were probed."""
    notes = step(*given).notes
    if not notes:
        return len(given)
    (note,) = notes
    assert note.endswith("the others pack nothing or are called alike")
    return int(note.split()[0])


TOKENS = packed(4, 4)
WITH_ZERO = {**TOKENS, "input_ids": TOKENS["input_ids"].masked_fill(torch.arange(8) == 3, 0)}


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (TOKENS, WITH_ZERO, 1),
        (TOKENS, TOKENS | {"attention_mask": torch.ones(1, 8)}, 2),
        (TOKENS | {"attention_mask": torch.ones(1, 8)}, WITH_ZERO | {"attention_mask": torch.ones(1, 8)}, 1),
        (TOKENS | {"attention_mask": torch.ones(1, 8)}, TOKENS | {"attention_mask": torch.arange(8)[None].gt(0)}, 2),
        (TOKENS | {"use_cache": True}, TOKENS | {"use_cache": False}, 2),
        (TOKENS | {"cache": object()}, TOKENS | {"cache": object()}, 1),
        (TOKENS | {"cu_seqlens": torch.tensor([0, 4, 8])}, TOKENS | {"cu_seqlens": torch.tensor([0, 4, 8])}, 2),
        (TOKENS | {"attention_mask": torch.ones(1, 8, 8)}, TOKENS | {"attention_mask": torch.ones(1, 8, 8)}, 2),
        (TOKENS | {"pixels": torch.ones(1, 3, 3)}, TOKENS | {"pixels": torch.ones(1, 3, 3)}, 1),
        (TOKENS, TOKENS | ALONE, 1),
    ],
)
def test_calls_that_a_model_treats_alike_are_probed_once(one, other, count):
    """Another mask, switch or kind is another way; masks of blocks and lengths are made by hand for each."""
    assert probed(one, other) == count


def test_of_calls_alike_the_one_with_the_most_records_is_probed():
    """The first of those that have as many."""
    many, few = packed(2, 2, 2, 2), packed(4, 4)
    for given in ((many, few), (few, many)):
        assert step(*given).records == 4
    seen = []
    step(TOKENS, WITH_ZERO, model=Model(seen.append))
    assert torch.equal(seen[0], TOKENS["input_ids"])


def test_the_records_of_the_batch_are_those_of_the_same_tokens():
    """Of no other tokens, be it by number, shape or device; a call without tokens has no records."""
    own = {"input_ids": TOKENS["input_ids"]}
    assert step(own, batch=TOKENS).unclear is None
    for other in (WITH_ZERO["input_ids"], TOKENS["input_ids"][:, :6], TOKENS["input_ids"].to("meta"), torch.tensor(3)):
        assert "the step calls the model otherwise than batch" in step({"input_ids": other}, batch=TOKENS).unclear
    assert "no input_ids" in step(own, batch={"words": torch.ones(1)}).unclear


def test_a_step_that_packs_by_itself_is_not_read_by_the_batch():
    """Its own records are what is perturbed, in the modes of both."""
    seen = step(packed(2, 2, 2, 2), batch=TOKENS)
    assert (seen.records, seen.unclear, seen.probed, seen.notes) == (4, None, ("train", "eval"), ())


@pytest.mark.parametrize(
    ("own", "given", "said"),
    [
        ({"use_cache": True}, {}, "use_cache is True in the step and not given in batch"),
        ({}, {"cache": ()}, "cache is not given in the step and tuple in batch"),
        (
            {"attention_mask": torch.ones(1, 8)},
            {"attention_mask": torch.ones(1, 8).long()},
            "attention_mask is a tensor of 2 dimensions in the step and a tensor of 2 dimensions of ones in batch",
        ),
        (
            {"attention_mask": torch.ones(1, 8).bool()},
            {"attention_mask": torch.arange(8)[None].gt(0)},
            "attention_mask is a tensor of 2 dimensions of ones in the step and a tensor of 2 dimensions in batch",
        ),
    ],
)
def test_what_a_step_passes_otherwise_than_the_batch_is_named(own, given, said):
    """By what it is, and whether a mask is of ones."""
    seen = step(WITH_ZERO | ALONE | own, batch=TOKENS | given)
    assert said in seen.unclear


def test_what_is_returned_besides_makes_no_difference():
    """Nor do labels; the step's rows just held a record each."""
    seen = step(WITH_ZERO | ALONE | {"output_hidden_states": True, "labels": TOKENS["input_ids"]}, batch=TOKENS)
    assert (seen.unclear, seen.notes) == (None, ("the step's own rows held a record each",))


def test_records_that_cannot_be_read_are_no_single_ones():
    """They are unknown, with both shapes, also where the batch is called alike."""
    seen = step(TOKENS | {"position_ids": torch.arange(5)}, batch=TOKENS | {"position_ids": TOKENS["position_ids"][0]})
    assert "position_ids of [5] does not fit" in seen.unclear
    assert step(TOKENS | {"position_ids": torch.arange(5)}).packed is False


class Loss(torch.nn.Module):
    """Returns nothing to compare."""

    def forward(self, **given):
        """A number for all tokens."""
        return SimpleNamespace(loss=torch.ones(()))


@pytest.mark.parametrize(
    ("inside", "status"), [((), False), ((Model,), True), ((Loss,), False), ((Model, Loss), False)]
)
def test_a_call_that_returns_its_loss_is_judged_by_all_inside_it(inside, status):
    """Where each of them can be; else by its own reason."""
    inner = [ModelCall(module=made(), arguments=TOKENS) for made in inside]
    outer = ModelCall(module=Loss(), arguments=TOKENS, inside=inner)
    seen = isolation_of_step(outer.module, [outer])
    assert (seen.unclear is None) is status
    if not status:
        assert "Loss returned" in seen.unclear
        assert seen.unclear.startswith("the step's own call, train: ")


def test_a_call_that_tells_one_record_is_looked_into_for_more():
    """What it wraps may be told where they are."""
    model = Model()
    inner = ModelCall(module=model, arguments=TOKENS)
    outer = ModelCall(module=model, arguments=TOKENS | ALONE, inside=[inner])
    seen = isolation_of_step(model, [outer])
    assert (seen.unclear, seen.records) == (None, 2)


def test_a_call_that_can_be_compared_is_judged_by_itself():
    """Whatever the calls inside it show when they are made alone."""
    leaking = SmallAttention(lambda allowed, numbers: torch.ones_like(allowed).tril())
    inner = ModelCall(module=leaking, arguments=TOKENS)
    outer = ModelCall(module=Model(), arguments=TOKENS, inside=[inner])
    seen = isolation_of_step(outer.module, [outer])
    assert (seen.unclear, seen.leaks) == (None, ())
