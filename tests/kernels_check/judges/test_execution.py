"""Tests that recomputation, compilation and modes are observed in the step and not read from flags.

Tests that recomputation is judged block by block, whatever API enabled it.

Tests that fused kernels count where they are bound and called, on constructed evidence, since real ones need a
GPU.
"""

from functools import partial

import pytest
import torch
from negative_controls.small_run import forget_compilations
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels_check
from kernels_check.judges.execution import judge_fused
from kernels_check.observe.execution import FusedKernelSite


def test_tf32_cannot_run_without_cuda(training):
    """False is met, true is absent, and the reason quotes the flag; mixing the old and the new switches is not an
    error."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    run = training()
    assert run.check("tf32", False).met
    check = run.check("tf32", True)
    assert check.status == "absent"
    assert "fp32_precision" in check.reason


def test_compiled_regions_are_counted_and_checks_stay_sound(training):
    """In a compiled model, which calls no hook, gradients prove the adapter, and nothing is recompiled."""
    from torch._dynamo.utils import counters

    run = training(quant=None)
    inner = run.model
    run.model = torch.compile(inner, backend="eager")
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    requirements = {
        **{"compile": True, "peft.attached": True, "peft.learning": True, "peft.dropout": 0.05, "mode": "train"},
        "attention.dtype": "bfloat16",
    }
    checks = run.verify(requirements)
    assert [(check.path, check.reason) for check in checks if check.required is not None and not check.met] == []
    run.step()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


_compile = partial(torch.compile, backend="eager", dynamic=False)


@pytest.fixture
def compiled():
    """A function that judges ``compile`` of a layer by its last step, after steps with the given numbers of rows."""

    def judge(layer, *rows, forward=None, required=True):
        forget_compilations()
        forward = forward or _compile(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def step(rows=rows[-1]):
            optimizer.zero_grad()
            forward(torch.ones(rows, 4)).sum().backward()
            optimizer.step()

        for count in rows:
            step(count)
        checks = kernels_check.verify(layer, step, {"compile": required})
        return next(check for check in checks if check.path == "compile")

    yield judge
    forget_compilations()


def test_a_compiled_model_that_runs_eagerly_in_part_is_caught(compiled):
    """One function gets the length of its compilation, the other exceeds the recompile limit."""
    layer = torch.nn.Linear(4, 4)
    doubled, shifted = _compile(lambda value: value * 2), _compile(lambda value: value + 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        check = compiled(
            layer, 3, 4, forward=lambda value: doubled(layer(value)).sum() + shifted(layer(value[:3])).sum()
        )
    assert (check.status, check.observed) == ("fallback", False)
    assert "1 compiled regions entered, 2 compiler cache look-ups; 0 of 1 blocks ran in compiled code" in check.reason
    assert "part of the code ran eagerly" in check.reason


WIDTH = 8


class Attention(nn.Module):
    """Causal attention of one head."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        parts = (part.unsqueeze(1) for part in self.mix(hidden).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(*parts, is_causal=True).squeeze(1))


