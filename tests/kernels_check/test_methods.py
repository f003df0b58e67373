"""Tests that PEFT methods are judged as LoRA is: a healthy run is active, and an untrained weight is a fault.

These methods store their weights in different ways; `make proof` measures every type of PEFT.
"""

import peft
import pytest
import torch

TASK = {"task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["q_proj", "v_proj"], **TASK}
PROMPT = {"num_virtual_tokens": 4, **TASK}
METHODS = {
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "modules_to_save": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, **TARGETS),
    "VBLoRA": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=32, topk=2, **TARGETS),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, **TASK),
    "prompt tuning": lambda: peft.PromptTuningConfig(**PROMPT),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**PROMPT),
    "LoRA of one layer": lambda: peft.LoraConfig(r=4, layers_to_transform=[1], **TARGETS),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[*range(1, 96)], **TASK),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=1, **TASK),
}
KINDS = ("DoRA", "modules_to_save", "IA3", "VBLoRA", "adaption prompt", "prompt tuning")
"""One method for each way of storing an adapter."""
PATHS = ("peft.attached", "peft.learning", "peft.dtype", "base.frozen")


@pytest.fixture
def tuned(training):
    """A function that makes a small run of a method on float weights."""

    def made(method):
        heads = {"targets": ()} if method == "adaption prompt" else {}
        run = training(quant=None, dtype="float32", adapter=METHODS[method], **heads)
        run.inputs["input_ids"] = torch.arange(1, 33).reshape(2, 16)
        return run

    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_is_active(tuned, method):
    """The adapter is attached, learning and in its dtype, on a frozen base, within the two steps that LoRA needs."""
    run = tuned(method)
    required = {"peft.attached": True, "peft.learning": True, "peft.dtype": "float32", "base.frozen": True}
    checks = {check.path: check for check in run.verify(required)}
    assert [(path, checks[path].reason) for path in PATHS if not checks[path].met] == []
    trained = sum(value.requires_grad for value in run.model.parameters())
    assert f"{trained} of {trained} trainable parameters" in checks["peft.learning"].reason
    assert len(run.losses) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", KINDS)
def test_a_weight_that_no_optimizer_holds_is_named(tuned, method):
    """The optimizer holds half of the trained weights, whatever their names are."""
    run = tuned(method)
    trained = [value for value in run.model.parameters() if value.requires_grad]
    kept = trained[len(trained) // 2 + len(trained) % 2 :]
    run.optimizer = torch.optim.AdamW(kept or [torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    left_out = len(trained) - len(kept)
    check = run.check("peft.learning", True)
    assert check.status == "fallback", check.reason
    assert f"{left_out} of {len(trained)} parameters not given to the optimizer" in check.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", KINDS)
def test_an_adapter_that_is_disabled_in_the_step_is_caught(tuned, method):
    """The adapter is disabled during the forward only, which no flag shows before or after."""
    run = tuned(method)
    run.step()
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)

    def step():
        with run.model.disable_adapter():
            run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()
        run.optimizer.step()

    checks = {check.path: check for check in run.verify({"peft.attached": True, "peft.learning": True}, step)}
    assert checks["peft.attached"].status == "fallback", checks["peft.attached"].reason
    assert checks["peft.learning"].status == "fallback", checks["peft.learning"].reason
    assert "adapters disabled" in checks["peft.attached"].reason or method == "adaption prompt"


def test_tokens_that_no_batch_holds_are_unknown(training):
    """Their zero gradient is neither a fault of the adapter nor a proof that it learns."""
    adapter = peft.LoraConfig(r=4, trainable_token_indices={"embed_tokens": [90, 91]}, **TARGETS)
    run = training(quant=None, adapter=lambda: adapter)
    run.inputs["input_ids"] = torch.arange(1, 33).reshape(2, 16)
    check = run.check("peft.learning", True)
    assert check.status == "unknown"
    assert "none of their tokens was in the batches" in check.reason


@pytest.mark.parametrize(("attention", "status"), [("sdpa", "active"), ("eager", "fallback")])
def test_attention_over_a_learned_prompt_is_not_judged_as_the_models(tuned, attention, status):
    """An adaption prompt has its own softmax; the model's attention is judged separately."""
    run = tuned("adaption prompt")
    run.model.set_attn_implementation(attention)
    check = run.check("attention.backend", "fused")
    assert check.status == status, check.reason
