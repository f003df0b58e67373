"""A call is made again and again as it was made, and what cannot be compared is refused by name."""

from types import SimpleNamespace

import bitsandbytes as bnb
import numpy
import pytest
import torch
from torch import nn

from kernels_check.observation.forwards import ForwardError, Forwards, by_row, fresh, is_sharded
from kernels_check.observation.inputs import ModelCall

SHAPE = (2, 3)
IDS = torch.arange(6).reshape(SHAPE)
LOGITS = torch.arange(24.0).reshape(*SHAPE, 4)


class Model(nn.Module):
    """Returns what it is told to, and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.given = answer, []

    def forward(self, input_ids=None, **more):
        self.given.append(more)
        return self.answer(**more)


def forwards(model, **more):
    return Forwards(ModelCall(module=model, arguments={"input_ids": IDS} | more))


def test_what_is_no_input_of_the_logits_is_left_out():
    """Labels, and numbers about the loss; logits without the labels are asked for once."""
    model = Model(lambda **more: LOGITS)
    found = forwards(model, labels=IDS, num_items_in_batch=3, use_cache=False).logits({}, SHAPE)
    assert torch.equal(found, LOGITS)
    assert model.given == [{"use_cache": False}]


def _without_labels_nothing(labels=None):
    return {"loss": torch.ones(())} if labels is None else LOGITS


def _without_labels_an_error(labels=None):
    if labels is None:
        raise ValueError("no labels")
    return LOGITS


@pytest.mark.parametrize("answer", [_without_labels_nothing, _without_labels_an_error])
def test_some_models_take_labels_to_return_logits(answer):
    """They get them where there are any; where there are none, they are refused."""
    assert torch.equal(forwards(Model(answer), labels=IDS).logits({}, SHAPE), LOGITS)
    with pytest.raises(ForwardError, match=r"no labels|none of it of \[rows, tokens\] = \[2, 3\]"):
        forwards(Model(answer)).logits({}, SHAPE)


@pytest.mark.parametrize(
    "output",
    [
        {"hidden": LOGITS + 1, "logits": LOGITS},
        SimpleNamespace(logits=LOGITS),
        (torch.ones(()), LOGITS, LOGITS + 1),
        [LOGITS.reshape(6, 4)],
        LOGITS.reshape(2, 3, 2, 2),
        (torch.ones(3, 2, 4), LOGITS),
        (IDS[..., None], LOGITS),
        (torch.ones(2, 3), LOGITS),
        (torch.ones(6), LOGITS),
        (torch.ones(5, 4), LOGITS),
        {"logits": None, "states": (None, LOGITS)},
    ],
)
def test_logits_are_found_in_whatever_is_returned(output):
    """Numbers with features for each token; integers, other shapes and a number a token are none."""
    assert torch.equal(forwards(Model(lambda: output)).logits({}, SHAPE), LOGITS)


@pytest.mark.parametrize("output", [None, torch.ones(6), torch.ones(2, 3), torch.ones(2, 4, 4), IDS[..., None]])
def test_what_has_no_features_for_each_token_is_refused(output):
    """With what was returned."""
    with pytest.raises(ForwardError, match="Model returned"):
        forwards(Model(lambda: output)).logits({}, SHAPE)


class Strict(nn.Module):
    """Takes its tokens alone, and raises."""

    def forward(self, input_ids=None):
        raise ValueError("too long\nand more")


def test_what_a_model_raises_is_said():
    """With what it was given, and what of that it does not take."""

    def said(call):
        with pytest.raises(ForwardError) as raised:
            Forwards(call).logits({}, SHAPE)
        return str(raised.value)

    strict = Strict()
    text = said(ModelCall(module=strict, arguments={"input_ids": IDS}))
    assert text == "Strict given input_ids raised ValueError: too long"
    assert said(ModelCall(module=strict, arguments={})).startswith("Strict given nothing raised")
    unknown = said(ModelCall(module=strict, arguments={"input_ids": IDS, "mask": None}))
    assert unknown.endswith("; it takes no mask")
    free = said(ModelCall(module=Model(_without_labels_an_error), arguments={"input_ids": IDS, "mask": None}))
    assert "it takes no" not in free


def test_autocast_is_that_of_the_call():
    """On where it was on, off where it was off, whatever is on now."""
    model = Model(lambda: nn.functional.linear(torch.ones(2, 3, 4), torch.ones(4, 4)))
    cast = ModelCall(module=model, arguments={"input_ids": IDS}, autocast=(("cpu", torch.bfloat16),))
    assert Forwards(cast).logits({}, SHAPE).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forwards(model).logits({}, SHAPE).dtype == torch.float32


def test_generators_of_numpy_are_set_back():
    """Those that a module holds draw the same numbers each time."""
    model = Model(lambda: LOGITS + float(model.own.random()))
    model.own = numpy.random.default_rng(3)
    again = forwards(model)
    assert torch.equal(again.logits({}, SHAPE), again.logits({}, SHAPE))


class Noisy(nn.Module):
    """Never returns the same twice."""

    count = 0

    def forward(self, input_ids=None):
        self.count += 1
        return LOGITS + self.count


def test_noise_is_placed_in_a_module():
    """The first that differs; the model itself has a name, too, and where none differs it is said."""
    assert forwards(Noisy()).noise(SHAPE) == "first in the model (Noisy)"
    assert forwards(Model(lambda: LOGITS)).noise(SHAPE) == "in no module of its own"
    assert forwards(Model(lambda: {"ids": IDS, "logits": LOGITS})).noise(SHAPE) == "in no module of its own"


def test_outliers_are_those_of_a_row_while_rows_are_compared():
    """bitsandbytes picks them over the batch above a threshold; what another library calls so is left alone."""
    model = nn.Sequential(
        bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False, threshold=6.0), nn.Dropout(), nn.Linear(2, 2)
    )
    model[2].state = SimpleNamespace(threshold=3.0)
    with by_row(model, training=True):
        assert (model[0].state.threshold, model[2].state.threshold) == (0.0, 3.0)
        assert [one.training for one in model] == [True, False, True]
    assert (model[0].state.threshold, model[2].state.threshold) == (6.0, 3.0)


class Cache:
    """Fills up as it is read."""

    def __init__(self):
        self.seen = []

    def get_seq_length(self):
        return len(self.seen)


def test_a_cache_is_used_once():
    """Each forward gets it as it was; anything else is passed on itself."""
    cache, ids = Cache(), torch.ones(1)
    fresh(cache).seen.append(1)
    assert (cache.seen, fresh(ids) is ids) == ([], True)


class FullyShardedDataParallel(nn.Module):
    """A wrapper of that name."""


class DTensor(nn.Parameter):
    """A shard by its class."""


def test_a_model_in_several_processes_is_told_by_its_parts():
    """A wrapper, a shard or a partition anywhere."""
    plain = nn.Linear(2, 2)
    assert not is_sharded(plain)
    assert is_sharded(nn.Sequential(plain, FullyShardedDataParallel()))
    shard = nn.Linear(2, 2)
    shard.weight = DTensor(torch.ones(2, 2))
    assert is_sharded(nn.Sequential(plain, shard))
    plain.bias.ds_id = 0
    assert is_sharded(plain)
