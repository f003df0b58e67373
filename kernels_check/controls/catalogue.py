"""Every negative control, as data."""

from __future__ import annotations

from kernels_check.controls import sabotage
from kernels_check.controls.batches import BATCHES
from kernels_check.controls.control import Control, small
from kernels_check.controls.of_adapter import ADAPTER
from kernels_check.controls.of_attention import ATTENTION, PRODUCTS
from kernels_check.controls.of_execution import EXECUTION
from kernels_check.controls.on_cuda import CUDA_CONTROLS

BASE = (
    Control(
        name="an unquantised layer among the targets",
        path="base.bits",
        required=4,
        sabotage=small(unquantised=("lm_head", "layers.1.self_attn.v_proj")),
        twin=small(),
        words=("3 of 4 targeted layers: 4", "layers.1.self_attn.v_proj (16)", "skip list"),
    ),
    Control(
        name="fp4 in place of nf4",
        path="base.quant_type",
        required="nf4",
        sabotage=small(quant="fp4"),
        twin=small(),
        words=("0 of 4 targeted layers: nf4", "q_proj (fp4)", "bnb_4bit_quant_type='nf4'"),
    ),
    Control(
        name="no double quantisation",
        path="base.double_quant",
        required=True,
        sabotage=small(double=False),
        twin=small(),
        words=("0 of 4 targeted layers: True", "q_proj (False)", "bnb_4bit_use_double_quant=True"),
    ),
    Control(
        name="float32 compute dtype, the library's default",
        path="base.compute_dtype",
        required="bfloat16",
        sabotage=small(compute="float32"),
        twin=small(),
        words=("0 of 4 targeted layers: bfloat16", "q_proj (float32)", "bnb_4bit_compute_dtype=torch.bfloat16"),
    ),
    Control(
        name="a float base loaded in float32",
        path="base.bits",
        required=16,
        sabotage=small(quant=None, dtype="float32"),
        twin=small(quant=None),
        words=("0 of 4 targeted layers: 16", "q_proj (32)", "load with dtype=torch.bfloat16"),
    ),
    Control(
        name="a 4-bit base loaded in float32",
        path="base.compute_dtype",
        required="bfloat16",
        sabotage=small(dtype="float32"),
        twin=small(),
        words=("backward dequantises to float32 first", "load it with dtype=torch.bfloat16"),
        caught_by="reason",
    ),
    Control(
        name="the base accidentally trainable",
        path="base.frozen",
        required=True,
        sabotage=small(sabotage.train_a_norm),
        twin=small(),
        words=("require gradients: base_model.model.model.norm.weight", "received a gradient", "tensors changed"),
    ),
)

CONTROLS: tuple[Control, ...] = (*ATTENTION, *PRODUCTS, *BATCHES, *BASE, *ADAPTER, *EXECUTION, *CUDA_CONTROLS)
