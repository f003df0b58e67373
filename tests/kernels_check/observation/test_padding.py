"""Padding is counted from the inputs of the model, whatever tells it."""

from types import SimpleNamespace

import pytest
import torch

from kernels_check.judges.batch import judge_padding
from kernels_check.observation.padding import PaddingSeen, count_padding

PADDED = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
IDS = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 7], [1, 2, 3, 0]])


def test_the_mask_tells():
    """Zeros of a two-dimensional mask, over all calls of the step."""
    calls = [{"input_ids": IDS, "attention_mask": IDS.ne(0)}, {"input_ids": IDS, "attention_mask": torch.ones(3, 4)}]
    assert count_padding(PADDED, calls) == PaddingSeen(tokens=24, padded=6, by="attention_mask")


def test_without_mask_the_runs_at_either_end_count_but_for_one_each():
    """The padding token is often the end token as well; one inside a row is text."""
    seen = count_padding(PADDED, [{"input_ids": IDS, "attention_mask": None}])
    assert (seen.tokens, seen.padded) == (12, 3)
    assert "token 0 at the ends" in seen.by
    assert count_padding(PADDED, [{"input_ids": torch.tensor([[1, 0, 0, 0, 2]])}]).padded == 0


def test_nothing_to_tell_by_is_unknown_where_it_was_asked(seen):
    """Neither a mask nor a padding token: no share, and no pass."""
    counted = count_padding(SimpleNamespace(config=SimpleNamespace(pad_token_id=None)), [{"input_ids": IDS}])
    assert judge_padding(seen(padding=counted), 0.5).against("padding.share", 0.5).status == "unknown"
    assert judge_padding(seen(padding=counted), None).against("padding.share", None).status == "not_applicable"


def test_no_tokens_is_no_padding(seen):
    """A model that is fed features has no tokens to pad."""
    for calls in ([], [{"input_ids": None}], [{"input_ids": torch.ones(3)}]):
        assert count_padding(PADDED, calls) is None
    finding = judge_padding(seen(), 0.5)
    assert finding.against("padding.share", 0.5).status == "not_applicable"
    assert not finding.against("padding.share", 0.5).met


@pytest.mark.parametrize(("padded", "status"), [(5, "active"), (6, "fallback")])
def test_the_requirement_is_a_maximum(seen, padded, status):
    """The share itself is accepted; above it, the reason has numbers and a remedy."""
    finding = judge_padding(seen(padding=PaddingSeen(tokens=10, padded=padded, by="attention_mask")), 0.5)
    check = finding.against("padding.share", 0.5)
    assert check.status == status
    assert f"{padded} of 10 positions" in check.reason
    assert ("sort them by length" in check.reason) is (status == "fallback")


def test_positional_inputs_are_read_and_hooks_are_removed(training):
    """The first two arguments of a language model are its tokens and their mask."""
    run = training()
    ids = run.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0

    def step():
        run.optimizer.zero_grad()
        run.model(ids, mask, labels=ids).loss.backward()
        run.optimizer.step()

    assert run.check("padding.share", 0.2, step).observed == 0.25
    assert not run.model._forward_pre_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_read_or_left_out(training, in_place):
    """A hook on a model compiled in place would be compiled with it: left out, never a pass, never recompiled."""
    from torch._dynamo.utils import counters

    run = training(quant=None)
    if in_place:
        run.model.compile(backend="aot_eager")
    else:
        run.model = torch.compile(run.model, backend="aot_eager")
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    checks = {check.path: check for check in run.verify({"padding.share": 0.5})}
    run.step()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
    if not in_place:
        assert checks["padding.share"].met
    elif run.instrument == "spy":
        assert "padding.share" not in checks
    else:
        assert checks["padding.share"].status == "not_applicable"
