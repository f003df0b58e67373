"""What stands for an embedding or a norm, and what the steps have made of each of its parameters."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kernels_check.observation.adapter_updates import ParameterUpdates
from kernels_check.observation.gradients import GradientSeen
from kernels_check.observation.module_tree import ModelTree
from kernels_check.observation.optimizers import OptimizerSeen
from kernels_check.observation.trained_parts import PartSeen, Place, TrainingSeen, embeddings, fates_of, norms

LLAMA = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
NONZERO, ZERO = GradientSeen(nonzero=True, finite=True), GradientSeen(nonzero=False, finite=True)


def _adapted(*, tied=False, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    return ModelTree.of(peft.get_peft_model(model, lora))


def _names(tree, places):
    names = {id(value): name.removeprefix("base_model.model.") for name, value in tree.parameters}
    return [[names[id(value)] for value in place.values] for place in places.values()]


def _optimizer(value, rate):
    return OptimizerSeen(
        classes=("torch.optim.AdamW",), learning_rates=(rate,), parameters=frozenset({id(value)}), state_bytes=0,
        paged_bytes=0, claims_paged=False, fused_requested=None, on_cpu=True,
    )  # fmt: skip


def _fate(*, gradient=NONZERO, changed=False, rates=(0.1,), known=None, trains=True):
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.requires_grad_(trains)
    seen = TrainingSeen(
        changed={"weight"} if changed else set(),
        gradients={} if gradient is None else {"weight": gradient},
        updates={} if known is None else {"weight": known},
        optimizers=tuple(_optimizer(model.weight, rate) for rate in rates),
    )
    (part,) = fates_of({"": Place(values=[model.weight])}, ModelTree.of(model), seen)
    return part.fates["weight"]


@pytest.mark.parametrize(
    ("given", "fate"),
    [
        ({"changed": True}, "updated"),
        ({"changed": True, "trains": False}, "frozen"),
        ({"changed": True, "rates": ()}, "updated"),
        ({"gradient": None}, "without gradient"),
        ({"gradient": None, "changed": True}, "changed, no gradient seen"),
        ({"gradient": ZERO}, "gradient zero"),
        ({"gradient": ZERO, "changed": True}, "moved without a gradient"),
        ({"rates": ()}, "not given to an optimizer"),
        ({"rates": (0.0,)}, "given a rate of 0"),
        ({"rates": (0.1, 0.0)}, "unchanged"),
        ({"rates": (0.0, 0.1)}, "unchanged"),
        ({}, "unchanged"),
    ],
)
def test_values_and_gradients_decide_where_no_update_was_compared(given, fate):
    """A change counts by a gradient alone."""
    assert _fate(**given) == fate


@pytest.mark.parametrize(
    ("known", "given", "fate"),
    [
        ({"updates": 2, "fed": 2, "moved": 2, "learnt": 2, "rate": 0.1}, {}, "updated"),
        ({"updates": 2, "fed": 2, "faint": 1, "rate": 0.1}, {}, "updated"),
        ({"updates": 2, "fed": 2, "moved": 2, "stuck": 2, "rate": 0.1}, {"changed": True}, "unchanged"),
        ({"updates": 2, "fed": 0, "moved": 2, "rate": 0.1}, {"changed": True}, "moved without a gradient"),
        ({"updates": 2, "fed": 0, "rate": 0.1}, {}, "gradient zero"),
        (
            {"updates": 3, "fed": 3, "moved": 3, "learnt": 3, "losses": [1, 2], "rate": 0.1},
            {},
            "undone after an update",
        ),
        ({"updates": 2, "fed": 0, "rate": 0.0}, {"rates": (0.0,)}, "given a rate of 0"),
        ({"updates": 0}, {"changed": True}, "updated"),
        ({"updates": 2, "unreadable": "ValueError", "rate": 0.1}, {"changed": True}, "updated"),
    ],
)
def test_updates_of_an_adapter_decide_where_they_were_compared(known, given, fate):
    """What lora.learning says of them."""
    assert _fate(known=ParameterUpdates(**known), **given) == fate


@pytest.mark.parametrize(
    ("fates", "updated", "is_open"),
    [
        (["updated"], True, False),
        (["updated", "frozen"], False, False),
        (["updated", "gradient zero"], False, True),
        (["moved without a gradient"], False, True),
        (["unchanged"], False, False),
    ],
)
def test_a_further_step_may_show_what_had_no_gradient(fates, updated, is_open):
    """And nothing of what is decided."""
    part = PartSeen(name="", fates=dict(enumerate(fates)))
    assert (part.updated, part.open) == (updated, is_open)


def test_tokens_that_train_alone_stand_for_their_embedding():
    """With how many of them there are; the weight below stays frozen by design."""
    tree = _adapted(trainable_token_indices=[1, 2, 3])
    places = embeddings(tree)
    delta = "model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    assert _names(tree, places) == [[delta], ["lm_head.weight"]]
    assert [place.tokens for place in places.values()] == [(3, 48), None]
    tied = _adapted(tied=True, trainable_token_indices=[1, 2])
    assert _names(tied, embeddings(tied)) == [[delta]]


def test_a_batch_without_their_tokens_tells_nothing():
    """Of these parameters alone."""
    tree = _adapted(trainable_token_indices=[1, 2, 3])
    names = [name for name, value in tree.parameters if value.requires_grad]
    shown = TrainingSeen(changed=set(), gradients=dict.fromkeys(names, ZERO), updates={}, optimizers=())
    first, _ = fates_of(embeddings(tree), tree, shown)
    assert list(first.fates.values()) == ["none of its tokens in the batches"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_factors_beside_one_of_two_tied_embeddings_stand_for_both(target):
    """They share the weight that the factors are added to."""
    tree = _adapted(tied=True, target_modules=[target])
    (names,) = _names(tree, embeddings(tree))
    assert len(names) == 2
    assert all("lora_" in name for name in names)


def test_a_copy_of_one_of_two_tied_embeddings_parts_them():
    """The other keeps the weight that both had."""
    tree = _adapted(tied=True, modules_to_save=["embed_tokens"])
    assert len(embeddings(tree)) == 2


def test_a_class_that_builds_on_a_norm_is_one():
    """Whatever it is called; a norm without parameters has nothing to train."""
    affine = type("Affine", (torch.nn.LayerNorm,), {})
    head = type("NormHead", (torch.nn.Linear,), {})
    parts = (affine(4), torch.nn.LayerNorm(4, elementwise_affine=False), torch.nn.Linear(4, 4), head(4, 4))
    assert list(norms(ModelTree.of(torch.nn.Sequential(*parts)))) == ["0"], "a head that is called so is none"
