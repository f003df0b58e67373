"""Real requests by phases: the same tokens, what a request finds, and weights that are copied in it."""

import json
import math

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from lorameter.records import codec
from lorameter.records.activity import (
    CACHE,
    HEAD,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_PHASES,
    REQUEST_TRACE,
    Activity,
    RequestFacts,
)
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.profiling import phases
from lorameter.trial.profiling.activity import MARK, activity_of
from lorameter.trial.profiling.phases import BorderedRequest, see_request
from lorameter.trial.profiling.trial import ProfiledTrial
from lorameter.trial.serving.generate import generate

PROMPT, NEW = 12, 4


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """Makes a trial of the smallest model that answers requests; fields are those of its variant."""
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


def of(kind, folder, name):
    return codec.from_json(kind, json.loads((folder / name).read_text(encoding="utf-8")), name)


def test_a_request_is_taken_apart(serving, tmp_path):
    """Its samples, what it finds, and what runs in each phase, with the copied head of its prefill among it."""
    trial = serving()
    samples = trial.run("profile_requests", merged=False, budget_s=0.0).samples
    assert len(samples["plain_request_time_s"]) == len(samples["phase_decode_s"]) == len(samples["first_token_time_s"])
    for index, lap_s in enumerate(samples["bordered_request_time_s"]):
        phases = [samples[f"phase_{phase}_s"][index] for phase in REQUEST_PHASES]
        assert min(phases) > 0
        assert sum(phases) <= lap_s
    looked = trial.run("request_facts")
    assert looked.memory["host_peak_first_token_bytes"] > 0
    assert len(looked.samples["new_length_first_token_s"]) == len(looked.samples["known_length_first_token_s"]) == 6
    facts = of(RequestFacts, tmp_path, REQUEST_FACTS)
    assert (facts.prompt_rows, facts.logit_rows) == (PROMPT, 1)
    assert (facts.cache, facts.cache_moved, facts.head) == ("DynamicCache", 1.0, "lm_head.weight")
    config = trial._built.trainee.model.get_base_model().config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert facts.cache_bytes == 2 * config.num_hidden_layers * heads * (PROMPT + NEW - 1) * 2
    trial.run("request_activity", merged=False)
    activity = of(Activity, tmp_path, REQUEST_ACTIVITY)
    assert (tmp_path / REQUEST_TRACE).stat().st_size > 0
    assert [phase.phase for phase in activity.phases] == list(REQUEST_PHASES)
    ran = {phase.phase: phase for phase in activity.phases}
    size = (1, config.hidden_size, config.vocab_size)
    copies = [(copy.weight, copy.shape, copy.calls) for copy in ran["prefill"].copies]
    copied = copies_a_frozen_head(config.vocab_size, config.hidden_size)
    assert copies == ([("lm_head.weight", size, 1.0)] if copied else [])
    assert all(0 < copy.time_s <= ran["prefill"].parts_s[HEAD] for copy in ran["prefill"].copies)
    assert ran["decode"].copies == ()
    assert ran["decode"].parts_s[CACHE] > 0
    assert ran["decode"].casts_s > 0  # of an adapter in float32


@pytest.mark.parametrize("fields", [{"copy_head_input": True}, {"kv_cache": "static"}, {"merge_adapter": True}])
def test_a_remedy_changes_no_token(serving, tmp_path, fields):
    """A copied input of the head, a static cache, a merged adapter: answers stay, and each is in force."""
    plain, changed = serving(dtype="float32"), serving(dtype="float32", **fields)
    assert changed._serving.ask().tokens == plain._serving.ask().tokens
    model = changed._built.trainee.model
    assert peft_methods.is_merged(model) is ("merge_adapter" in fields)
    facts = see_request(model, changed._serving.ask)
    cache = ("StaticCache", 0.0) if "kv_cache" in fields else ("DynamicCache", 1.0)
    assert (facts.cache, facts.cache_moved) == cache


def test_a_bordered_request_gives_the_tokens_of_a_plain_one(serving):
    """The borders are hooks that leave everything as it was, and are gone afterwards."""
    trial = serving()
    model = trial._built.trainee.model
    prompt = trial._built.stream.prompts(0)
    bordered = BorderedRequest(model, lambda: generate(model, prompt, NEW), "cpu")
    bordered.phases.begin()
    assert bordered().tokens == generate(model, prompt, NEW).tokens
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.get_base_model().modules())


def ask(model):
    return generate(model, torch.arange(10)[None], 3)


def recorded(call):
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
        torch.no_grad(),
        record_function(f"{MARK}prefill"),
    ):
        call()
    return seen.profiler.kineto_results.events()


def copied_elements(events):
    """Elements of the largest copy among them."""
    sizes = [math.prod(shape) for one in events if one.name() == "aten::copy_" for shape in one.shapes()]
    return max(sizes, default=0)


def copies_a_frozen_head(words, width):
    """Whether torch lays a frozen weight out anew for one row of many: 2.13 does in 16 bits where oneDNN has them, with
    AVX2 alone it does not, and 2.15 makes one product of it."""
    weight = torch.randn(words, width, dtype=torch.bfloat16)
    hidden = torch.randn(1, 10, width, dtype=torch.bfloat16)[:, -1:, :]
    return copied_elements(recorded(lambda: functional.linear(hidden, weight))) >= weight.numel()


@pytest.mark.parametrize(
    ("rows", "requires_grad", "remedy", "found"),
    [(10, False, False, True), (10, True, False, False), (10, False, True, False), (1, False, False, False)],
)
def test_a_copied_head_is_told_by_the_shape_of_the_copy(rows, requires_grad, remedy, found):
    """A view of one row among several and a frozen weight of 16 bits, where torch does not fold it; no twin has one."""
    weight = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=requires_grad)
    hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)[:, -1:, :]
    hidden = hidden.clone(memory_format=torch.contiguous_format) if remedy else hidden
    events = recorded(lambda: functional.linear(hidden, weight))
    found = found and copies_a_frozen_head(*weight.shape)
    assert (copied_elements(events) >= weight.numel()) is found
    phases = activity_of(events, (0.01,), "cpu", phase_names=("prefill",), weights={(4096, 64): "head"}).phases
    assert [(copy.weight, copy.in_product) for copy in phases[0].copies] == ([("head", True)] if found else [])


NARROW_ONES, ONES = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64)
