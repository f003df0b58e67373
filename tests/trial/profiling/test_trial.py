"""Tests of the profile of a trial's steps.

Tests of profiled requests: the same tokens in phases, facts about a request, and weights that it copies.

Tests that a training step split into phases equals a plain step.

Tests of the memory breakdown of a step: tensors are counted to the byte, and the remainder is reported.

Measured peaks: the best lap counts, and on a known GPU it is near the vendor's figure and not above it.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from lorameter.models.costs.flops import from_values
from lorameter.models.costs.peaks import stated_peak
from lorameter.records import codec
from lorameter.records.activity import (
    CACHE,
    HEAD,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_PHASES,
    REQUEST_TRACE,
    STEP_PHASES,
    Activity,
    RequestFacts,
)
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.memory import LiveTensors, measure_breakdown, read_pages, resident_tensors
from lorameter.trial.process import Lap
from lorameter.trial.profiling import phases
from lorameter.trial.profiling import trial as peak
from lorameter.trial.profiling.activity import MARK, summarise_activity
from lorameter.trial.profiling.phases import BorderedStep, observe_request
from lorameter.trial.profiling.trial import ProfiledTrial, measure_peak
from lorameter.trial.step import TrainStep


@pytest.fixture
def trial(tmp_path):
    """A built trial of the smallest model without measurements."""
    workload = Workload(sequence_length=32, batch_size=1, train_sequences=4, held_out_records=4, held_out_sequences=1)
    request = TrialRequest(
        trial="t", variant=LoraVariant(name="v", r=4), role="variant", replicate=0, seed=1, workload=workload,
        protocol=Protocol(), interleaving="replicates", measures=("steps", "peaks"), device="cpu", threads=1,
        tokens_path=prepare(workload, tmp_path).path, scratch=str(tmp_path), log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    trial = ProfiledTrial(request, SharedBase())
    trial.run("build")
    return trial


def test_a_profile_times_phases_and_counts_products(trial):
    """Steps come in pairs; products are counted from the modules."""
    profiled = trial.run("profile", budget_s=0.0)
    samples = profiled.samples
    assert len(samples["plain_step_time_s"]) == len(samples["phase_forward_s"]) == len(samples["timed_loss"]) / 2 == 8
    for index, lap_s in enumerate(samples["bordered_step_time_s"]):
        assert sum(samples[f"phase_{phase}_s"][index] for phase in STEP_PHASES) <= lap_s
    found = from_values(profiled.values)
    block = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 704
    assert (found.plain, found.head) == (4 * block, 256 * 320)
    assert found.weights == found.forward - 4 * block  # the adapter's products


PROMPT, NEW = 12, 4


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A function that makes a trial of the smallest model for requests; its arguments are fields of the variant."""
    monkeypatch.setattr(phases, "PROFILED_BUDGET_S", 0.0)
    torch.set_num_threads(1)

    def make(**fields):
        workload = Workload(
            sequence_length=32, batch_size=1, train_sequences=4, held_out_records=4, held_out_sequences=1,
            prompt_tokens=PROMPT, new_tokens=NEW,
        )  # fmt: skip
        request = TrialRequest(
            trial="t", variant=LoraVariant(name="v", r=4, **fields), role="variant", replicate=0, seed=1,
            workload=workload, protocol=Protocol(generate_warmup=0), interleaving="replicates",
            measures=("steps", "peaks", "requests"), device="cpu", threads=1,
            tokens_path=prepare(workload, tmp_path).path, scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        trial = ProfiledTrial(request, SharedBase())
        trial.run("build")
        assert trial.run("begin_generate").status == "ok"
        return trial

    return make


def read_result(kind, folder, name):
    return codec.from_json(kind, json.loads((folder / name).read_text(encoding="utf-8")), name)


def test_a_profiled_request(serving, tmp_path):
    """The result has samples of each phase, facts, and the operators of each phase."""
    trial = serving()
    samples = trial.run("profile_requests", merged=False, budget_s=0.0).samples
    assert len(samples["plain_request_time_s"]) == len(samples["phase_decode_s"]) == len(samples["first_token_time_s"])
    for index, lap_s in enumerate(samples["bordered_request_time_s"]):
        phases = [samples[f"phase_{phase}_s"][index] for phase in REQUEST_PHASES]
        assert min(phases) > 0
        assert sum(phases) <= lap_s
    observed = trial.run("request_facts")
    assert observed.memory["host_peak_first_token_bytes"] > 0
    facts = read_result(RequestFacts, tmp_path, REQUEST_FACTS)
    assert (facts.prompt_rows, facts.logit_rows) == (PROMPT, 1)
    assert (facts.cache, facts.cache_moved, facts.head) == ("DynamicCache", 1.0, "lm_head.weight")
    config = trial.trainee.model.get_base_model().config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert facts.cache_bytes == 2 * config.num_hidden_layers * heads * (PROMPT + NEW - 1) * 2
    trial.run("request_activity", merged=False)
    activity = read_result(Activity, tmp_path, REQUEST_ACTIVITY)
    assert (tmp_path / REQUEST_TRACE).stat().st_size > 0
    assert [phase.phase for phase in activity.phases] == list(REQUEST_PHASES)
    ran = {phase.phase: phase for phase in activity.phases}
    size = (1, config.hidden_size, config.vocab_size)
    copies = [(copy.weight, copy.shape, copy.calls) for copy in ran["prefill"].copies]
    assert copies in ([("lm_head.weight", size, 1.0)], [])  # whether torch copies it depends on the processor
    assert all(0 < copy.time_s <= ran["prefill"].parts_s[HEAD] for copy in ran["prefill"].copies)
    assert ran["decode"].copies == ()
    assert ran["decode"].parts_s[CACHE] > 0
    assert ran["decode"].casts_s > 0  # casts of an adapter in float32


def test_serving_options_do_not_change_the_answer(serving):
    """Copied head input, static cache and merged adapter each take effect without changing the answer."""
    plain = serving(dtype="float32").server.ask().tokens
    for fields in ({"copy_head_input": True}, {"kv_cache": "static"}, {"merge_adapter": True}):
        changed = serving(dtype="float32", **fields)
        model = changed.trainee.model
        assert changed.server.ask().tokens == plain
        assert peft_methods.is_merged(model) is ("merge_adapter" in fields)
        facts = observe_request(model, changed.server.ask)
        cache = ("StaticCache", 0.0) if "kv_cache" in fields else ("DynamicCache", 1.0)
        assert (facts.cache, facts.cache_moved) == cache


def recorded(call):
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
        torch.no_grad(),
        record_function(f"{MARK}prefill"),
    ):
        call()
    return seen.profiler.kineto_results.events()


