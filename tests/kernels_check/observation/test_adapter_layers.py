"""Adapters are told from their base by the layers that hold them; of several, only the active one is judged."""

import copy

import peft
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from kernels_check.observation.adapter_layers import (
    Below,
    adapter_layers,
    adapter_parameters,
    base_parameters,
    trained_parameters,
    written_by_method,
)

ADAPTERS = {
    "default": {"r": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 16, "lora_dropout": 0.2, "target_modules": "all-linear"},
    "narrow": {"r": 2, "lora_dropout": 0.0, "target_modules": ["down_proj"]},
}
LAYERS = {"default": 4, "wide": 14, "narrow": 2}


@pytest.fixture
def shared(training):
    """One base with three adapters, each with an optimizer that has stepped; returns activate(name) -> run."""
    run = training()
    for name in list(ADAPTERS)[1:]:
        run.model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
    run.optimizers = {}

    def activate(name):
        run.model.set_adapter(name)
        if name not in run.optimizers:
            trained = [value for value in run.model.parameters() if value.requires_grad]
            run.optimizers[name] = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        run.optimizer = run.optimizers[name]
        return run

    for name in ADAPTERS:
        activate(name).step()
    return activate


def _requirements(name):
    return {
        **{"attention.backend": "fused", "base.bits": 4, "base.quant_type": "nf4", "base.frozen": True},
        **{"lora.attached": True, "lora.learning": True, "lora.dropout": ADAPTERS[name]["lora_dropout"]},
        **{"lora.dtype": "float32", "optimizer.class": "torch.optim.AdamW", "optimizer.fused": True, "mode": "train"},
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_in_turn_is_active_throughout(shared, name):
    """Its own rank, dropout and targets are what is found; the inactive ones are no fault of it."""
    run = shared(name)
    assert len(adapter_layers(run.model)) == LAYERS[name]
    checks = {check.path: check for check in run.verify(_requirements(name))}
    failed = [(path, checks[path].reason) for path in _requirements(name) if not checks[path].met]
    assert failed == []
    assert f"adapter {name} enabled, unmerged and executed in {LAYERS[name]} layers" in checks["lora.attached"].reason
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} trainable parameters" in checks["lora.learning"].reason


