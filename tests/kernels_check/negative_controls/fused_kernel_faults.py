"""Fakes of fused kernels that are bound in a model; the real ones run on a GPU only.

Each fake names a library in its ``__module__`` and computes what the model's own function does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from negative_controls.small_run import SmallRun


def bind_norms(run: SmallRun) -> None:
    """Bind a library's forward to every norm, as ``apply_liger_kernel_to_llama(model=model)`` does."""
    for norm in _norms(run):
        _bind(norm)


def bind_too_late(run: SmallRun) -> None:
    """Patch the class only, as the same call does without ``model=``, after this model was built."""
    del run  # the run keeps the functions that it was built with


def bind_one_norm(run: SmallRun) -> None:
    """Patch only one norm."""
    _bind(_norms(run)[-1])


def bind_attention(run: SmallRun, *, library: str = "unsloth", home: str = "kernels.fast_lora") -> None:
    """Bind another forward to every attention; it calls its projections as libraries do.

    Args:
        run: to be changed.
        library: the library of the forward and of its projections.
        home: module of the projections in that library.
    """

    def apply_qkv(self: Any, hidden: Any) -> Any:
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def apply_o(self: Any, hidden: Any) -> Any:
        return self.o_proj(hidden)

    apply_qkv.__module__ = apply_o.__module__ = f"{library}.{home}"
    for block in run.model.get_base_model().model.layers:
        attention = block.self_attn
        attention.apply_qkv, attention.apply_o = apply_qkv, apply_o
        attention.forward = MethodType(_attend(f"{library}.models.llama"), attention)


def _attend(home: str) -> Callable[..., Any]:
    """Return a forward of attention that calls the projections of the module."""
    from torch.nn import functional
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def forward(self: Any, hidden_states: Any, position_embeddings: Any, **_: Any) -> Any:
        rows, tokens, _width = hidden_states.shape
        query, key, value = (
            part.view(rows, tokens, -1, self.head_dim).transpose(1, 2) for part in self.apply_qkv(self, hidden_states)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.apply_o(self, mixed.transpose(1, 2).reshape(rows, tokens, -1)), None

    forward.__module__ = home
    return forward


def bind_loss(run: SmallRun) -> None:
    """Bind a library's forward to the model with the head, as a fused loss does."""
    head = run.model.get_base_model()
    own = type(head).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    forward.__module__ = "liger_kernel.transformers.model.llama"
    head.forward = MethodType(forward, head)


def lose_outside(run: SmallRun) -> None:
    """Bind the fused loss, but compute the loss from logits, as a trainer with its own loss does."""
    from torch.nn import functional

    bind_loss(run)

    def passes(run: SmallRun) -> Any:
        ids = run.inputs["input_ids"]
        logits = run.model(input_ids=ids).logits.float()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss

    run.passes = passes


def _norms(run: SmallRun) -> list[Any]:
    return [module for module in run.model.modules() if "RMSNorm" in type(module).__name__]


def _bind(norm: Any) -> None:
    own = type(norm).forward

    def forward(self: Any, hidden_states: Any) -> Any:
        return own(self, hidden_states)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    norm.forward = MethodType(forward, norm)
