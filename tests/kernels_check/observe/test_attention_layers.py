"""Attention is attributed to the layers of the model that is judged; every layer must have run what is required."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as by_name

import kernels_check

WIDTH, HEADS, TOKENS = 32, 4, 6


def split(x):
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def fused(q, k, v):
    return joined(nn.functional.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True))


def imported_by_name(q, k, v):
    return joined(by_name(split(q), split(k), split(v), is_causal=True))


def forced_to_math(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return imported_by_name(q, k, v)


def written_out(q, k, v):
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return joined(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)


def written_out_in_three_dimensions(q, k, v):
    q, k, v = (split(x).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    return joined((scores.float().softmax(-1).to(v.dtype) @ v).unflatten(0, (-1, HEADS)))


def without_a_mask(q, k, v):
    q, k, v = split(q), split(k), split(v)
    return joined((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def by_hand(q, k, v):
    """No operator tells that it is attention."""
    weights = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).exp()
    return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2) / weights.sum(-1, keepdim=True)


def half_by_hand(q, k, v):
    """The first heads by an operator, the others by none."""
    first, second = zip(*(one.chunk(2, dim=-1) for one in (q, k, v)), strict=True)
    return torch.cat([fused(*first), by_hand(*second)], dim=-1)


def in_two_halves(q, k, v):
    """Of the heads, each by the same operator."""
    return torch.cat([fused(*part) for part in zip(*(one.chunk(2, dim=-1) for one in (q, k, v)), strict=True)], dim=-1)


class Attention(nn.Module):
    """One layer, computing as it is told."""

    def __init__(self, compute):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.compute = compute

    def forward(self, x):
        return x + self.compute(self.q(x), self.k(x), self.v(x))


class Other(Attention):
    """Another class in the same place."""


class Feed(nn.Module):
    """A layer without attention."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.up(x).relu()


class Block(nn.Module):
    """Attention, where there is any, and a feed-forward layer."""

    def __init__(self, attention):
        super().__init__()
        self.attn, self.mlp = attention, Feed()

    def forward(self, x):
        return self.mlp(x if self.attn is None else self.attn(x))


