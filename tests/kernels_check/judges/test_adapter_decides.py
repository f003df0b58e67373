"""Every comparison of what is judged of the adapter decides something."""

import dataclasses

import pytest
import torch

from kernels_check.judges import adapter
from kernels_check.observation.adapter_layers import lora_layers
from kernels_check.observation.observe import GradientSeen, OptimizerSeen

BARE = torch.nn.Identity()
ADAMW = OptimizerSeen(
    classes=("torch.optim.adamw.AdamW",),
    learning_rates=(1e-3,),
    parameters=frozenset(),
    state_bytes=1000,
    paged_bytes=0,
    claims_paged=False,
    fused_requested=None,
    on_cpu=True,
)


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


def test_learning_is_judged_factor_by_factor(seen, training):
    """A gradient that is missing, zero or not finite, each named by itself and only there."""
    run = training()
    layers = lora_layers(run.model)
    factors = {name: weight for layer in layers for letter in "AB" for name, weight in layer.weights(letter)}
    first = next(iter(factors))
    good = GradientSeen(nonzero=True, finite=True)
    stepped = dataclasses.replace(ADAMW, parameters=frozenset(map(id, factors.values())))
    reached = {"gradients": dict.fromkeys(factors, good), "changed": frozenset(factors)}
    sound = seen(model=run.model, optimizers=(stepped,), **reached)

    def judge(**changes):
        check = adapter.judge_learning(dataclasses.replace(sound, **changes), True)
        return check.against("lora.learning", True)

    assert judge().met
    assert judge().reason == f"gradients reached all {len(factors)} factors and every lora_B moved in 2 updates"
    for gradient, words in (
        (GradientSeen(nonzero=False, finite=True), "gradient always zero"),
        (GradientSeen(nonzero=True, finite=False), "gradient not finite"),
    ):
        check = judge(gradients={**sound.gradients, first: gradient})
        assert check.reason == f"1 of {len(factors)} factors {words}: {first}"
    without = {name: good for name in factors if name != first}
    assert judge(gradients=without).reason == f"1 of {len(factors)} factors without gradient: {first}"
    still = judge(changed=frozenset())
    assert still.status == "fallback"
    assert "lora_B unchanged in 4 of 4 layers" in still.reason
    assert "is_trainable" not in still.reason
    resting = dataclasses.replace(stepped, learning_rates=(0.0,))
    assert judge(changed=frozenset(), optimizers=(resting,)).status == "unknown"
    assert judge(optimizers=(resting,)).met


def test_dropout_in_compiled_code_takes_random_numbers_as_proof(seen, training):
    """A module that calls no hook was applied only if something random was drawn in compiled code."""
    run = training()
    modes = {name: True for name, _ in run.model.named_modules()}

    def observed(**more):
        return adapter.judge_dropout(seen(model=run.model, modes=modes, **more), 0.05).observed

    assert observed(regions=1, drew_random=True) == 0.05
    assert observed(regions=1) == 0.0
    assert observed(drew_random=True) == 0.0
    reason = adapter.judge_dropout(seen(model=run.model, modes=modes), 0.05).reason
    assert "but not called" in reason
    assert "model.train()" not in reason


def test_a_remedy_for_idle_targets_is_given_where_nothing_else_is_wrong(seen, training):
    """A disabled adapter is not executed either, and there enabling it is the remedy."""
    run = training()
    assert "choose target_modules" in adapter.judge_attached(seen(model=run.model), True).reason
    run.model.base_model.disable_adapter_layers()
    reason = adapter.judge_attached(seen(model=run.model), True).reason
    assert "enable_adapter_layers()" in reason
    assert "choose target_modules" not in reason


def test_an_adapter_of_another_kind_is_no_lora():
    """LoKr wraps its targets too, and holds no lora_A."""
    import peft

    wrapped = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoKrConfig(target_modules=["0"]))
    assert any(hasattr(module, "base_layer") for module in wrapped.modules())
    assert lora_layers(wrapped) == []


def test_a_lora_layer_is_known_by_what_it_holds():
    """A class of one's own, without the parts for embeddings; factors without a wrapped layer are none."""
    holder = torch.nn.Module()
    holder.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})
    bare = torch.nn.Sequential(holder)
    assert lora_layers(bare) == []
    holder.base_layer = torch.nn.Linear(4, 4)
    (layer,) = lora_layers(bare)
    assert (layer.name, layer.adapters) == ("0", ("default",))


def test_a_dtype_without_weights_says_whether_there_is_an_adapter(seen, training):
    """None at all, or none that is active."""
    assert "no layer carries a LoRA adapter" in adapter.judge_dtype(seen(model=BARE), None).reason
    run = training()
    for layer in lora_layers(run.model):
        layer.module._active_adapter = []
    assert adapter.judge_dtype(seen(model=run.model), None).reason == "no adapter is active"


def test_an_adapter_of_an_embedding_is_seen(seen, entries):
    """PEFT keeps its factors as bare parameters, which call no hook: the layer's call counts, and its gradient."""
    import peft

    base = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    (layer,) = lora_layers(wrapped)
    assert {name.rpartition(".lora_")[2] for name, _ in layer.parts()} >= {"embedding_A.default", "embedding_B.default"}
    assert [name for letter in "AB" for name, _ in layer.weights(letter)] == [
        f"{layer.name}.lora_embedding_A.default",
        f"{layer.name}.lora_embedding_B.default",
    ]
    assert adapter.judge_attached(seen(model=wrapped, modules=entries(layer.name)), True).observed is True
    assert adapter.judge_attached(seen(model=wrapped), True).observed is False
    name = next(name for name, _ in layer.weights("B"))
    gradients = {name: GradientSeen(nonzero=True, finite=True)}
    assert adapter.judge_attached(seen(model=wrapped, gradients=gradients), True).observed is True


def test_a_linear_layer_that_is_called_without_its_factor_is_idle(seen, training, entries):
    """The wrapper's call proves the base only."""
    run = training()
    calls = {layer.name: 1 for layer in lora_layers(run.model)}
    assert adapter.judge_attached(seen(model=run.model, modules=entries(*calls)), True).observed is False
    calls |= {name: 1 for layer in lora_layers(run.model) for name, _ in layer.parts() if ".lora_A." in name}
    assert adapter.judge_attached(seen(model=run.model, modules=entries(*calls)), True).observed is True
