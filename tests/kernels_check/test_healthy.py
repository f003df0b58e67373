"""Tests of healthy training steps that could be mistaken for faulty ones: every requirement that holds is active.

Each case returns a model, its step, and the differences of its requirements from those of a plain LoRA run; None: not
required.

Tests that PEFT methods are judged as LoRA is: a healthy run is active, and an untrained weight is a fault.

These methods store their weights in different ways; `make proof` measures every type of PEFT.
"""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import nn

import kernels_check
from kernels_check import small_run

VOCABULARY, ROWS, LENGTH = 96, 2, 12
PLAIN = {
    "base.frozen": True, "peft.attached": True, "peft.learning": True, "compile": False, "mode": "train",
    "attention.backend": "flash", "base.bits": 32, "base.quant_type": "none", "checkpointing": False,
    "optimizer.class": "torch.optim.AdamW", "optimizer.fused": False,
}  # fmt: skip
NF4 = {"base.bits": 4, "base.quant_type": "nf4"}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CASES = {}

pytestmark = pytest.mark.filterwarnings("ignore")


def case(name):
    """Register the decorated function in the table."""
    return lambda make: CASES.setdefault(name, make)


def llama(quantise=None, dtype=torch.float32, **options):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES | options), dtype=dtype)
    for name, module in [*model.named_modules()]:
        if quantise is not None and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantise(module).to("cpu"))
    return model


def nf4(linear):
    return small_run.four_bit(linear, "nf4", compute=torch.bfloat16)


def lora(model, **options):
    torch.manual_seed(4)
    options = {"r": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).train()


def tokens():
    torch.manual_seed(5)
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH))


def trainable(model):
    return [value for value in model.parameters() if value.requires_grad]


def adamw(model, **options):
    return torch.optim.AdamW(trainable(model), lr=1e-2, **options)


def step_of(model, optimizer, **inputs):
    """Return a step with forward, backward and update."""
    inputs = inputs or {"input_ids": (ids := tokens()), "labels": ids}

    def step():
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def plain(model=None, **requirements):
    model = model or lora(llama())
    return model, step_of(model, adamw(model)), requirements


@case("NF4 in bfloat16 with an 8-bit optimizer")
def nf4_base():
    model = lora(llama(nf4, torch.bfloat16))
    step = step_of(model, bnb.optim.AdamW8bit(trainable(model), lr=1e-2))
    more = {"base.double_quant": True, "base.compute_dtype": "bfloat16"}
    return model, step, NF4 | more | {"optimizer.class": "bitsandbytes.optim.AdamW8bit", "optimizer.fused": None}


@case("scaled, clipped and accumulated gradients")
def scaled_gradients():
    model, ids = lora(llama()), tokens()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")

    def step():
        for row in ids.split(1):
            scaler.scale(model(input_ids=row, labels=row).loss / ROWS).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return model, step, {}


@case("generation inside the step")
def generation():
    model, train, _ = plain()

    def step():
        model.eval()
        model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)
        model.train()
        train()

    return model, step, {}


@case("a vision-language model with an adapter on its language model")
def vision_language():
    torch.manual_seed(3)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    image = VOCABULARY - 1
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_id=image,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model = lora(model, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    ids = tokens().clamp(max=image - 1)
    ids[:, 1:5] = image
    inputs = {"input_ids": ids, "pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": ids}
    return model, step_of(model, adamw(model), **inputs), {}


@pytest.mark.parametrize("name", CASES)
def test_a_healthy_step_meets_every_requirement(name):
    """Every path has a check, and each is active."""
    model, step, changes = CASES[name]()
    required = {path: value for path, value in (PLAIN | changes).items() if value is not None}
    checks = kernels_check.verify(model, step, required)
    found = {check.path: (check.status, check.reason) for check in checks}
    assert [(path, found.get(path)) for path in required if found.get(path, ("",))[0] != "active"] == []


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
    "SHADOW": lambda: peft.ShadowConfig(shadow_num_hidden_layers=1, **TASK),
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
    idle = 8 if method == "SHADOW" else 0  # no layer reads the state that its last layer updates
    trained = sum(value.requires_grad for value in run.model.parameters()) - idle
    assert f"{trained} of {trained} trainable parameters" in checks["peft.learning"].reason
    assert len(run.losses) == 2


@pytest.mark.filterwarnings("ignore")
def test_the_gate_of_x_lora_trains_and_its_experts_are_frozen_by_design(training, tmp_path):
    """Neither the frozen experts nor the gate's softmax are faults; a gate that no optimizer holds is one."""
    run = training(
        quant=None, dtype="float32", adapter=lambda: peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS)
    )
    run.model.save_pretrained(tmp_path / "one")
    for value in run.optimizer.param_groups[0]["params"]:
        value.data.neg_().mul_(value.abs())
    run.model.save_pretrained(tmp_path / "two")
    base = run.model.unload()
    base.config.use_cache = False
    experts = {"0": str(tmp_path / "one"), "1": str(tmp_path / "two")}
    gate = {"hidden_size": 128, "xlora_depth": 1}
    run.model = peft.get_peft_model(base, peft.XLoraConfig(adapters=experts, **gate, **TASK)).train()
    run.optimizer = adamw(run.model)
    required = {"peft.attached": True, "peft.learning": True, "base.frozen": True, "attention.backend": "flash"}
    checks = {check.path: check for check in run.verify(required)}
    assert [(path, checks[path].reason) for path in required if not checks[path].met] == []
    run.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    assert not run.check("peft.learning", True).met


def test_a_model_in_float64_is_judged(training):
    """Gradients in float64 are read as those of other types are."""
    run = training(quant=None, dtype="float64")
    checks = {check.path: check for check in run.verify({"peft.learning": True, "attention.dtype": "float64"})}
    assert checks["peft.learning"].met, checks["peft.learning"].reason
    assert checks["attention.dtype"].met, checks["attention.dtype"].reason


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
def test_attention_over_a_learned_prompt_is_judged_separately(tuned, attention, status):
    """An adaption prompt has its own softmax; the model's attention is judged separately."""
    run = tuned("adaption prompt")
    run.model.set_attn_implementation(attention)
    check = run.check("attention.backend", "fused")
    assert check.status == status, check.reason
