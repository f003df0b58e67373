"""Faults in how a run executes (compilation, recomputation, update), as users cause them, and fakes of fused kernels.

The real fused kernels need a GPU. Each fake is bound in a model, names a library in its ``__module__`` and computes
what the model's own function does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from negative_controls.small_run import SmallRun, backward, forget_compilations, replace_step, wrap_step


def fused_adamw(parameters: Any) -> Any:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def paged_adamw(parameters: Any) -> Any:
    """Return bitsandbytes' paged AdamW, whose state may leave the GPU."""
    return bnb.optim.PagedAdamW32bit(parameters, lr=1e-3)


def lose_fused(run: SmallRun) -> None:
    """Resume from a checkpoint of an unfused optimizer, whose state dict overwrites the fused flag."""
    run.step()
    parameters = [value for group in run.optimizer.param_groups for value in group["params"]]
    plain = torch.optim.AdamW([value.detach().clone() for value in parameters], lr=1e-3)
    run.optimizer.load_state_dict(plain.state_dict())


def compile_layers(run: SmallRun) -> None:
    """Compile the decoder layers one by one, so that a model of many layers compiles once."""
    compile_some(run, *decoder_layers(run))


def compile_some(run: SmallRun, *modules: Any) -> None:
    """Compile these modules and take a step."""
    forget_compilations()  # all models of the process share the code of these layers
    # A growing cache, or inputs that require no gradient, would give every layer another graph.
    run.inputs["use_cache"] = False
    run.model.enable_input_require_grads()
    for module in modules:
        module.forward = torch.compile(module.forward, backend="eager", dynamic=False)
    run.step()


def compile_feed_forward(run: SmallRun) -> None:
    """Compile only the feed-forward parts; the attention runs eagerly."""
    compile_some(run, *(layer.mlp for layer in decoder_layers(run)))


def compile_loss(run: SmallRun) -> None:
    """Compile a custom loss and nothing of the model."""
    forget_compilations()

    @torch.compile(backend="eager", dynamic=False)
    def compute_loss(logits: Any) -> Any:
        return logits.float().logsumexp(-1).mean()

    run.passes = lambda run: backward(compute_loss(run.model(**run.inputs).logits))
    run.step()


