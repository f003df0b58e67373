"""A real but tiny fine-tuning run: a Llama of two layers, quantised by bitsandbytes, with a PEFT adapter.

All judged parts (operators, packed bytes, gradients, optimizer state) are those of the real libraries; only the sizes
are small: hidden 128, 4 query heads, 2 key/value heads, 96 tokens of vocabulary, random weights with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels_check import small_run

PAD_TOKEN = 0


@dataclass(kw_only=True)
class SmallRun(small_run.SmallRun):
    """A run that can be stepped, changed and verified; mutable, because controls break it after it was built."""

    packed: dict[str, Any] | None = None
    """Packed batch for the isolation probe."""
    accumulated: list[dict[str, Any]] = field(default_factory=list)
    """Inputs of earlier forwards whose gradients are accumulated."""
    losses: list[float] = field(default_factory=list)
    passes: Callable[[SmallRun], Any] | None = None
    """A replacement of the forward and backward pass; it returns the loss."""
    by_closure: bool = False
    """Whether the optimizer's step gets the passes as a closure."""

    def step(self) -> None:
        """Take one forward, backward and optimizer step."""
        with self.step_context():
            if self.by_closure:
                loss = self.optimizer.step(self.gradients)
            else:
                loss = self.gradients()
                self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def gradients(self) -> Any:
        """Take the passes before an update and return the loss."""
        self.optimizer.zero_grad()
        return self.one_pass() if self.passes is None else self.passes(self)

    def one_pass(self) -> Any:
        """Take forward and backward passes over the inputs and return the last loss."""
        for inputs in (*self.accumulated, self.inputs):
            loss = backward(self.model(**{"labels": inputs["input_ids"]} | inputs).loss)
        return loss

    def check(self, path: str, required: Any = None, step: Callable[[], object] | None = None) -> Any:
        """Verify one path."""
        requirements = {} if required is None else {path: required}
        return next(check for check in self.verify(requirements, step) if check.path == path)

    def verify(self, requirements: dict[str, Any], step: Callable[[], object] | None = None) -> Any:
        """Verify, and probe the packed batch if there is one, unless the step itself shows a leak."""
        from kernels_check import probe_isolation, verify

        checks = verify(self.model, step or self.step, requirements)
        if self.packed is None:
            return checks
        probed = probe_isolation(self.model, self.packed)
        return [
            probed if one.path == probed.path and (one.status != "fallback" or not probed.met) else one
            for one in checks
        ]


def build(
    *,
    quant: str | Callable[[Any], Any] | None = "nf4",
    double: bool = True,
    compute: str | None = "bfloat16",
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    attention_dropout: float = 0.0,
    head_size: int = 32,
    unquantised: tuple[str, ...] = ("lm_head",),
    prepare: bool = False,
    targets: Any = ("q_proj", "v_proj"),
    rank: int = 4,
    lora_dropout: float = 0.05,
    adapter: Callable[[], Any] | None = None,
    make_optimizer: Callable[[Any], Any] | None = None,
    tokens: int = 16,
    device: str = "cpu",
) -> SmallRun:
    """Build a seeded run.

    Args:
        quant: ``nf4``, ``fp4``, a function from a linear layer to its replacement, or None for float weights.
        compute: compute dtype of the 4-bit layers; None leaves it to bitsandbytes.
        prepare: call ``peft.prepare_model_for_kbit_training``, without checkpointing.
        adapter: returns PEFT's configuration of another adapter; targets, rank and dropout are ignored then.
        tokens: the number of tokens in each of the two rows.
    """
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=128,
        attention_dropout=attention_dropout,
        pad_token_id=PAD_TOKEN,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    for name, linear in [*model.named_modules()]:
        if quant is not None and isinstance(linear, torch.nn.Linear) and not name.endswith(unquantised):
            computed = None if compute is None else getattr(torch, compute)
            layer = quant(linear) if callable(quant) else small_run.four_bit(linear, quant, double, computed)
            model.set_submodule(name, layer)
    model = model.to(device)
    if prepare:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    chosen = targets if isinstance(targets, str) else list(targets)
    lora = peft.LoraConfig(r=rank, lora_dropout=lora_dropout, target_modules=chosen, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora if adapter is None else adapter())
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    ids = torch.randint(1, 96, (2, tokens)).to(device)
    return SmallRun(model=model, optimizer=make(trainable), inputs={"input_ids": ids})


only_math = partial(sdpa_kernel, SDPBackend.MATH)
autocast = partial(torch.autocast, dtype=torch.bfloat16)


def replace_step(run: SmallRun, step: Callable[[], object]) -> None:
    """Replace the step of a run."""
    run.step = step  # type: ignore[assignment,method-assign]


def wrap_step(
    run: SmallRun, *, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> None:
    """Call functions before and after every step."""
    original = run.step

    def step() -> None:
        before()
        original()
        after()

    replace_step(run, step)


def backward(loss: Any) -> Any:
    """Run the backward pass and return the loss."""
    loss.backward()
    return loss


def forget_compilations() -> None:
    """Drop all compiled code and its metrics, which all models of the process share."""
    torch.compiler.reset()
    torch._dynamo.utils.clear_compilation_metrics()
