"""A module is asked whether its tokens see each other, whatever it is written with."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.mixing import mixing_modules

WIDTH, TOKENS = 8, 6


def by_hand(x, seen=None):
    """Attention in operations of single elements."""
    weights = (x.unsqueeze(2) * x.unsqueeze(1)).sum(-1).exp()
    weights = weights if seen is None else weights * seen
    return (weights.unsqueeze(-1) * x.unsqueeze(1)).sum(2) / weights.sum(-1, keepdim=True)


class Layer(nn.Module):
    """A function with what it holds; what is positional and what is named is passed on."""

    def __init__(self, function, *held):
        super().__init__()
        self.function, self.held = function, nn.ModuleList(held)

    def forward(self, x, *rest, **named):
        return self.function(x, *self.held, *rest, **named)


def seeing(distance):
    """Each token sees itself and the one so far before it, or the first."""

    def layer(x, up):
        other = x[:, :1] if distance is None else x.roll(distance, 1)
        return x + up(other) * (torch.arange(TOKENS) >= (distance or 1))[:, None]

    return Layer(layer, nn.Linear(WIDTH, WIDTH))


class Model(nn.Module):
    """One layer, with a norm around it."""

    def __init__(self, layer, *beside, embeds=False, **named):
        super().__init__()
        self.first = nn.Embedding(10, WIDTH) if embeds else nn.LayerNorm(WIDTH)
        self.layer, self.beside, self.named = layer, beside, named

    def forward(self, x):
        return self.layer(self.first(x), *self.beside, **self.named)


def mixes(model, x=None, **call):
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH) if x is None else x
    calls = [ModelCall(module=model, arguments={"x": x}, **call)]
    return "layer" in mixing_modules(model, calls, ["layer"])


CAUSAL = torch.ones(TOKENS, TOKENS).tril()
ATTENDING = {
    "both ways": by_hand,
    "causal": lambda x: by_hand(x, CAUSAL),
    "anticausal": lambda x: by_hand(x, CAUSAL.T),
    "windowed": seeing(1),
    "dilated": seeing(2),
    "first token alone": seeing(None),
    "dilated, to those that come": Layer(
        lambda x, up: x + up(x.roll(-2, 1)) * (torch.arange(TOKENS) < TOKENS - 2)[:, None], nn.Linear(WIDTH, WIDTH)
    ),
    "tokens in front": lambda x: by_hand(x.transpose(0, 1).contiguous()).transpose(0, 1),
    "behind a projection": Layer(lambda x, up: by_hand(up(x)), nn.Linear(WIDTH, WIDTH)),
    "with dropout": lambda x: functional.dropout(by_hand(x), 0.2),
    "in place": lambda x: x.add_(by_hand(x)),
    "in a tuple": lambda x: (None, {"hidden": by_hand(x)}),
    "after a convolution, around which it goes": Layer(
        lambda x, conv: by_hand(x + conv(x.transpose(1, 2)).transpose(1, 2)), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    ),
    "between 1 x 1 convolutions": Layer(
        lambda x, conv: by_hand(conv(x.transpose(1, 2)).transpose(1, 2)), nn.Conv1d(WIDTH, WIDTH, 1)
    ),
    "noise that no seed fixes": lambda x: x + torch.rand(x.shape, generator=NOISE),
}
NOISE = torch.Generator().manual_seed(1)
ALONE = {
    "feed-forward": Layer(lambda x, up, down: x + down(up(x).relu()), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "wider": nn.Linear(WIDTH, 3 * WIDTH),
    "convolution": Layer(
        lambda x, conv: x + conv(x.transpose(1, 2)).transpose(1, 2).relu(), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    ),
    "recurrence": Layer(lambda x, one: x + one(x)[0], nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "recurrence alone": nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "batch norm": Layer(lambda x, norm: x + norm(x.transpose(1, 2)).transpose(1, 2), nn.BatchNorm1d(WIDTH)),
    "group norm": Layer(lambda x, norm: x + norm(x.transpose(1, 2)).transpose(1, 2), nn.GroupNorm(2, WIDTH)),
    "pooling": lambda x: x.mean(1),
    "each channel for itself": lambda x: x + x.mean(1, keepdim=True),
    "channels in front": Layer(lambda x, conv: x + conv(x.transpose(1, 2)).transpose(1, 2), nn.Conv1d(WIDTH, WIDTH, 1)),
    "nothing": lambda x: None,
    "identity": nn.Identity(),
    "a loss for each row beside": lambda x: (x, x.pow(2).mean((1, 2))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ATTENDING)
def test_what_lets_a_token_see_another_is_found(kind, training):
    """However far and whichever way it sees; so is what cannot be compared."""
    layer = ATTENDING[kind]
    layer = layer if isinstance(layer, nn.Module) else Layer(layer)
    assert mixes(Model(layer).train(training), training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ALONE)
def test_what_works_on_each_token_or_mixes_in_a_known_way_is_none(kind, training):
    """Convolutions, recurrences, norms and poolings of torch are no attention."""
    layer = ALONE[kind]
    layer = layer if isinstance(layer, nn.Module) else Layer(layer)
    assert not mixes(Model(layer).train(training), training=training)


@pytest.mark.parametrize(
    ("tokens", "pairs"),
    [
        (2, [(0, 1)]),
        (2, [(1, 0)]),
        (3, [(2, 0)]),
        (4, [(1, 0), (3, 2)]),
        (4, [(0, 1), (2, 3)]),
    ],
)
def test_few_tokens_that_see_few_others_are_found(tokens, pairs):
    """The first of two that sees the second, the last of three that sees the first, and windows of two."""

    def layer(x, up):
        seen = torch.zeros_like(x)
        for one, other in pairs:
            seen[:, one] = up(x[:, other])
        return x + seen

    x = torch.randn(1, tokens, WIDTH)
    assert mixes(Model(Layer(layer, nn.Linear(WIDTH, WIDTH))), x)
    assert not mixes(Model(Layer(lambda x, up: x + up(x), nn.Linear(WIDTH, WIDTH))), x)


class Given(nn.Module):
    """A layer that is given other things before the states."""

    def __init__(self, layer, *before):
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, x):
        return self.layer(*self.before, x)


@pytest.mark.parametrize("before", [torch.arange(TOKENS).expand(2, -1), torch.ones(WIDTH)])
def test_the_states_are_changed_whatever_stands_before_them(before):
    """Numbers of positions, or a vector of scales: the tokens are what has more dimensions and is no number."""
    assert mixes(Given(Layer(lambda before, x: by_hand(x)), before))
    assert not mixes(Given(Layer(lambda before, x: 2 * x), before))


def test_what_is_no_tensor_is_passed_on():
    """A number, a flag, nothing, and a tensor without dimensions are no tokens."""
    given = 0.5, True, None, torch.tensor(2.0)
    assert not mixes(Given(Layer(lambda factor, flag, nothing, scale, x: x * factor * scale), *given))
    assert not mixes(Given(Layer(lambda *given: given[-1]), *given), torch.tensor(1.0))


def test_a_matrix_that_rows_are_multiplied_by_is_no_other_sequence():
    """Without a dimension for the sequences, as in a router over a table of experts."""
    rows, table = torch.randn(TOKENS, WIDTH), torch.randn(3, WIDTH)
    assert not mixes(Given(Layer(lambda table, x: x @ table.T), table), rows)
    assert not mixes(Model(Layer(lambda x, table: x @ table.T), table), rows)


def test_an_image_with_its_channels_in_front():
    """A convolution of 1 x 1 mixes the channels, which are no positions."""
    image = torch.randn(2, WIDTH, 4, 4)
    conv = nn.Conv2d(WIDTH, WIDTH, 1)
    model = Model(Layer(lambda x, one: x + one(x), conv))
    model.first = nn.Identity()
    assert not mixes(model, image)
    model.layer = Layer(lambda x, one: x + one(by_hand(x.flatten(2).mT.contiguous()).mT.reshape(x.shape)), conv)
    assert mixes(model, image)


def test_what_is_seen_of_another_sequence_counts():
    """Attention between two; a condition of one vector is none."""
    context = torch.randn(2, 3, WIDTH)

    def crossed(x, context):
        weights = (x.unsqueeze(2) * context.unsqueeze(1)).sum(-1).exp()
        return x + (weights.unsqueeze(-1) * context.unsqueeze(1)).sum(2) / weights.sum(-1, keepdim=True)

    assert mixes(Model(Layer(crossed), context))
    assert mixes(Model(Layer(crossed), context=context))
    assert not mixes(Model(Layer(lambda x, context: x), context))
    assert not mixes(Model(Layer(lambda x, shift: x + shift), torch.randn(2, 1, WIDTH)))


def test_numbers_of_tokens_are_changed_as_well():
    """An embedding is no attention, one that adds what came before may be."""
    ids = torch.randint(0, 10, (2, TOKENS))
    for function, expected in ((lambda x, table: table(x), False), (lambda x, table: table(x).cumsum(1), True)):
        model = Model(Layer(function, nn.Embedding(10, WIDTH)))
        model.first = nn.Identity()
        assert mixes(model, ids) is expected


def test_what_cannot_be_asked_counts():
    """A module that the call does not reach, one that raises, and a model of which no call was kept."""
    model = Model(Layer(lambda x: x))
    assert mixing_modules(model, [], ["layer"]) == {"layer"}
    model.other = nn.Identity()
    call = ModelCall(module=model, arguments={"x": torch.randn(2, TOKENS, WIDTH)})
    assert mixing_modules(model, [call], ["layer", "other"]) == {"other"}
    once = iter([torch.zeros(2, TOKENS, WIDTH)])
    model.layer = Layer(lambda x: x + next(once))
    assert mixing_modules(model, [call], ["layer"]) == {"layer"}


def test_the_model_is_left_as_it_was():
    """Modes, hooks, statistics of the caller's snapshot aside, and random numbers."""
    model = Model(Layer(lambda x, drop: drop(by_hand(x)), nn.Dropout(0.5)))
    model.layer.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    call = ModelCall(module=model, arguments={"x": torch.randn(2, TOKENS, WIDTH)})
    state = torch.get_rng_state()
    mixing_modules(model, [call], ["layer"])
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.layer.training) == (True, False)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
