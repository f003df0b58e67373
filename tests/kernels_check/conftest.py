"""A real, tiny, quantised Llama with a PEFT adapter, an optimizer and a step."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest


@dataclass
class Training:
    """One fine-tuning run that a test can step."""

    model: Any
    optimizer: Any
    inputs: dict[str, Any]
    instrument: str = "profile"
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One forward, backward and optimizer step."""
        self.optimizer.zero_grad()
        loss = self.model(**self.inputs, labels=self.inputs["input_ids"]).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def check(self, path: str, required: Any = None, step: Callable[[], object] | None = None) -> Any:
        """Verify one path."""
        requirements = {} if required is None else {path: required}
        return next(check for check in self.verify(requirements, step) if check.path == path)

    def verify(self, requirements: dict[str, Any], step: Callable[[], object] | None = None, **options: Any) -> Any:
        """Verify with the run's instrument."""
        import kernels_check

        return kernels_check.verify(self.model, step or self.step, requirements, instrument=self.instrument, **options)


def _quantised(linear: Any, *, quant_type: str, double: bool, compute: Any) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=compute)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer.to("cpu")


def build_training(
    *,
    quant: str | Callable[[Any], Any] | None = "nf4",
    double: bool = True,
    compute: str | None = "bfloat16",
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    attention_dropout: float = 0.0,
    unquantised: tuple[str, ...] = ("lm_head",),
    targets: Any = ("q_proj", "v_proj"),
    lora_dropout: float = 0.05,
    make_optimizer: Callable[[Any], Any] | None = None,
    tokens: int = 16,
    instrument: str = "profile",
) -> Training:
    """Build a seeded run: Llama of 2 layers, hidden 128, 4 heads, 2 key/value heads."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=attention_dropout,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    if quant is not None:
        computed = None if compute is None else getattr(torch, compute)
        for name, parent in list(model.named_modules()):
            for child_name, child in list(parent.named_children()):
                full = f"{name}.{child_name}"
                if isinstance(child, torch.nn.Linear) and not any(full.endswith(skipped) for skipped in unquantised):
                    if callable(quant):
                        layer = quant(child)
                    else:
                        layer = _quantised(child, quant_type=quant, double=double, compute=computed)
                    setattr(parent, child_name, layer)
    chosen = targets if isinstance(targets, str) else list(targets)
    adapter = peft.LoraConfig(r=4, lora_dropout=lora_dropout, target_modules=chosen, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    ids = torch.randint(0, 96, (2, tokens))
    return Training(model=model, optimizer=make(trainable), inputs={"input_ids": ids}, instrument=instrument)


@pytest.fixture(params=["profile", "spy"])
def instrument(request: pytest.FixtureRequest) -> str:
    """Both instruments, which must agree."""
    return str(request.param)


@pytest.fixture
def training(instrument: str) -> Callable[..., Training]:
    """The builder of ``build_training``."""
    return partial(build_training, instrument=instrument)
