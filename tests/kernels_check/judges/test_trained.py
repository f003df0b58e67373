"""Tests of trained embeddings and norms: they count if an optimizer changed them or PEFT's replacements of them."""

from functools import partial

import peft
import pytest
import torch
from negative_controls.small_run import SmallRun
from negative_controls.trained_part_faults import with_embeddings
from transformers import LlamaConfig, LlamaForCausalLM

import kernels_check


def _whole(*, tied, rate=1e-3):
    """Return a run that trains all parameters of a model without an adapter, with tied or untied embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return SmallRun(model=model, optimizer=optimizer, inputs=inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_share_a_weight_count_once(tied):
    """Tied embeddings count as one, also without an adapter."""
    check = _whole(tied=tied).check("embedding.trained", True)
    assert check.met
    assert check.reason.startswith("1 of 1" if tied else "2 of 2")


def test_frozen_parts_are_not_trained(training):
    """LoRA trains neither embeddings nor norms; that meets a requirement of false and is not applicable without a
    requirement."""
    run = training()
    checks = {check.path: check for check in run.verify({"embedding.trained": False})}
    assert checks["embedding.trained"].met
    assert (checks["norms.trained"].status, checks["norms.trained"].observed) == ("not_applicable", False)
    assert "0 of 5 norms updated" in checks["norms.trained"].reason


def test_copies_that_train_count_for_the_modules_they_replace(training):
    """The replaced originals stay frozen by design."""
    run = training(adapter=with_embeddings)
    check = run.check("embedding.trained", True)
    assert check.met
    assert check.reason.startswith("2 of 2 embeddings updated")
    tuning = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    norms = training(quant=None, dtype="float32", adapter=lambda: tuning)
    assert norms.check("norms.trained").observed == "2 of 5"


def test_factors_next_to_an_embedding_take_two_watched_steps(training):
    """One LoRA factor has no gradient until the other has left zero, so that two steps are needed; frozen embeddings
    need one."""
    lora = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)
    run = training(quant=None, dtype="float32", adapter=lambda: lora, make_optimizer=adamw)
    watched = kernels_check.watch(run.model, {"embedding.trained": True})
    found = []
    for _ in range(2):
        with watched:
            run.step()
        checks = {check.path: check for check in watched.checks}
        found.append(checks["embedding.trained"].status)
        assert checks["norms.trained"].observed is False
    assert found == ["unknown", "active"]


def test_a_rate_of_zero_is_unknown():
    """A learning rate of zero and a step without an optimizer are unknown."""
    check = _whole(tied=True, rate=0.0).check("embedding.trained", True)
    assert (check.status, check.observed) == ("unknown", None)
    assert "the learning rate is 0" in check.reason
    run = _whole(tied=True)
    run.optimizer.step = lambda: None
    assert "no torch.optim.Optimizer stepped" in run.check("embedding.trained", False).reason


def test_embeddings_that_cannot_be_read_are_unknown(monkeypatch):
    """An exception of the model does not mean that it has no embedding; one readable embedding proves nothing."""

    def fail(model):
        raise RuntimeError("not now")

    run = _whole(tied=False)
    monkeypatch.setattr(type(run.model), "get_output_embeddings", fail)
    check = run.check("embedding.trained", True)
    assert (check.status, check.reason) == ("unknown", "RuntimeError: not now")
    monkeypatch.setattr(type(run.model), "get_output_embeddings", lambda model: model.get_decoder().embed_tokens)
    assert run.check("embedding.trained", True).met
