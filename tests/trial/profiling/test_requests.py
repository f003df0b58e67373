"""Tests of profiled requests: the same tokens in phases, facts about a request, and weights that it copies."""

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
from lorameter.trial.profiling.phases import observe_request
from lorameter.trial.profiling.trial import ProfiledTrial

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


def of(kind, folder, name):
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
    assert copies in ([("lm_head.weight", size, 1.0)], [])  # whether torch copies it depends on the processor
    assert all(0 < copy.time_s <= ran["prefill"].parts_s[HEAD] for copy in ran["prefill"].copies)
    assert ran["decode"].copies == ()
    assert ran["decode"].parts_s[CACHE] > 0
    assert ran["decode"].casts_s > 0  # casts of an adapter in float32


def test_serving_options_do_not_change_the_answer(serving):
    """Copied head input, static cache and merged adapter each take effect without changing the answer."""
    plain = serving(dtype="float32")._serving.ask().tokens
    for fields in ({"copy_head_input": True}, {"kv_cache": "static"}, {"merge_adapter": True}):
        changed = serving(dtype="float32", **fields)
        model = changed._built.trainee.model
        assert changed._serving.ask().tokens == plain
        assert peft_methods.is_merged(model) is ("merge_adapter" in fields)
        facts = observe_request(model, changed._serving.ask)
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
    phases = activity_of(events, (0.01,), "cpu", phase_names=("prefill",), weights={(4096, 64): "head"}).phases
    assert [(copy.weight, copy.in_product) for copy in phases[0].copies] == ([("head", True)] if copied else [])
    assert not (copied and rows == 1)
