"""Faults of a run after it was built, as users cause them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from kernels_check.observe.adapter import adapter_parameters
from negative_controls.small_run import PAD_TOKEN, SmallRun, autocast, only_math


def force_math(run: SmallRun) -> None:
    """Keep ``sdpa_kernel(MATH)`` around the step, as after a numerical comparison."""
    run.around = only_math


def use_autocast(run: SmallRun) -> None:
    """Run every step under autocast to bfloat16."""
    run.around = autocast


def use_autocast_on_cuda(run: SmallRun) -> None:
    """Run every step under autocast to bfloat16 on CUDA."""
    run.around = partial(autocast, "cuda")


def only_flash_and_efficient(run: SmallRun) -> None:
    """Exclude cuDNN, which Hopper prefers and which accepts inputs that flash refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    run.around = partial(sdpa_kernel, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def tf32_on(run: SmallRun) -> None:
    """Let float32 products run on tensor cores, inside each step only."""
    run.around = partial(_precision, "tf32")


def tf32_off(run: SmallRun) -> None:
    """Keep float32 products in float32, the default."""
    run.around = partial(_precision, "ieee")


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    import torch

    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


def pad(run: SmallRun, *, real: int) -> None:
    """Pad every row to the longest, with ``real`` tokens left, and pass the tokenizer's mask."""
    import torch

    ids = run.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1:, real:] = 0
    run.inputs = {"input_ids": ids.masked_fill(mask.eq(0), PAD_TOKEN), "attention_mask": mask}


def pad_one_token(run: SmallRun) -> None:
    """Pad a single token, which is enough for a mask."""
    pad(run, real=run.inputs["input_ids"].shape[1] - 1)


def checkpoint(run: SmallRun) -> None:
    """Enable gradient checkpointing, as a Trainer does."""
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model.enable_input_require_grads()


def eval_mode(run: SmallRun) -> None:
    """Forget ``model.train()`` after an evaluation."""
    run.model.eval()


def dropout_off(run: SmallRun) -> None:
    """Leave dropout in eval mode after an evaluation."""
    from torch.nn import Dropout

    for module in run.model.modules():
        if isinstance(module, Dropout):
            module.eval()


def _train_norms(run: SmallRun) -> None:
    """Train the norms, so that the loss stays differentiable where the adapter gives no gradient."""
    of_adapter = adapter_parameters(run.model)
    for name, value in run.model.named_parameters():
        value.requires_grad_(name in of_adapter or name.endswith("norm.weight"))


def merge_adapter(run: SmallRun) -> None:
    """Merge the adapter for inference and continue training."""
    run.model.merge_adapter()
    _train_norms(run)


def target_nothing(run: SmallRun) -> None:
    """Use the targets of another architecture, catch the library's error, and train without an adapter."""
    import peft

    base = run.model.unload()
    try:
        run.model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query_key_value"]))
    except ValueError:
        run.model = base.train()
    _train_norms(run)
    _new_optimizer(run)


def target_what_never_runs(run: SmallRun) -> None:
    """Adapt a module that no forward calls, such as a spare head."""
    import peft
    import torch

    base = run.model.unload()
    base.spare_head = torch.nn.Linear(128, 96)
    run.model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["spare_head"])).train()
    _train_norms(run)
    _new_optimizer(run)


def _new_optimizer(run: SmallRun) -> None:
    import torch

    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)
