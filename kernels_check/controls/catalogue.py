"""Every negative control, as data."""

from __future__ import annotations

from kernels_check.controls import sabotage
from kernels_check.controls.batches import BATCHES
from kernels_check.controls.control import Control, small
from kernels_check.controls.of_adapter import ADAPTER
from kernels_check.controls.of_attention import ATTENTION, PRODUCTS
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

EXECUTION = (
    Control(
        name="model left in eval mode",
        path="mode",
        required="train",
        sabotage=small(sabotage.eval_mode, quant=None),
        twin=small(quant=None),
        words=("not in train mode: the model itself", "model.train()"),
    ),
    Control(
        name="checkpointing flag on but inactive",
        path="checkpointing",
        required=True,
        sabotage=small(sabotage.checkpoint, sabotage.eval_mode, quant=None),
        twin=small(sabotage.checkpoint, quant=None),
        words=("2 forward calls for 2 layers (1.00 times)", "the flag is on but nothing recomputes in eval"),
    ),
    Control(
        name="a paged optimizer that pages nothing",
        path="optimizer.paged_share",
        required=0.4,
        sabotage=small(make_optimizer=sabotage.paged_adamw),
        twin=small(make_optimizer=sabotage.half_paged),
        words=("0 of ", "bytes of optimizer state are paged", "Paged optimizers are not supported on CPU"),
    ),
    Control(
        name="a fused optimizer that fell back",
        path="optimizer.fused",
        required=True,
        sabotage=small(sabotage.lose_fused, make_optimizer=sabotage.fused_adamw),
        twin=small(make_optimizer=sabotage.fused_adamw),
        words=("addcdiv", "built with fused=True", "load_state_dict()"),
    ),
    Control(
        name="compile that hit the recompile limit and went eager",
        path="compile",
        required=True,
        sabotage=small(sabotage.reach_recompile_limit),
        twin=small(sabotage.compile_layers),
        words=("0 compiled regions", "ran eagerly", "recompile limit", "recompiles refused", "size mismatch"),
    ),
    Control(
        name="compile that breaks the graph",
        path="compile",
        required=True,
        sabotage=small(sabotage.break_graphs),
        twin=small(sabotage.compile_layers),
        words=("1 graph breaks (Call to `torch._dynamo.graph_break()` at controls/sabotage.py:",),
        caught_by="reason",
    ),
    Control(
        name="compile that compiles again for every length",
        path="compile",
        required=True,
        sabotage=small(sabotage.change_lengths),
        twin=small(sabotage.compile_layers),
        words=("4 recompiles (forward at llama/modeling_llama.py:", "size mismatch at index 1. expected 16, actual 15"),
        caught_by="reason",
    ),
)

CONTROLS: tuple[Control, ...] = (*ATTENTION, *PRODUCTS, *BATCHES, *BASE, *ADAPTER, *EXECUTION, *CUDA_CONTROLS)