@pytest.mark.parametrize("rows", [10, 1])
def test_a_copy_of_a_whole_weight_is_recognised_by_its_shape(rows):
    """For one row of several, torch 2.13 copies a frozen 16-bit weight where oneDNN supports 16 bits, and otherwise
    does not."""
    weight = torch.randn(4096, 64, dtype=torch.bfloat16)
    hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)[:, -1:, :]
    events = recorded(lambda: functional.linear(hidden, weight))
    sizes = [math.prod(shape) for one in events if one.name() == "aten::copy_" for shape in one.shapes()]
    copied = max(sizes, default=0) >= weight.numel()
    phases = summarise_activity(events, (0.01,), "cpu", phase_names=("prefill",), weights={(4096, 64): "head"}).phases
    assert [(copy.weight, copy.in_product) for copy in phases[0].copies] == ([("head", True)] if copied else [])
    assert not (copied and rows == 1)


WORKLOAD = Workload(
    sequence_length=32, batch_size=2, train_sequences=8, held_out_records=8, held_out_sequences=2, prompt_tokens=8
)
VARIANT = LoraVariant(name="v", r=4, lora_dropout=0.1, gradient_accumulation=2)


def test_a_bordered_step_has_the_losses_of_a_plain_one(tmp_path):
    """Losses are bit-equal, including dropout and accumulation."""
    torch.set_num_threads(1)
    request = TrialRequest(
        trial="t", variant=VARIANT, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=prepare(WORKLOAD, tmp_path).path, scratch=str(tmp_path), log_path="",
    )  # fmt: skip

    def losses(make):
        stream = TokenStream(request.tokens_path, WORKLOAD, VARIANT, "cpu")
        step = make(build(request, steps=8, shared=SharedBase()), stream)
        return [float(step()) for _ in range(2)]

    plain = losses(lambda trainee, stream: TrainStep(trainee, stream, VARIANT, "cpu"))
    assert losses(lambda trainee, stream: BorderedStep(trainee, stream, request)) == plain


ROWS, WIDTH = 16, 32


class Net(nn.Module):
    """An embedding and a frozen layer with an adapter next to it, whose product saves both of its factors."""

    def __init__(self, *, checkpointed):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.base, self.adapter = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.requires_grad_(False)
        self.adapter.weight.requires_grad_(True)
        self.checkpointed = checkpointed

    def forward(self, tokens):
        entered = self.embed(tokens)
        if self.checkpointed:
            return checkpoint(self.block, entered, use_reentrant=False).sum()
        return self.block(entered).sum()

    def block(self, entered):
        hidden = self.base(entered) + self.adapter(entered)
        return hidden.exp() * hidden


