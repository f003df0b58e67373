"""Only gradients that the watched calls produced count, whatever lies there; the hooks leave no trace."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_check.observation.gradients import Gradients, largest


@pytest.fixture
def instrument():
    """No step is profiled or spied on here."""
    return "spy"


@pytest.fixture
def model():
    """Two layers, with gradients from before."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    made(torch.ones(3, 4)).square().sum().backward()
    return made


def backward(model):
    model(torch.ones(3, 4)).square().sum().backward()


def watch(model, call):
    gradients = Gradients(model)
    with gradients.watched():
        gradients.begin_call()
        call()
        gradients.end_call()
    return gradients


@pytest.mark.parametrize(
    "stale",
    [
        lambda model: None,
        lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        lambda model: model.zero_grad(set_to_none=False),
        lambda model: model[0](torch.ones(1, 4)),
    ],
    ids=["kept", "clipped", "zeroed", "forward only"],
)
def test_a_gradient_from_before_does_not_count(model, stale):
    """Neither left alone, nor scaled or zeroed in place."""
    assert watch(model, lambda: stale(model)).seen() == {}


def test_a_gradient_of_this_call_counts_also_where_one_lay_there(model):
    """Before it is added to what was there, and also if nothing is left of it at the end."""

    def call():
        backward(model)
        model.zero_grad()

    seen = watch(model, call).seen()
    assert set(seen) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(one.nonzero and one.finite and one.produced for one in seen.values())


def test_one_layer_of_two_is_reached(model):
    """By name, in the last call."""
    gradients = watch(model, lambda: model[1](torch.ones(3, 4)).sum().backward())
    assert gradients.reached() == {"1.weight", "1.bias"}


@pytest.mark.parametrize(("factor", "nonzero", "finite"), [(0.0, False, True), (float("inf"), True, False)])
def test_what_a_gradient_holds(model, factor, nonzero, finite):
    """Zero everywhere, or not finite."""
    seen = watch(model, lambda: (model(torch.ones(3, 4)) * factor).sum().backward()).seen()["1.bias"]
    assert (seen.nonzero, seen.finite) == (nonzero, finite)


def test_torch_autograd_grad_is_seen(model):
    """It writes no gradient itself, and what is put there then was seen to arrive."""

    def call():
        found = torch.autograd.grad(model(torch.ones(3, 4)).square().sum(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient

    assert all(one.produced for one in watch(model, call).seen().values())


def test_a_gradient_put_there_by_hand_is_told_apart(model):
    """Nobody knows what it comes from; the same one, still there, is from before."""

    def call():
        model[0].weight.grad = torch.ones(4, 4)

    seen = watch(model, call).seen()
    assert {name: one.produced for name, one in seen.items()} == {"0.weight": False}


def test_a_parameter_that_trains_only_inside_the_step_is_seen():
    """Switching adapters inside a step switches what requires gradients."""
    layer = torch.nn.Module()
    layer.base_layer = torch.nn.Linear(2, 2)
    layer.lora_A = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    layer.base_layer.requires_grad_(False)

    def call():
        assert layer.base_layer.weight._backward_hooks is None
        layer.lora_A.requires_grad_(True)
        layer.lora_A.sum().backward()

    seen = watch(layer, call).seen()["lora_A"]
    assert seen.nonzero
    assert seen.produced


def test_an_optimizer_in_the_backward_pass_takes_nothing_away(model):
    """It steps and drops each gradient as soon as it is there."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    assert len(watch(model, lambda: backward(model)).seen()) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_come_off_whatever_raises(model, fails):
    """Hooks of the user's stay; where there were none, there is nothing left of ours."""
    told = []
    model[0].weight.register_hook(lambda gradient: told.append(1) if gradient is not None else None)
    before = {name: parameter._backward_hooks for name, parameter in model.named_parameters()}

    def call():
        backward(model)
        if fails:
            raise RuntimeError("the step")

    if fails:
        with pytest.raises(RuntimeError, match="the step"):
            watch(model, call)
    else:
        watch(model, call)
    assert {name: parameter._backward_hooks for name, parameter in model.named_parameters()} == before
    assert len(model[0].weight._backward_hooks) == 1
    assert model[1].weight._backward_hooks is None
    assert told == [1]


def test_compiled_code_is_not_compiled_again_for_the_hooks(model):
    """Hooks of parameters are none of the graph."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    backward(compiled)
    counters.clear()
    gradients = watch(model, lambda: backward(compiled))
    backward(compiled)
    assert counters["stats"]["unique_graphs"] == 0
    assert len(gradients.seen()) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reaches_the_hooks_once(model, reentrant):
    """The recomputed graph ends in the same parameters."""
    from torch.utils.checkpoint import checkpoint

    inputs = torch.ones(3, 4, requires_grad=True)
    gradients = watch(model, lambda: checkpoint(model, inputs, use_reentrant=reentrant).sum().backward())
    assert [len(sizes) for sizes in gradients._sizes.values()] == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("gradient", "size"),
    [
        (torch.tensor([1.0, -3.0]), 3.0),
        (torch.zeros(2, 2), 0.0),
        (torch.tensor([1.0, -3.0]).to_sparse(), 3.0),
        (torch.zeros(3).to_sparse(), 0.0),
        (torch.eye(2).to_sparse_csr(), 1.0),
        (torch.tensor([1.0, float("-inf")]), float("inf")),
        (torch.full((2,), 60000.0, dtype=torch.float16), 60000.0),
        (torch.zeros(0), 0.0),
    ],
)
def test_the_largest_magnitude(gradient, size):
    """Of every layout, without overflow in a narrow dtype."""
    assert float(largest(gradient)) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_a_number_is_not_finite(dtype):
    """It would compare with nothing."""
    assert not float(largest(torch.tensor([1.0, float("nan"), 2.0], dtype=dtype))) < float("inf")


def test_an_embedding_with_sparse_gradients_is_seen():
    """Duplicate rows cancel out only where they are summed."""
    model = torch.nn.Embedding(5, 2, sparse=True)
    rows, signs = torch.tensor([1, 1]), torch.tensor([[1.0], [-1.0]])
    assert watch(model, lambda: model(rows).sum().backward()).seen()["weight"].nonzero
    assert not watch(model, lambda: (model(rows) * signs).sum().backward()).seen()["weight"].nonzero


def test_a_hook_that_the_step_sets_stays(model):
    """Whoever set it takes it off."""
    watch(model, lambda: model[1].weight.register_hook(lambda gradient: None))
    assert len(model[1].weight._backward_hooks) == 1


def test_a_gradient_that_is_told_of_after_it_was_written_counts(model):
    """As that of a shard; one that an optimizer has dropped by then arrived all the same."""
    gradients = Gradients(model)
    gradients._written(model[0].weight)
    model[1].weight.grad = None
    gradients._written(model[1].weight)
    assert gradients.seen().keys() == {"0.weight"}
    assert gradients.reached() == {"0.weight", "1.weight"}


class Watching(TorchDispatchMode):
    """Keeps every operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nobody_sees_a_plain_gradient_being_read(dtype):
    """There are hundreds in a backward pass, and who watches it would slow each down."""
    gradient = torch.ones(2, dtype=dtype)
    with Watching() as watching:
        largest(gradient)
    assert not watching.seen
