"""A small LoRA run with real libraries, for trying faults and fast paths on a machine.

The model is a two-layer Llama with random weights from a fixed seed, quantised by bitsandbytes, with a PEFT adapter.
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
    step_context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context in which every step runs, such as autocast."""

    def step(self) -> None:
        """Run a forward pass, a backward pass and an update."""
        with self.step_context():
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
    change: Callable[[SmallRun], object] | None = None,
    device: str = "cpu",
) -> SmallRun:
    """Build a run with a fixed seed.

    Args:
        quant: ``nf4``, ``fp4`` or ``int8``; None leaves linear layers as they are.
        double: also quantise the scales of 4-bit weights.
        compute: compute dtype of the 4-bit layers.
        dtype: dtype of the weights before quantisation.
        attention: the model's ``attn_implementation``.
        skipped: name suffixes of linear layers that are not quantised.
        rank: rank of the adapter.
        optimizer: makes the optimizer from the trainable parameters; default: AdamW.
        change: is called with the run at the end, to change it.
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
            compute_dtype = getattr(torch, compute)
            layer = eight_bit(linear) if quant == "int8" else four_bit(linear, quant, double, compute_dtype)
            model.set_submodule(name, layer)
    lora = peft.LoraConfig(r=rank, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.to(device), lora).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = (optimizer or torch.optim.AdamW)(trainable, lr=1e-3)
    run = SmallRun(model=model, optimizer=made, inputs={"input_ids": torch.randint(1, 96, (2, 16)).to(device)})
    if change is not None:
        change(run)
    return run


def four_bit(linear: Any, quant_type: str, double: bool = True, compute: Any = None) -> Any:
    """The 4-bit layer for a linear layer's weight; it quantises when it is moved to its device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=compute)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer


def eight_bit(linear: Any, threshold: float = 0.0) -> Any:
    """The 8-bit layer for a linear layer's weight; inputs above the threshold are outliers and stay in 16 bits."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    return layer


def compile_layers(run: SmallRun, count: int, *, backend: str = "eager") -> None:
    """Compile the first ``count`` of the two decoder layers, and run a step that compiles them."""
    import torch

    torch.compiler.reset()  # all models of the process share the code of these layers
    run.inputs["use_cache"] = False  # a growing cache would need another graph in every layer
    run.model.enable_input_require_grads()
    for layer in run.model.base_model.model.model.layers[:count]:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    run.step()
