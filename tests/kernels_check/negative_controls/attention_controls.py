"""Controls of attention and of the base's products: what ran, in which layer, in which precision.

On a CPU the flash of SDPA takes masks, float32 and heads of any size, so that the verdict on the backend stays true
there. Such controls are judged by the input that CUDA would refuse, and the reason says what CUDA would do.
"""

from __future__ import annotations

from functools import partial

from negative_controls import faults, layers
from negative_controls.control import Control, small

ATTENTION = (
    Control(
        name="eager attention",
        path="attention.backend",
        required="fused",
        fault=small(attention="eager"),
        healthy=small(),
        words=("forward: 2 eager; backward: 2 eager", "attn_implementation='eager'", "load it with 'sdpa'"),
    ),
    Control(
        name="SDPA forced to math",
        path="attention.backend",
        required="fused",
        fault=small(faults.force_math),
        healthy=small(),
        words=("forward: 2 math", "0 of 2 attention layers as required", "layers.1.self_attn", "sdpa_kernel"),
    ),
    Control(
        name="attention dropout on",
        path="attention.backend",
        required="fused",
        fault=small(attention_dropout=0.1),
        healthy=small(),
        words=("forward: 2 math", "attention dropout is on", "attention_dropout=0"),
    ),
    Control(
        name="float32 queries, keys and values",
        path="attention.dtype",
        required="bfloat16",
        fault=small(prepare=True),
        healthy=small(faults.use_autocast, prepare=True),
        words=("2 float32", "CUDA refuse float32", "math would run", "prepare_model_for_kbit_training", "autocast"),
    ),
    Control(
        name="a padding mask",
        path="attention.mask",
        required="causal",
        fault=small(faults.pad_one_token),
        healthy=small(),
        words=("2 explicit", "CUDA's would refuse", "pass no attention_mask"),
    ),
    Control(
        name="an explicit mask",
        path="attention.mask",
        required="causal",
        fault=small(faults.pass_additive_mask),
        healthy=small(),
        words=("2 explicit", "CUDA's would refuse", "pass no attention_mask"),
    ),
    Control(
        name="a head size that flash refuses",
        path="attention.backend",
        required="flash",
        fault=small(head_size=288),
        healthy=small(head_size=256),
        words=("on CUDA flash would refuse the head size 288", "memory-efficient would run"),
        caught_by="reason",
    ),
    Control(
        name="one layer of two written by hand, while the step accumulates",
        path="attention.backend",
        required="flash",
        fault=small(layers.accumulate, layers.write_one_layer_by_hand),
        healthy=small(layers.accumulate),
        words=("1 of 2 attention layers as required", "2 calls of 1 of 2 layers", "layers.1.self_attn"),
    ),
    Control(
        name="half of the heads by exp and sum",
        path="attention.backend",
        required="flash",
        fault=small(partial(layers.split_heads, by_hand=True)),
        healthy=small(partial(layers.split_heads, by_hand=False)),
        words=("0 of 2 attention layers as required", "layers.0.self_attn (64 of 128 features)"),
    ),
    Control(
        name="a layer by hand inside a wrapper without a configuration",
        path="attention.backend",
        required="flash",
        fault=small(layers.write_one_layer_by_hand, layers.wrap),
        healthy=small(layers.wrap),
        words=("ran no attention that is recognised", "layers.1.self_attn"),
    ),
    Control(
        name="a teacher's attention beside a student's by hand",
        path="attention.backend",
        required="flash",
        fault=small(layers.ask_a_teacher, layers.write_one_layer_by_hand),
        healthy=small(layers.ask_a_teacher),
        words=("1 of 2 attention layers as required", "3 outside the model (3 flash)"),
    ),
    Control(
        name="a copy of the model that trains in its place",
        path="attention.backend",
        required="flash",
        fault=small(layers.train_a_copy),
        healthy=small(),
        words=("no attention of the model itself was seen", "2 outside the model (2 flash)"),
    ),
    Control(
        name="a block that passes its attention by",
        path="attention.backend",
        required="flash",
        fault=small(layers.pass_attention_by),
        healthy=small(),
        words=("ran no attention that is recognised", "layers.1"),
    ),
    Control(
        name="math in an evaluation counted as training's, and the reverse",
        path="attention.backend",
        required="flash",
        fault=small(layers.evaluate_inside, faults.force_math),
        healthy=small(layers.evaluate_inside),
        words=("0 of 2 attention layers as required", "2 calls without gradients (2 math)"),
    ),
    Control(
        name="a mask laid over the scores by masked_fill",
        path="attention.mask",
        required="none",
        fault=small(layers.fill_a_mask),
        healthy=small(layers.write_out),
        words=("2 explicit",),
    ),
)

PRODUCTS = (
    Control(
        name="4-bit layers that are passed by",
        path="base.gemm_path",
        required="dequantize",
        fault=small(layers.pass_products_by),
        healthy=small(),
        words=("11 of 14 4-bit layers", "without one ran", "layers.1.mlp.gate_proj"),
    ),
    Control(
        name="float32 weights without the autocast that was meant",
        path="base.compute_dtype",
        required="bfloat16",
        fault=small(quant=None, dtype="float32"),
        healthy=small(faults.use_autocast, quant=None, dtype="float32"),
        words=("0 of 4 targeted layers: bfloat16", "q_proj (float32)"),
    ),
)
