"""The injected slow-down is real work of known size, and changes no number but the time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import WIDTH, SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.step import TrainStep

ROWS = 7  # no other product here has as many
WORKLOAD = Workload(sequence_length=32, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1)
VARIANTS = {
    "plain": LoraVariant(name="plain", r=4, dtype="float32", lora_dropout=0.1, learning_rate=3e-3),
    "nf4": LoraVariant(name="nf4", r=4, quantization="nf4", lora_dropout=0.1, target_modules=("q_proj", "v_proj")),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """One token file."""
    return prepare(WORKLOAD, tmp_path_factory.mktemp("tokens")).path


@pytest.fixture
def built(tokens):
    """A function that builds a trial with so many rows of extra work: the trainee, its stream and its step."""
    torch.set_num_threads(1)

    def make(variant, rows):
        request = TrialRequest(
            trial="t", variant=variant, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
            interleaving="lockstep", measures=("steps",), device="cpu", threads=1, tokens_path=tokens, scratch="",
            log_path="", slowdown_rows=rows,
        )  # fmt: skip
        trainee = build(request, steps=10, shared=SharedBase())
        stream = TokenStream(Path(tokens), WORKLOAD, variant, "cpu")
        return trainee, stream, TrainStep(trainee, stream, variant, "cpu")

    return make


class Products(TorchDispatchMode):
    """Counts matrix products by their two shapes and dtype."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen[tuple(args[0].shape), tuple(args[1].shape), args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


def products(step):
    """What one training step multiplies."""
    with Products() as counter:
        step()
    return counter.seen


@pytest.mark.parametrize("name", VARIANTS)
def test_every_adapted_layer_multiplies_once_more(built, name):
    """One small product of that many rows in float32 for each, and nothing else is added."""
    trainee, _, step = built(VARIANTS[name], ROWS)
    layers = [module for module in trainee.model.modules() if isinstance(module, LoraLayer)]
    added = products(step) - products(built(VARIANTS[name], 0)[2])
    assert added == {((ROWS, WIDTH), (WIDTH, WIDTH), torch.float32): len(layers)}
    assert len(layers) == 4 * (2 if name == "nf4" else 7)


@pytest.mark.parametrize("name", ["plain"])
def test_losses_and_gradients_are_the_same_to_the_bit(built, name):
    """Dropout included: the extra work touches neither the result nor the random numbers."""

    def trained(rows):
        trainee, stream, step = built(VARIANTS[name], rows)
        losses = [float(step()) for _ in range(3)]
        step.loss(stream.take()).backward()
        return losses, {key: p.grad for key, p in trainee.model.named_parameters() if p.grad is not None}

    (losses, gradients), (slowed, slowed_gradients) = trained(0), trained(ROWS)
    assert losses == slowed
    assert gradients
    assert gradients.keys() == slowed_gradients.keys()
    assert all(torch.equal(gradients[key], slowed_gradients[key]) for key in gradients)
