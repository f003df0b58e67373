"""A small LoRA run of real libraries, by which faults and fast paths are tried on a machine.

A Llama of two layers with random weights of a fixed seed, quantised by bitsandbytes, with an adapter of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from kernels_check.check import Check, Json


@dataclass(kw_only=True)
class SmallRun:
    """A run that can be stepped and verified."""

    model: Any
    optimizer: Any
    inputs: dict[str, Any]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What every step happens in, such as autocast."""

    def step(self) -> None:
        """Forward, backward and an update."""
        with self.around():
            self.optimizer.zero_grad()
            self.model(**self.inputs, labels=self.inputs["input_ids"]).loss.backward()
            self.optimizer.step()

    def check(self, path: str, required: Json) -> Check:
        """Verify one path."""
        from kernels_check import verify

        return next(check for check in verify(self.model, self.step, {path: required}) if check.path == path)


def build(
    *,
    quant: str | None = "nf4",
    double: bool = True,
    compute: str = "bfloat16",
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    skipped: tuple[str, ...] = ("lm_head",),
    rank: int = 4,
    optimizer: Callable[..., Any] | None = None,
    device: str = "cpu",
) -> SmallRun:
    """Build a run of a fixed seed.

    Args:
        quant: ``nf4``, ``fp4`` or ``int8``; None leaves linear layers as they are.
        double: quantise the scales of 4-bit weights too.
        compute: compute dtype of the 4-bit layers.
        dtype: of the weights before quantisation.
        attention: the model's ``attn_implementation``.
        skipped: ends of the names of linear layers that are not quantised.
        rank: of the adapter.
        optimizer: from the trainable parameters to the optimizer; AdamW where left out.
        device: where it runs.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    for name, linear in [*model.named_modules()]:
        if quant is not None and isinstance(linear, torch.nn.Linear) and not name.endswith(skipped):
            parent, _, last = name.rpartition(".")
            compute_dtype = getattr(torch, compute)
            layer = eight_bit(linear) if quant == "int8" else four_bit(linear, quant, double, compute_dtype)
            setattr(model.get_submodule(parent), last, layer)
    lora = peft.LoraConfig(r=rank, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.to(device), lora).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = (optimizer or torch.optim.AdamW)(trainable, lr=1e-3)
    return SmallRun(model=model, optimizer=made, inputs={"input_ids": torch.randint(1, 96, (2, 16)).to(device)})


def four_bit(linear: Any, quant_type: str, double: bool = True, compute: Any = None) -> Any:
    """The 4-bit layer of a linear layer's weight; it quantises when it is moved to its device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=compute)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer


def eight_bit(linear: Any, threshold: float = 0.0) -> Any:
    """The 8-bit layer of a linear layer's weight; from the threshold on, inputs are outliers and stay in 16 bits."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    return layer


def compile_layers(run: SmallRun, count: int, *, backend: str = "eager") -> None:
    """Compile the first ``count`` of the two decoder layers, and take a step in which they are compiled."""
    import torch

    torch.compiler.reset()  # the code of these layers is shared by all models of the process
    run.inputs["use_cache"] = False  # a cache that fills up is another graph in every layer
    run.model.enable_input_require_grads()
    for layer in run.model.base_model.model.model.layers[:count]:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    run.step()
