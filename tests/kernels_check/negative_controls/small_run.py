"""A real but tiny fine-tuning run: a Llama of two layers, quantised by bitsandbytes, with a PEFT adapter.

Everything that is judged (operators, packed bytes, gradients, optimizer state) is that of the real libraries; only the
sizes are small: hidden 128, 4 query heads, 2 key/value heads, 96 tokens of vocabulary, random weights of a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

PAD_TOKEN = 0


@dataclass(kw_only=True)
class SmallRun:
    """One run that can be stepped, changed and verified; mutable, because controls break it after it was built."""

    model: Any
    optimizer: Any
    inputs: dict[str, Any]
    packed: dict[str, Any] | None = None
    """Packed batch for the isolation probe."""
    accumulated: list[dict[str, Any]] = field(default_factory=list)
    """Inputs of forwards before the last, whose gradients are added to its own."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What every step happens in, such as autocast."""
    losses: list[float] = field(default_factory=list)
    passes: Callable[[SmallRun], Any] | None = None
    """What takes the place of one forward and backward pass; gives the loss."""
    micro_batch: int = 0
    """Which of several passes is being taken."""
    by_closure: bool = False
    """Whether the optimizer's step is given the passes as a closure."""

    def step(self) -> None:
        """One forward, backward and optimizer step."""
        with self.around():
            if self.by_closure:
                loss = self.optimizer.step(self.gradients)
            else:
                loss = self.gradients()
                self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def gradients(self) -> Any:
        """The passes before an update; gives the loss."""
        self.optimizer.zero_grad()
        return self.one_pass() if self.passes is None else self.passes(self)

    def one_pass(self) -> Any:
        """Forward and backward passes over the inputs; gives the last loss."""
        for inputs in (*self.accumulated, self.inputs):
            loss = self.model(**{"labels": inputs["input_ids"]} | inputs).loss
            loss.backward()
        return loss

    def check(self, path: str, required: Any = None, step: Callable[[], object] | None = None) -> Any:
        """Verify one path."""
        requirements = {} if required is None else {path: required}
        return next(check for check in self.verify(requirements, step) if check.path == path)

    def verify(self, requirements: dict[str, Any], step: Callable[[], object] | None = None, **options: Any) -> Any:
        """Verify with the packed batch where there is one."""
        from kernels_check import verify

        options = {"batch": self.packed, **options}
        return verify(self.model, step or self.step, requirements, **options)


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
        double: whether the scales are quantised too.
        compute: compute dtype of the 4-bit layers; None leaves it to bitsandbytes.
        dtype: of the weights before quantisation, and of what is not quantised.
        attention: the model's ``attn_implementation``.
        attention_dropout: of the attention weights, in training.
        head_size: of each attention head.
        unquantised: ends of the names of linear layers that keep float weights.
        prepare: call ``peft.prepare_model_for_kbit_training``, without checkpointing.
        targets: ``target_modules`` of the adapter.
        rank: of the adapter.
        lora_dropout: of the adapter's input.
        adapter: makes PEFT's configuration of another adapter; the three above do not count then.
        make_optimizer: from the trainable parameters to the optimizer; AdamW where left out.
        tokens: in each of the two rows.
        device: where it runs.
    """
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
        head_dim=head_size,
        max_position_embeddings=128,
        attention_dropout=attention_dropout,
        pad_token_id=PAD_TOKEN,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    if quant is not None:
        computed = None if compute is None else getattr(torch, compute)
        for parent, name, linear in _linears(model, unquantised):
            if callable(quant):
                setattr(parent, name, quant(linear))
            else:
                setattr(parent, name, fourbit(linear, quant_type=quant, double=double, compute=computed))
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


def _linears(model: Any, skipped: tuple[str, ...]) -> list[tuple[Any, str, Any]]:
    """Parent, name and module of every linear layer to quantise."""
    from torch.nn import Linear

    return [
        (parent, name, child)
        for path, parent in list(model.named_modules())
        for name, child in list(parent.named_children())
        if isinstance(child, Linear) and not f"{path}.{name}".endswith(skipped)
    ]


def fourbit(linear: Any, *, quant_type: str, double: bool = True, compute: Any = None) -> Any:
    """The 4-bit layer of a linear layer's weight; it quantises when it is moved to its device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=compute)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer.to(linear.weight.device)


@contextmanager
def autocast(device: str = "cpu") -> Iterator[None]:
    """Autocast to bfloat16."""
    import torch

    with torch.autocast(device, dtype=torch.bfloat16):
        yield


@contextmanager
def only_math() -> Iterator[None]:
    """SDPA without its fused backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def forget_compilations() -> None:
    """Drop all compiled code and the record of it, which all models of the process share."""
    import torch

    torch.compiler.reset()
    torch._dynamo.utils.clear_compilation_metrics()