class Model(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(*computed):
    return Model(*(Block(Attention(compute)) for compute in computed))


@pytest.fixture
def verified():
    """Checks of a model, by path; ``step`` takes the model and an input."""

    def verify(model, required="flash", step=None, path="attention.backend"):
        torch.manual_seed(0)
        x = torch.randn(2, TOKENS, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def plain(model, x):
            model(x).square().mean().backward()

        def once():
            optimizer.zero_grad()
            (step or plain)(model, x)
            optimizer.step()

        checks = kernels_check.verify(model, once, {path: required})
        return next(check for check in checks if check.path == path)

    return verify


def accumulated(model, x):
    for _ in range(2):
        model(x).square().mean().backward()


@pytest.mark.parametrize("step", [None, accumulated])
def test_one_layer_by_hand_among_two_is_found(verified, step):
    """Whether the step accumulates or not: two calls of one layer are not one call of two."""
    assert verified(stack(fused, fused), step=step).met
    check = verified(stack(fused, by_hand), step=step)
    assert (check.status, check.observed) == ("fallback", "flash+unrecognised")
    assert "ran no attention that is recognised: layers.1.attn" in check.reason


def test_a_layer_is_covered_only_if_all_of_its_heads_are(verified):
    """Half of them by hand leaves half of what the next layer of weights takes; two halves leave nothing."""
    assert verified(stack(fused, in_two_halves)).met
    check = verified(stack(fused, half_by_hand))
    assert (check.status, check.observed) == ("fallback", "flash+unrecognised")
    assert f"layers.1.attn ({WIDTH // 2} of {WIDTH} features)" in check.reason
    assert verified(stack(fused, half_by_hand), "causal", path="attention.mask").status == "unknown"


@pytest.mark.parametrize("other", [lambda: Block(Other(by_hand)), lambda: Block(None)])
def test_another_class_in_the_place_of_attention_is_found(verified, other):
    """Unless nothing stands there and nothing mixes tokens: a block without attention is none."""
    block = other()
    check = verified(Model(Block(Attention(fused)), block))
    assert check.met is (block.attn is None)


def test_a_block_that_passes_its_attention_by_is_found(verified):
    """The layer is there and is not called."""
    model = stack(fused, fused)
    model.layers[1].forward = model.layers[1].mlp.forward
    check = verified(model)
    assert not check.met
    assert "layers.1" in check.reason


def test_a_flat_sequence_of_layers_is_no_alarm(verified):
    """Feed-forward layers stand beside attention under the same name, and mix no tokens."""
    flat = nn.Sequential(Attention(fused), Feed(), Attention(fused), Feed())
    assert verified(flat).met
    assert not verified(nn.Sequential(Attention(fused), Feed(), Attention(by_hand), Feed())).met
    assert not verified(nn.Sequential(Attention(fused), Other(without_a_mask))).met


def test_layers_of_different_kinds_are_named(verified):
    """A mix is a mix."""
    check = verified(stack(fused, forced_to_math, written_out))
    assert (check.status, check.observed) == ("fallback", "eager+flash+math")
    assert "1 of 3 attention layers as required" in check.reason
    assert "layers.1.attn, layers.2.attn" in check.reason


@pytest.mark.parametrize(
    ("compute", "backend", "mask"),
    [
        (fused, "flash", "causal"),
        (imported_by_name, "flash", "causal"),
        (written_out, "eager", "explicit"),
        (written_out_in_three_dimensions, "eager", "explicit"),
        (without_a_mask, "eager", "none"),
    ],
)
def test_each_way_of_writing_it_is_known(verified, compute, backend, mask):
    """And its mask, however that was laid over the scores."""
    assert verified(stack(compute, compute), backend).met
    assert verified(stack(compute, compute), mask, path="attention.mask").met
    assert verified(stack(compute, compute), "float32", path="attention.dtype").met


def test_math_of_a_function_imported_by_name_is_math(verified):
    """What nobody wrapped is told by what it leaves behind; its mask is not told then, and never taken for none."""
    assert verified(stack(forced_to_math), "math").met
    assert not verified(stack(forced_to_math), "none", path="attention.mask").met


def test_the_precision_of_what_is_written_out_is_that_of_its_products(verified):
    """However the softmax was cast."""
    model = stack(written_out_in_three_dimensions).bfloat16()

    def step(model, x):
        model(x.bfloat16()).float().square().mean().backward()

    assert verified(model, "bfloat16", step, "attention.dtype").met
    assert not verified(model, "float32", step, "attention.dtype").met


@pytest.mark.parametrize("compute", [fused, written_out, written_out_in_three_dimensions])
def test_autocast_decides_over_the_precision(verified, compute):
    """Whatever dtype the weights have."""

    def step(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()

    assert verified(stack(compute), "bfloat16", step, "attention.dtype").met


def test_multihead_attention_of_torch_is_attention(verified):
    """With its weights it is written out, over three dimensions; without them it is fused."""

    class Layer(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.attn, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

        def forward(self, x):
            return x + self.attn(x, x, x, need_weights=self.weights)[0]

    assert verified(Model(Layer(False), Layer(False))).met
    assert verified(Model(Layer(True), Layer(True)), "eager").met
    assert verified(Model(Layer(False), Layer(True))).observed == "eager+flash"


def test_a_teacher_is_not_the_student(verified):
    """Its calls are named as another's, whatever its depth; they make nothing good and nothing bad."""
    for student, met in ((stack(fused, fused), True), (stack(fused, by_hand), False)):
        for teacher in (stack(fused), stack(written_out, written_out, written_out)):

            def step(model, x, teacher=teacher):
                with torch.no_grad():
                    wanted = teacher(x)
                (model(x) - wanted).square().mean().backward()

            check = verified(student, step=step)
            assert check.met is met
            assert "outside the model" in check.reason


def test_a_copy_is_not_the_model(verified):
    """A model that is not called runs no attention, however busy its copy is."""
    model = stack(fused, fused)
    other = copy.deepcopy(model)

    def step(_, x):
        other(x).square().mean().backward()

    check = verified(model, step=step)
    assert check.status == "absent"
    assert "no attention of the model itself was seen" in check.reason


def test_a_wrapper_without_a_configuration_is_looked_through(verified, training):
    """The layers are found by where they stand, not by what a configuration says."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    assert verified(Wrapper(stack(fused, fused))).met
    assert not verified(Wrapper(stack(fused, by_hand))).met


def test_attention_beside_the_blocks_makes_nothing_good(training):
    """All blocks by hand, and a head that attends: the head is not the model."""
    run = training()
    for block in run.model.base_model.model.model.layers:
        block.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    head = Attention(fused)
    norm = run.model.base_model.model.model.norm
    norm.extra = head
    original = norm.forward
    norm.forward = lambda x: original(x) + head(x.float()[..., :WIDTH]).mean().to(x.dtype)
    check = run.check("attention.backend", "flash")
    assert not check.met
    assert "layers.0" in check.reason


def test_pruned_layers_and_other_depths_are_no_alarm(training):
    """What the configuration announces is not asked where the model shows it."""
    run = training()
    run.model.base_model.model.model.layers = run.model.base_model.model.model.layers[:1]
    assert run.check("attention.backend", "flash").met


def test_what_trains_nothing_is_left_out(training):
    """An evaluation and a generation inside the step, and a reference with the adapter disabled."""
    run = training(quant=None)
    prompt = run.inputs["input_ids"][:1, :4]
    original = run.step

    def step():
        run.model.eval()
        with torch.no_grad():
            run.model(**run.inputs)
            with sdpa_kernel(SDPBackend.MATH):
                run.model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)
        run.model.train()
        with torch.no_grad(), run.model.disable_adapter():
            run.model(**run.inputs)
        original()

    required = {
        **{"attention.backend": "flash", "attention.mask": "causal", "mode": "train", "lora.dropout": 0.05},
        **{"lora.attached": True, "lora.learning": True},
    }
    checks = {check.path: check for check in run.verify(required, step)}
    assert [path for path in required if not checks[path].met] == []
    assert "calls without gradients" in checks["attention.backend"].reason


def test_a_step_without_gradients_is_judged_whole(training):
    """Where nothing trains, what is asked for is what ran."""
    run = training(quant=None)
    run.model.eval()

    def answer():
        run.model.generate(input_ids=run.inputs["input_ids"][:1], max_new_tokens=2, do_sample=False)

    check = next(
        check for check in run.verify({"attention.backend": "flash"}, answer) if check.path.endswith("backend")
    )
    assert check.met
    assert "2 of 2 attention layers" in check.reason


def test_a_hybrid_by_its_configuration_is_no_alarm(verified):
    """A layer that the configuration calls by another kind need not attend, whatever its class."""

    model = stack(fused, by_hand)
    assert not verified(model).met
    model.config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    assert verified(model).met