class Block(nn.Module):
    """A block that is recomputed in the given way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.attention = way, Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden):
        if self.way == "function inside":
            return checkpoint(self.inner, hidden, use_reentrant=False)
        return self.inner(hidden)

    def inner(self, hidden):
        hidden = hidden + self.attention(hidden)
        return hidden + self.mlp(hidden)


def keep_attention(context, operator, *given, **named):
    kept = "scaled_dot_product" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


OPTIONS = {
    "all": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep_attention)},
}


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, *ways):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(Block(way) for way in ways)

    def forward(self, ids):
        hidden, way = self.embed(ids), self.layers[0].way
        if way == "one function":
            return self.head(checkpoint(self.through, hidden, use_reentrant=False))
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, **OPTIONS[layer.way]) if layer.way in OPTIONS else layer(hidden)
        return self.head(hidden)

    def through(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def judge():
    """A function that returns the checks by path of a step with the given number of micro-batches."""

    def judged(model, *, passes=1, entry=None, aside=lambda: None):
        entry = entry or model
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        ids = torch.randint(5, (2, 4))

        def step():
            optimizer.zero_grad()
            aside()
            for _ in range(passes):
                entry(ids).sum().backward()
            optimizer.step()

        required = {"checkpointing": True, "checkpointing.layers": 0.5, "attention.backend": "flash", "mode": "train"}
        return {check.path: check for check in kernels_check.verify(model, step, required)}

    return judged


@pytest.mark.parametrize("way", ["all", "reentrant", "selective", "function inside", "one function"])
def test_every_way_of_recomputing_is_seen(judge, way):
    """Recomputation may be reentrant or not, selective, inside the block, or one function over several blocks."""
    checks = judge(Model(way, way), passes=2)
    assert checks["checkpointing"].met, checks["checkpointing"].reason
    assert checks["checkpointing.layers"].observed == 1.0
    assert "2 of 2 blocks computed again" in checks["checkpointing"].reason
    assert checks["attention.backend"].met, checks["attention.backend"].reason


def test_nothing_recomputed_is_absent(judge):
    """An evaluation with gradients off is not a recomputation."""
    model = Model("none", "none")

    def evaluate():
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
        model.train()

    checks = judge(model, aside=evaluate)
    assert (checks["checkpointing"].status, checks["checkpointing.layers"].observed) == ("absent", 0.0)
    assert checks["mode"].met, checks["mode"].reason


def test_blocks_that_take_no_gradient_need_no_recomputation(judge):
    """Frozen blocks at the front save no activations."""
    model = Model("none", "all")
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    check = judge(model)["checkpointing"]
    assert check.met, check.reason
    assert "1 further blocks receive no gradient" in check.reason


def test_a_model_that_a_reentrant_function_recomputes_counts_as_trained(judge):
    """The model is called with gradients off, but still counts as trained."""
    model = Model("none", "none")
    start = torch.zeros(2, 4, WIDTH, requires_grad=True)
    checks = judge(model, entry=lambda _: model.head(checkpoint(model.through, start, use_reentrant=True)))
    assert checks["checkpointing"].met, checks["checkpointing"].reason
    assert checks["attention.backend"].met, checks["attention.backend"].reason


def _place(kind="rms_norm", library="liger_kernel", *, called=True, hidden=False, name="norm"):
    return FusedKernelSite(kind=kind, name=name, library=library, called=called, hidden=hidden)


def _judge(make_observation, required, *places, **given):
    observation = make_observation(**given)
    vars(observation)["fused_kernel_sites"] = list(places)  # what the property has cached
    return judge_fused(observation, required).against("fused.kernels", required)


def test_unbound_places_are_counted(training):
    """Each kind is listed with its number of places, and none is required."""
    check = training().check("fused.kernels")
    assert (check.status, check.observed) == ("not_applicable", None)
    assert check.reason == "loss 0 of 1, rope 0 of 2, qkv 0 of 2, o 0 of 2, mlp 0 of 2, rms_norm 0 of 5"


def test_rope_is_recognised_by_the_function_that_attention_names(training, monkeypatch):
    """Liger replaces the function in the module of the model's code."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb

    def rotary(*args, **kwargs):
        return own(*args, **kwargs)

    rotary.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    check = training().check("fused.kernels", "rope")
    assert check.met, check.reason
    assert "rope 2 of 2 of liger_kernel" in check.reason


def test_a_profile_without_its_kernels_contradicts(make_observation):
    """A bound and called kernel is absent if the profile shows other kernels only."""
    without = _judge(make_observation, "rms_norm", _place(), kernels={"GEMM-BF16": 4})
    assert (without.status, without.observed) == ("absent", None)
    assert "no kernel of liger_kernel was launched" in without.reason
    assert _judge(make_observation, "rms_norm", _place(), kernels={"LIGER": 4}).met
    unknown_rule = _judge(make_observation, "rms_norm", _place(library="apex"), kernels={"GEMM-BF16": 4})
    assert unknown_rule.met, unknown_rule.reason


@pytest.mark.parametrize(
    ("places", "required", "status"),
    [
        ([_place(), _place(called=False)], "rms_norm", "fallback"),
        ([_place(), _place(library=None)], "rms_norm", "fallback"),
        ([_place(called=False)], "rms_norm", "absent"),
        ([_place(hidden=True, called=False)], "rms_norm", "unknown"),
        ([_place(), _place("mlp", hidden=True, called=False)], "rms_norm", "active"),
        ([_place()], "rms_norm+rope", "fallback"),
        ([_place()], "rmsnorm", "fallback"),
        ([], "rms_norm", "absent"),
    ],
)
def test_all_places_of_each_required_kind_must_be_fused(make_observation, places, required, status):
    """All places of each required kind must be fused, and no place meets a misspelt kind."""
    assert _judge(make_observation, required, *places).status == status
