"""Faults of a run's base after it was built, and healthy variations that look similar.

Batches, and ways to pass them, that leak between records or are mostly padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from kernels_check.observe.adapter import adapter_layers
from negative_controls.faults import pad
from negative_controls.small_run import PAD_TOKEN, SmallRun


def after_each_step(run: SmallRun, change: Callable[[], object]) -> None:
    """Call a function at the end of every update."""
    run.optimizer.register_step_post_hook(lambda *_: change())


def normalise_batches(run: SmallRun) -> None:
    """Append a batch norm, as in vision towers, and leave it in train mode."""

    class Normalised(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.statistics = norm, nn.BatchNorm1d(128, affine=False)

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = self.norm(hidden)
            normalised: Tensor = self.statistics(hidden.float().transpose(1, 2)).transpose(1, 2)
            return normalised.to(hidden.dtype)

    body = run.model.base_model.model.model
    body.norm = Normalised(body.norm)


def normalise_as_loaded(run: SmallRun) -> None:
    """Append a batch norm as ``normalise_batches`` does, with fixed statistics."""
    normalise_batches(run)
    run.model.base_model.model.model.norm.statistics.eval()


def drift_offset(run: SmallRun) -> None:
    """Change the offset of all scales of a weight."""
    layer = adapter_layers(run.model)[1].base
    after_each_step(run, lambda: layer.weight.quant_state.offset.add_(1e-3))


def flip_each_step(run: SmallRun) -> None:
    """Change the sign of a norm in each update, so that an even number of steps leaves the base as it was."""
    norm = run.model.base_model.model.model.norm.weight
    after_each_step(run, lambda: norm.data.neg_())


def cache_float_products(run: SmallRun) -> None:
    """Dequantise the targets once, and multiply by the float weights from then on."""
    from bitsandbytes.functional import dequantize_4bit

    for base in (layer.base for layer in adapter_layers(run.model)):
        weight = dequantize_4bit(base.weight.data, base.weight.quant_state).to(torch.bfloat16)
        base.forward = partial(nn.functional.linear, weight=weight)


def drift_int8_scales(run: SmallRun) -> None:
    """Change the scales, which the first forward has moved to the layer."""
    layer = adapter_layers(run.model)[0].base
    after_each_step(run, lambda: layer.state.SCB.add_(1))


def add_biases(run: SmallRun, bias: str = "none") -> None:
    """Give the targets biases, and attach the adapter again."""
    base = run.model.unload()
    for layer in base.model.layers:
        for target in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            zeros = torch.zeros(target.out_features, dtype=target.weight.dtype)
            target.bias = torch.nn.Parameter(zeros.to(target.weight.device), requires_grad=False)
    run.model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias)).train()
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def train_biases(run: SmallRun) -> None:
    """Let PEFT train the biases of the targets with the adapter."""
    add_biases(run, "lora_only")


def train_biases_of_another(run: SmallRun) -> None:
    """Switch to an adapter without trained biases; PEFT leaves those of the first one trainable."""
    train_biases(run)
    run.model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    run.model.set_adapter("second")
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def add_experts(run: SmallRun) -> Any:
    """Add experts whose weights are one parameter, which quantisation of linear layers does not reach."""
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.randn(4, 128, 128).bfloat16(), requires_grad=False)
    run.model.base_model.model.experts = experts
    return experts


def add_quantised_experts(run: SmallRun) -> None:
    """Add experts as ``add_experts`` does, quantised by a parametrisation."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(add_experts(run), "gate_up_proj", quant_type="nf4")


def swap_quant_states(run: SmallRun) -> None:
    """Swap the quantisation state of two layers, as a loader with wrong keys does."""
    first, second = (layer.base for layer in adapter_layers(run.model) if layer.name.endswith("q_proj"))
    first.weight.quant_state = second.weight.quant_state


_FOREIGN_PAD = 5
"""A padding token other than the configuration's."""


def pack(run: SmallRun, **more: Any) -> None:
    """Pack two records into a row, marked by positions that restart."""
    positions = torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]])
    run.inputs |= {"position_ids": positions.to(run.inputs["input_ids"].device), **more}
    run.packed = dict(run.inputs)


def pack_without_cache(run: SmallRun) -> None:
    """Pack without a cache, so that the mask follows from the positions, as it should."""
    pack(run, use_cache=False)


def pass_mask_of_ones(run: SmallRun) -> None:
    """Pass a mask of ones, as a tokenizer returns it, which removes the record boundaries."""
    run.inputs |= {"attention_mask": run.inputs["input_ids"].new_ones(run.inputs["input_ids"].shape)}


def accumulate(**more: Any) -> Callable[[SmallRun], None]:
    """Accumulate over another batch that is passed in another way."""

    def change(run: SmallRun) -> None:
        run.accumulated = [run.inputs | more]

    return change


def mask_blocks(run: SmallRun, *, merged_record: int | None = None) -> None:
    """Pack four records into a row, marked by a block mask.

    Args:
        run: to be changed.
        merged_record: number of a record that attends to the previous one.
    """
    ids = run.inputs["input_ids"]
    numbers = torch.arange(ids.shape[1], device=ids.device) // 4
    merged = torch.where(numbers == merged_record, numbers - 1, numbers) if merged_record is not None else numbers
    mask = merged[:, None] == merged[None, :]
    positions = torch.arange(4, device=ids.device).repeat(len(ids), ids.shape[1] // 4)
    shape = len(ids), 1, ids.shape[1], ids.shape[1]
    mask = mask.tril().expand(shape)
    run.inputs |= {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    run.packed = dict(run.inputs)


def merge_two_records(run: SmallRun) -> None:
    """Merge two records, neither of them the first, in the block mask."""
    mask_blocks(run, merged_record=3)


def pad_most(run: SmallRun) -> None:
    """Pad all rows but one, with one long record among short ones."""
    ids = run.inputs["input_ids"]
    run.inputs = {"input_ids": torch.cat([ids, ids.flip(1), ids])}
    pad(run, real=2)


def mask_padding_with_ones(run: SmallRun) -> None:
    """Pad most of the batch, with a mask that marks no padding."""
    pad_most(run)
    run.inputs["attention_mask"].fill_(1)


def pad_with_another_token(run: SmallRun) -> None:
    """Pad with a token other than the configuration's, which only the labels show."""
    pad_most(run)
    hidden = run.inputs.pop("attention_mask").eq(0)
    ids = run.inputs["input_ids"].masked_fill(hidden, _FOREIGN_PAD)
    run.inputs = {"input_ids": ids, "labels": ids.masked_fill(hidden, -100)}


def label_the_answer(run: SmallRun) -> None:
    """Label a prompt with -100, which is not padding."""
    ids = run.inputs["input_ids"]
    labels = ids.clone()
    labels[:, :12] = -100
    run.inputs = {"input_ids": ids, "labels": labels}


def pad_packed_rows(run: SmallRun) -> None:
    """Pack two short records into a row, with padding that is marked as a third record."""
    ids = run.inputs["input_ids"].clone()
    ids[:, 6:] = PAD_TOKEN
    positions = torch.tensor([*range(3), *range(3), *range(10)], device=ids.device).expand_as(ids)
    run.inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