@pytest.mark.parametrize(("checkpointed", "kept"), [(False, 3), (True, 1)])
def test_activations_are_the_tensors_saved_for_the_backward_pass(checkpointed, kept):
    """Activations are the adapter's input, the exponential and its argument; with checkpointing only the input of the
    block."""
    net = Net(checkpointed=checkpointed)
    optimizer = torch.optim.SGD([net.adapter.weight])
    addresses = {t.untyped_storage().data_ptr() for found in resident_tensors(net, optimizer).values() for t in found}
    seen: list[dict[str, int]] = []
    live = LiveTensors(resident=addresses, vocabulary=0, device="cpu", on_change=lambda kinds: seen.append(dict(kinds)))
    tokens = torch.arange(ROWS)
    with live.watching([net.adapter.weight]):
        loss = net(tokens)
        assert live.bytes["activations"] == kept * ROWS * WIDTH * 4
        loss.backward()
    del loss
    assert live.bytes["activations"] == 0
    assert live.bytes["gradients"] == WIDTH * WIDTH * 4
    assert max(kinds["temporaries"] for kinds in seen) >= ROWS * WIDTH * 4


def test_a_step_of_known_size_is_explained_on_the_host():
    """64 MiB of saved activations, the product and its gradient are counted; the remainder is small."""
    wide = nn.Linear(1, 1, bias=False)
    size = 64 * 2**20
    optimizer = torch.optim.SGD(wide.parameters())

    def step():
        product = torch.ones(size // 4) * wide.weight.view(1)  # keeps the ones
        product.sum().backward()

    step()
    optimizer.zero_grad()
    found = measure_breakdown(wide, optimizer, step, initial_pages=read_pages(), device="cpu")
    assert found.kinds["activations"] >= size
    assert found.kinds["activations"] + found.kinds["temporaries"] == pytest.approx(3 * size, rel=0.01)
    assert found.unexplained_bytes == found.peak_bytes - sum(found.kinds.values())
    assert abs(found.unexplained_bytes) < 0.05 * 3 * size


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_explained_within_two_percent():
    """The allocator's peak for four layers of 4096, of which the first trains, agrees with the counted bytes."""
    layers = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4))).cuda().requires_grad_(False)
    layers[0].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layers[0].weight], fused=True)
    rows = torch.randn(2048, 4096, device="cuda")

    def step():
        layers(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    found = measure_breakdown(layers, optimizer, step, initial_pages=read_pages(), device="cuda")
    assert abs(found.share) < 0.02
    assert found.outside_allocator["fragmentation"] >= 0


BOOST = 1.1
"""A GeForce GPU may clock above the boost that its figure is stated at; a data centre's GPU does not."""


def test_the_best_lap_of_all_sizes_counts(monkeypatch):
    """Interference only slows a product down; the first lap of each size is a warm-up."""
    laps = iter([0.001, 4.0, 2.0, 3.0, 0.001, 9.0, 8.0, 8.5])
    monkeypatch.setattr(peak, "CPU_SIZES", (64, 128))
    monkeypatch.setattr(peak, "Stopwatch", lambda device: lambda call: (call(), Lap(next(laps), 0.0)))
    assert measure_peak("cpu", "float32", tries=3).per_s == max(2 * 64**3 / 2.0, 2 * 128**3 / 8.0)
    assert next(laps, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("rate", "share"), [("bfloat16", 0.5), ("float16", 0.5), ("tf32", 0.5), ("float32", 0.6)])
def test_products_on_a_known_gpu(rate, share):
    """At least the stated share of the vendor's figure, and not more: a figure with sparsity would be twice as high."""
    stated = stated_peak(torch.cuda.get_device_name(), rate)
    if stated is None:
        pytest.skip(f"no figure for {rate} of {torch.cuda.get_device_name()}")
    limit = BOOST if "GeForce" in stated.device else 1.0
    if any(stated.device.endswith(name) for name in (" T4", " L4")):
        share = 0.3  # GPUs of 70 W throttle on products
    assert share <= measure_peak("cuda", rate).per_s / stated.per_s <= limit


@pytest.mark.gpu
def test_copies_on_a_known_gpu():
    """At least 70 % of the vendor's bandwidth, and never more than it."""
    stated = stated_peak(torch.cuda.get_device_name(), "memory")
    if stated is None:
        pytest.skip(f"no figure for {torch.cuda.get_device_name()}")
    assert 0.7 <= measure_peak("cuda", "memory").per_s / stated.per_s <= 1.0