def test_verifying_one_leaves_the_others_untouched(shared):
    """Weights, gradients' absence, optimizer states, flags, active adapter and random numbers, to the bit."""
    run = shared("wide")
    weights = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    flags = {name: value.requires_grad for name, value in run.model.named_parameters()}
    gradients = {name: copy.deepcopy(value.grad) for name, value in run.model.named_parameters()}
    states = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in run.optimizers.items()})
    random = torch.get_rng_state()
    run.verify(_requirements("wide"))
    for name, value in run.model.named_parameters():
        assert torch.equal(value, weights[name]), name
        assert value.requires_grad is flags[name], name
        before = gradients[name]
        assert (value.grad is None) if before is None else torch.equal(value.grad, before), name
    for name, optimizer in run.optimizers.items():
        for key, state in optimizer.state_dict()["state"].items():
            for field, held in state.items():
                assert torch.equal(held, states[name]["state"][key][field]), (name, key, field)
    assert torch.equal(torch.get_rng_state(), random)
    assert run.model.active_adapter == "wide"


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_disabled_adapter_is_caught_among_several(shared, name):
    """Other adapters in the same layers do not stand in for it."""
    run = shared(name)
    run.model.base_model.disable_adapter_layers()
    for parameter, value in run.model.named_parameters():
        value.requires_grad_(f".{name}." in parameter or parameter.endswith("norm.weight"))
    check = run.check("lora.attached", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert f"adapters disabled in {LAYERS[name]} of {LAYERS[name]} layers" in check.reason


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_frozen_adapter_is_caught_among_several(shared, name):
    """An active adapter that is frozen while an inactive one is trainable does not learn."""
    run = shared(name)
    other = next(key for key in ADAPTERS if key != name)
    for parameter, value in run.model.named_parameters():
        value.requires_grad_(f".{other}." in parameter or parameter.endswith("norm.weight"))
    check = run.check("lora.learning", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} parameters frozen" in check.reason


def test_the_optimizer_of_another_adapter_is_caught(shared):
    """Gradients reach the active adapter, but the optimizer that steps updates another."""
    run = shared("narrow")
    run.optimizer = run.optimizers["default"]
    check = run.check("lora.learning", True)
    assert check.status == "fallback"
    assert "4 of 4 parameters not given to the optimizer" in check.reason


def test_one_optimizer_for_all_adapters_keeps_the_state_of_the_inactive(shared):
    """A shared optimizer judges as well, and the moments of the adapters that rest stay as they were."""
    run = shared("default")
    every = [value for name, value in run.model.named_parameters() if "lora_" in name]
    run.optimizer = torch.optim.AdamW(every, lr=1e-3, fused=True)
    for name in ADAPTERS:
        run.model.set_adapter(name)
        run.step()
    before = copy.deepcopy(run.optimizer.state_dict()["state"])
    checks = {check.path: check for check in run.verify({"lora.learning": True, "base.frozen": True})}
    assert checks["lora.learning"].met, checks["lora.learning"].reason
    assert checks["base.frozen"].met, checks["base.frozen"].reason
    for key, state in run.optimizer.state_dict()["state"].items():
        for field, held in state.items():
            assert torch.equal(held, before[key][field]), (key, field)


def test_dropout_of_an_inactive_adapter_is_not_counted(shared):
    """The active adapter has none; asking for the other's probability fails."""
    run = shared("narrow")
    check = run.check("lora.dropout", 0.2)
    assert (check.status, check.observed) == ("fallback", 0.0)


class Wrapper(torch.nn.Module):
    """A class of one's own that keeps the model under a name which begins like a factor of LoRA."""

    def __init__(self, model):
        super().__init__()
        self.lora_model = model

    def forward(self, **inputs):
        return self.lora_model(**inputs)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_held_under_a_name_like_a_factor_is_a_base(training, trained):
    """`self.lora_model` makes no adapter of the base: one that trains is caught, its frozen twin passes."""
    run = training()
    run.model = Wrapper(run.model)
    if trained:
        norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
        norm.requires_grad_(True)
        run.optimizer.add_param_group({"params": [norm], "lr": 0.1})
    checks = {check.path: check for check in run.verify({"base.frozen": True, "lora.learning": True})}
    assert checks["lora.learning"].met, checks["lora.learning"].reason
    assert checks["base.frozen"].status == ("fallback" if trained else "active")
    assert "0.0 MiB" not in checks["base.frozen"].reason
    if trained:
        assert "1 base parameters require gradients: lora_model.base_model" in checks["base.frozen"].reason


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_what_lora_adds_is_the_adapters(training, more):
    """Factors, magnitudes and biases, of every adapter: all that get_peft_model added, and nothing that was there."""
    run = training(quant=None)
    run.model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **more))
    own = adapter_parameters(run.model)
    assert own == {name for name, _ in run.model.named_parameters() if "lora_" in name}
    assert any("magnitude" in name for name in own) is ("use_dora" in more)
    names = {name for name, _ in run.model.unload().named_parameters()}
    bare = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in base_parameters(run.model)}
    assert bare <= names | {f"base_model.model.{name}" for name in names}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (peft.LoraConfig(target_modules=["1"], modules_to_save=["2"]), {"lora_A", "lora_B", "modules_to_save"}),
        (
            peft.LoraConfig(target_modules=["2"], trainable_token_indices={"0": [1]}),
            {"lora_A", "trainable_tokens_delta"},
        ),
        (peft.LoKrConfig(target_modules=["2"]), {"lokr_w1", "lokr_w2"}),
        (peft.IA3Config(target_modules=["2"], feedforward_modules=[]), {"ia3_l"}),
    ],
    ids=["modules_to_save", "tokens", "LoKr", "IA3"],
)
def test_peft_says_what_is_an_adapters(config, expected):
    """Copies that are trained beside the factors, and methods other than LoRA, of which no name is known here."""
    layers = [torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    own = adapter_parameters(model)
    assert {name for name, value in model.named_parameters() if value.requires_grad} <= own
    assert expected <= {part for name in own for part in name.split(".")}
    assert base_parameters(model).keys() == {name for name, _ in model.named_parameters()} - own
    assert len(base_parameters(model)) == 5


def test_a_factor_of_a_class_of_ones_own_is_an_adapters():
    """Without a list of its attributes, what begins with `lora_` beside a wrapped layer is; elsewhere it is not."""
    layer = torch.nn.Module()
    layer.base_layer = torch.nn.Linear(4, 4)
    layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})
    layer.lora_scale = torch.nn.Parameter(torch.ones(1))
    model = torch.nn.ModuleDict({"own": layer, "lora_head": torch.nn.Linear(4, 4, bias=False)})
    own = {"own.lora_scale", "own.lora_A.default.weight", "own.lora_A.default.bias"}
    assert adapter_parameters(model) == own
    assert base_parameters(model).keys() == {"own.base_layer.weight", "own.base_layer.bias", "lora_head.weight"}