def decoder_layers(run: SmallRun) -> list[Any]:
    """Return the decoder layers in order."""
    return [module for module in run.model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def break_graphs(run: SmallRun) -> None:
    """Put a graph break into the compiled code, as a print would."""

    def insert_break(forward: Any) -> Any:
        def with_break(hidden: Any) -> Any:
            hidden = hidden * 1
            torch._dynamo.graph_break()
            return forward(hidden)

        return with_break

    for layer in decoder_layers(run):
        layer.mlp.forward = insert_break(layer.mlp.forward)
    compile_layers(run)


def change_lengths(run: SmallRun) -> None:
    """Give every batch another length, so that each one compiles another graph."""
    compile_layers(run)
    ids = run.inputs["input_ids"]
    for tokens in (15, 14):
        run.inputs = {**run.inputs, "input_ids": ids[:, :tokens]}
        run.step()


def reach_recompile_limit(run: SmallRun) -> None:
    """Change the lengths with a recompile limit of 1, which they exceed."""
    from torch._dynamo import config

    with config.patch(recompile_limit=1):
        change_lengths(run)


def half_paged(parameters: Any) -> Any:
    """Return an AdamW that marks half its state as paged, as bitsandbytes does.

    It imitates a paged optimizer, which needs managed memory and cannot run on a CPU.
    """

    class HalfPaged(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for state in self.state.values():
                state["exp_avg"].is_paged = True
            return result

    return HalfPaged(parameters, lr=1e-3)


def checkpoint_layers(run: SmallRun, layers: tuple[int, ...] = (0, 1), part: str = "") -> None:
    """Recompute these layers, or one part of each."""
    run.inputs["use_cache"] = False  # recomputation would fill a cache twice
    for index in layers:
        layer = decoder_layers(run)[index]
        module = getattr(layer, part) if part else layer
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def save_products(run: SmallRun, *, what: tuple[Any, ...] = (torch.ops.aten.mm.default,)) -> None:
    """Recompute the layers by selective checkpoints that save the results of these operators."""
    run.inputs["use_cache"] = False
    contexts = partial(create_selective_checkpoint_contexts, list(what))
    for layer in decoder_layers(run):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def step_itself(parameters: Any) -> Any:
    """Return an optimizer of a class that is derived from AdamW and updates by the signs of the gradients."""

    class Signed(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for value in self.param_groups[0]["params"]:
                value.sub_(value.grad.sign(), alpha=1e-4)

    return Signed(parameters, lr=1e-3)


def inherit_step(parameters: Any) -> Any:
    """Return an optimizer of a derived class that keeps the step of AdamW."""
    return type("Named", (torch.optim.AdamW,), {})(parameters, lr=1e-3)


def two_passes(run: SmallRun) -> None:
    """Accumulate the gradients of two micro-batches."""

    def passes(run: SmallRun) -> Any:
        for _ in range(2):
            loss = run.one_pass()
        return loss

    run.passes = passes


def eval_layer_in_second_pass(run: SmallRun) -> None:
    """Put a layer into eval mode for the second of two micro-batches only."""

    def passes(run: SmallRun) -> Any:
        layer = decoder_layers(run)[1].self_attn
        run.one_pass()
        layer.eval()
        loss = run.one_pass()
        layer.train()
        return loss

    run.passes = passes


def half_fused(parameters: Any) -> Any:
    """Return an AdamW with only its first group fused."""
    values = list(parameters)
    groups = [{"params": values[:4], "fused": True}, {"params": values[4:], "fused": False}]
    return torch.optim.AdamW(groups, lr=1e-3)


def clip_in_closure(run: SmallRun) -> None:
    """Run forward, backward and clipping in the optimizer's closure, as Lightning does."""

    def passes(run: SmallRun) -> Any:
        loss = run.one_pass()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, foreach=True)
        return loss

    run.passes, run.by_closure = passes, True


def train_another_model(run: SmallRun, *, by: str = "SGD", alone: bool = False) -> None:
    """Update another model in each step with a torch optimizer; with ``alone``, do not update this one."""
    other = torch.nn.Linear(4, 4)
    optimizer = getattr(torch.optim, by)(other.parameters(), lr=1e-3)

    def train() -> None:
        other(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    if alone:
        replace_step(run, run.gradients)
    wrap_step(run, after=train)


def bind_norms(run: SmallRun) -> None:
    """Bind a library's forward to every norm, as ``apply_liger_kernel_to_llama(model=model)`` does."""
    for norm in _norms(run):
        _bind(norm)


def bind_one_norm(run: SmallRun) -> None:
    """Patch only one norm."""
    _bind(_norms(run)[-1])


def bind_attention(run: SmallRun, *, library: str = "unsloth", module: str = "kernels.fast_lora") -> None:
    """Bind a library's forward to every attention; it calls projections of the library, as such forwards do.

    Args:
        run: the run to change.
        library: the library of the forward and of its projections.
        module: module of the projections in that library.
    """

    def apply_qkv(self: Any, hidden: Any) -> Any:
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def apply_o(self: Any, hidden: Any) -> Any:
        return self.o_proj(hidden)

    apply_qkv.__module__ = apply_o.__module__ = f"{library}.{module}"
    for block in run.model.get_base_model().model.layers:
        attention = block.self_attn
        attention.apply_qkv, attention.apply_o = apply_qkv, apply_o
        attention.forward = MethodType(_attend(f"{library}.models.llama"), attention)


def _attend(library_module: str) -> Callable[..., Any]:
    """Return a forward of this module of a library that calls the projections bound to the attention."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def forward(self: Any, hidden_states: Any, position_embeddings: Any, **_: Any) -> Any:
        rows, tokens, _width = hidden_states.shape
        query, key, value = (
            part.view(rows, tokens, -1, self.head_dim).transpose(1, 2) for part in self.apply_qkv(self, hidden_states)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.apply_o(self, mixed.transpose(1, 2).reshape(rows, tokens, -1)), None

    forward.__module__ = library_module
    return forward


def bind_loss(run: SmallRun) -> None:
    """Bind a library's forward to the model with the head, as a fused loss does."""
    causal_lm = run.model.get_base_model()
    original_forward = type(causal_lm).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original_forward(self, *args, **kwargs)

    forward.__module__ = "liger_kernel.transformers.model.llama"
    causal_lm.forward = MethodType(forward, causal_lm)


def compute_loss_outside(run: SmallRun) -> None:
    """Bind the fused loss, but compute the loss from logits, as a trainer with its own loss does."""
    bind_loss(run)

    def passes(run: SmallRun) -> Any:
        ids = run.inputs["input_ids"]
        logits = run.model(input_ids=ids).logits.float()
        return backward(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    run.passes = passes


def _norms(run: SmallRun) -> list[Any]:
    return [module for module in run.model.modules() if "RMSNorm" in type(module).__name__]


def _bind(norm: Any) -> None:
    original_forward = type(norm).forward

    def forward(self: Any, hidden_states: Any) -> Any:
        return original_forward(self, hidden_states)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    norm.forward = MethodType(forward, norm)
