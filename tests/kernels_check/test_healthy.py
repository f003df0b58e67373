"""Tests of healthy training steps that could be mistaken for faulty ones: every requirement that holds is active.

Each case returns a model, its step, and the differences of its requirements from those of a plain LoRA run; None: not
required.
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
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantise(module).to("cpu"))
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