def test_what_is_below_a_path_is_told_by_whole_names():
    """Also where a name holds a dot that is no step, and never by the beginning of a word."""
    below = Below(["a.lora", "b"])
    assert [name for name in ("a", "a.lora", "a.lora.x.y", "a.lora_x", "b.c", "bc", "") if below[name]] == [
        *("a.lora", "a.lora.x.y", "b.c"),
    ]


def _layers(config):
    torch.manual_seed(0)
    return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), config)


@pytest.mark.parametrize("trainable", [False, True])
def test_adapters_that_xlora_freezes_need_not_learn(trainable):
    """Over frozen adapters only its router has to; where they train, or another froze them, they have to."""
    model = _layers(peft.LoraConfig(r=2, target_modules=["0", "1"]))
    for value in model.parameters():
        value.requires_grad_(False)
    assert len(trained_parameters(model)) == 4
    model.base_model.xlora_config = peft.XLoraConfig(hidden_size=4, adapters={}, use_trainable_adapters=trainable)
    assert len(trained_parameters(model)) == (4 if trainable else 0)
    model.base_model.model[0].lora_A["default"].weight.requires_grad_(True)
    assert len(trained_parameters(model)) == (4 if trainable else 1)


def test_only_adalora_is_allowed_to_write_between_updates():
    """To its own values: an attribute of that name on another module excuses nothing."""
    sizes = {"init_r": 2, "target_r": 1, "total_step": 100, "tinit": 10, "tfinal": 10}
    model = _layers(peft.AdaLoraConfig(target_modules=["0", "1"], **sizes))
    values = {id(value) for name, value in model.named_parameters() if ".lora_E." in name}
    assert len(values) == 2
    assert written_by_method(model) == values
    other = torch.nn.Module()
    other.rankallocator, other.lora_E = "none", torch.nn.ParameterDict({"default": torch.zeros(2, 1)})
    assert written_by_method(other) == frozenset()
    lora = _layers(peft.LoraConfig(r=2, target_modules=["0"]))
    lora.base_model.model[0].lora_E = other.lora_E
    assert written_by_method(lora) == frozenset()


@pytest.mark.parametrize("rows", [2, 0])
def test_a_factor_of_which_nothing_lies_here_has_not_to_learn(rows):
    """A rank of several may hold no row of a small factor that is sharded; a plain one is always here."""
    model = _layers(peft.LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight = torch.nn.Parameter(TwoTensor(torch.zeros(rows, 4), torch.zeros(rows, 4)))
    layer.lora_B["default"].weight = torch.nn.Parameter(torch.zeros(4, rows))
    names = {name.rpartition("model.")[2] for name in trained_parameters(model)}
    assert names == ({"0.lora_A.default.weight"} if rows else set()) | {"0.lora_B.default.weight"}
