"""Controls of fused kernels that stand in a model, by constructed stand-ins: the real ones run on a GPU alone.

What is bound says in its ``__module__`` that it is a library's, and computes what the model's own does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from kernels_check.controls.control import Control, small
from kernels_check.controls.small_run import SmallRun


def bind_norms(run: SmallRun) -> None:
    """Bind the forward of a library to every norm, as ``apply_liger_kernel_to_llama(model=model)`` does."""
    for norm in _norms(run):
        _bind(norm)


def bind_too_late(run: SmallRun) -> None:
    """Swap the class for models to come, as the same call does without ``model=``, when this one is built already."""
    del run  # which keeps what it was built with


def bind_one_norm(run: SmallRun) -> None:
    """Patch what has been found under one name."""
    _bind(_norms(run)[-1])


def pass_one_by(run: SmallRun) -> None:
    """Bind all, and let one block hand its input on as it is."""
    bind_norms(run)
    block = run.model.get_base_model().model.layers[1]
    block.forward = lambda hidden_states, **_: hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))


def _norms(run: SmallRun) -> list[Any]:
    return [module for module in run.model.modules() if "RMSNorm" in type(module).__name__]


def _bind(norm: Any) -> None:
    own = type(norm).forward

    def forward(self: Any, hidden_states: Any) -> Any:
        return own(self, hidden_states)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    norm.forward = MethodType(forward, norm)


FUSED: tuple[Control, ...] = (
    Control(
        name="fused norms asked for when the model was built already",
        path="fused.kernels",
        required="rms_norm",
        sabotage=small(bind_too_late),
        twin=small(bind_norms),
        words=("rms_norm 0 of 5", "apply it before the model is built"),
    ),
    Control(
        name="a fused norm in one place of five",
        path="fused.kernels",
        required="rms_norm",
        sabotage=small(bind_one_norm),
        twin=small(bind_norms),
        words=("rms_norm 1 of 5 of liger_kernel",),
    ),
    Control(
        name="a fused norm that is passed by",
        path="fused.kernels",
        required="rms_norm",
        sabotage=small(pass_one_by),
        twin=small(bind_norms),
        words=("rms_norm 4 of 5 of liger_kernel, bound in 5",),
    ),
)
