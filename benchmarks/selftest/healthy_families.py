"""Healthy runs of families of transformers with a base in NF4 and a LoRA adapter on every layer that is called."""

from __future__ import annotations

import functools
from typing import Any

import peft
import torch
from families import UnfitError, families, inputs_of, logits_of
from healthy import MAKERS, RATE, RUNNING, SkippedError, Twin, trained
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels_check.controls.small_run import fourbit

NAMES = """
    albert apertus arcee bart beit bert biogpt blenderbot bloom camembert clip codegen cohere cohere2 deberta deit
    dinov2 distilbert electra ernie esm exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox gpt_oss gptj
    granite helium hubert idefics3 internlm3 lfm2 llama llama4_text m2m_100 marian mbart mistral mixtral mobilebert
    modernbert moshi mt5 nemotron olmo olmo2 opt paligemma pegasus persimmon phi phi3 qwen2 qwen2_moe qwen3
    qwen3_moe roberta segformer siglip smollm3 stablelm starcoder2 t5 umt5 vit wav2vec2 whisper xglm xlnet
""".split()
"""Known to many people; one that a version of transformers does not have, or not small, is skipped with the reason."""


def run_of(name: str) -> Twin:
    """A run of one family.

    Raises:
        SkippedError: the family is not there, is not small, or has no layer to store in 4 bits.
    """
    family = next((one for one in families() if one.name == name), None)
    if family is None:
        raise SkippedError("this version of transformers has no such family with a task")
    try:
        model = family.build().train()
        inputs = inputs_of(model)
        learning = _learning(model, inputs)
    except UnfitError as reason:
        raise SkippedError(str(reason)) from reason
    except Exception as error:
        raise SkippedError(f"does not train: {type(error).__name__}: {error}") from error
    if not learning:
        raise SkippedError("no linear layer gets a gradient")
    for name_of_layer in learning:
        linear = _as_linear(model.get_submodule(name_of_layer))
        small = fourbit(linear, quant_type="nf4", compute=torch.float32)
        small.bias = linear.bias
        parent, _, last = name_of_layer.rpartition(".")
        setattr(model.get_submodule(parent), last, small.to("cpu"))
    pattern = "|".join(one.replace(".", r"\.") for one in learning)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=f"({pattern})")).train()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        logits_of(model(**inputs)).float().pow(2).mean().backward()
        optimizer.step()

    told = {
        "base.bits": 4, "base.quant_type": "nf4", "base.compute_dtype": "float32", "base.double_quant": True,
        "checkpointing": False, "mode": "train", "optimizer.class": "torch.optim.AdamW", "optimizer.fused": False,
        "lora.dtype": "float32", "lora.dropout": 0.0,
    }  # fmt: skip
    return Twin(model=model, step=step, required=RUNNING | told)


def _learning(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Linear layers that a step gives a gradient that is no rounding; the head left out, and routers that are linear
    layers by their class and return scores beside the product."""
    plain: set[nn.Module] = set()
    watched = [
        module.register_forward_hook(lambda layer, _, output: plain.add(layer) if isinstance(output, Tensor) else None)
        for module in model.modules()
        if _is_linear(module)
    ]
    logits_of(model(**inputs)).float().pow(2).mean().backward()
    for handle in watched:
        handle.remove()
    floats = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) or "none"  # their dtype is read by the family
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        name
        for name, module in model.named_modules()
        if module in plain and module is not head and module.weight.grad is not None
        and module.weight.numel() >= 64 and float(module.weight.grad.abs().max()) > 1e-6 and not name.endswith(floats)
    ]  # fmt: skip
    model.zero_grad()
    return found


def _is_linear(module: nn.Module) -> bool:
    """As transformers finds what it stores in 4 bits; torch's own subclasses are read by other code than their own."""
    own = type(module) is nn.Linear or type(module).__module__.startswith("transformers.")
    return own and isinstance(module, nn.Linear | Conv1D)


def _as_linear(module: Any) -> Any:
    """GPT-2 keeps its weights the other way round."""
    if not isinstance(module, Conv1D):
        return module
    linear = nn.Linear(*module.weight.shape)
    linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
    return linear


for _name in NAMES:
    MAKERS[f"family in NF4: {_name}"] = functools.partial(run_of, _name)
