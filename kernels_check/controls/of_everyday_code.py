"""Controls whose twin is everyday code, as data: models of other shapes, and steps that do more than train.

What is sound in them was once taken for a fault, or what is broken beside it for sound.
"""

from __future__ import annotations

from functools import partial

from kernels_check.controls import astray, layers, other_models, sabotage_adapter
from kernels_check.controls.control import Control, changed, small

EVERYDAY = (
    Control(
        name="one cross-attention of an encoder-decoder in eager",
        path="attention.backend",
        required="fused",
        sabotage=changed(other_models.encoder_decoder, other_models.cross_attend_eagerly),
        twin=changed(other_models.encoder_decoder),
        words=("5 of 6 attention layers as required", "decoder.layers.1.encoder_attn"),
    ),
    Control(
        name="one layer of a vision tower in eager",
        path="attention.backend",
        required="fused",
        sabotage=changed(other_models.vision, other_models.look_eagerly),
        twin=changed(other_models.vision),
        words=("1 of 2 attention layers as required",),
    ),
    Control(
        name="the only layer that pruning has left in eager",
        path="attention.backend",
        required="flash",
        sabotage=small(other_models.prune_and_attend_eagerly),
        twin=small(other_models.prune),
        words=("0 of 1 attention layers as required", "layers.0.self_attn"),
    ),
    Control(
        name="a misspelt parameter of experts",
        path="lora.attached",
        required=True,
        sabotage=partial(other_models.experts, misspelt=True),
        twin=other_models.experts,
        words=("asked for and matched nothing: target_parameters 'mlp.experts.dwon_proj'",),
    ),
    Control(
        name="weights of torch's attention that drift below an adapter",
        path="base.frozen",
        required=True,
        sabotage=changed(other_models.multihead, other_models.drift_projections),
        twin=changed(other_models.multihead),
        words=("1 changed over", "in_proj_weight"),
    ),
    Control(
        name="a base held under a name of LoRA's that trains",
        path="base.frozen",
        required=True,
        sabotage=small(sabotage_adapter.train_base_held_as_lora, quant=None),
        twin=small(sabotage_adapter.hold_as_lora, quant=None),
        words=("base parameters require gradients", "lora_model.", "changed over"),
    ),
    Control(
        name="adapter disabled inside the step, which updates by gradients of the step before",
        path="lora.learning",
        required=True,
        sabotage=small(astray.disable_in_the_step),
        twin=small(astray.ask_a_reference),
        words=("8 of 8 parameters without gradient",),
    ),
    Control(
        name="adapter disabled inside the step, beside gradients that were set to zero",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage_adapter.disable_beside_zeros),
        twin=small(astray.ask_a_reference),
        words=("8 of 8 parameters without gradient",),
    ),
    Control(
        name="a copy trained beside gradients of the model itself",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage_adapter.train_a_copy_after_steps),
        twin=small(),
        words=("8 of 8 parameters without gradient", "not given to the optimizer"),
    ),
    Control(
        name="half the layers inactive while the step runs",
        path="lora.learning",
        required=True,
        sabotage=small(astray.rest_half_in_the_step),
        twin=small(astray.ask_another_adapter),
        words=("4 of 8 parameters", "layers.0.self_attn.q_proj"),
    ),
    Control(
        name="one factor frozen without the optimizer that means it",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage_adapter.freeze_lora_a),
        twin=small(sabotage_adapter.use_lora_fa),
        words=("4 of 8 parameters frozen", "lora_A"),
    ),
    Control(
        name="layers that share a factor, of which one is passed by",
        path="lora.attached",
        required=True,
        sabotage=small(sabotage_adapter.pass_one_by, quant=None, targets=("q_proj",)),
        twin=small(sabotage_adapter.share_a_factor, quant=None, targets=("q_proj",)),
        words=("adapter not executed in 1 of 2 layers", "layers.1.self_attn.q_proj"),
    ),
    Control(
        name="a table of sparse gradients left out of the optimizer",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage_adapter.forget_the_table, quant=None, adapter=sabotage_adapter.sparse_table),
        twin=small(sabotage_adapter.send_sparse_gradients, quant=None, adapter=sabotage_adapter.sparse_table),
        words=("1 of 5 parameters not given to the optimizer", "modules_to_save"),
    ),
    Control(
        name="a step that updates nothing",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage_adapter.forget_the_update),
        twin=small(layers.accumulate),
        words=("no torch.optim.Optimizer stepped in", "let the step end in optimizer.step()"),
        not_words=("not given to the optimizer",),
        caught_by="unknown",
    ),
    Control(
        name="dropout off in one micro-batch of two",
        path="lora.dropout",
        required=0.05,
        sabotage=small(sabotage_adapter.rest_dropout_once),
        twin=small(layers.accumulate),
        words=("0 of 4 layers apply dropout 0.05", "in 1 of 2 calls only"),
    ),
    Control(
        name="eval mode left on by an answer inside the step",
        path="mode",
        required="train",
        sabotage=small(sabotage_adapter.generate_and_stay),
        twin=small(sabotage_adapter.generate_first),
        words=("eval",),
    ),
    Control(
        name="attention in a thread that the spy does not see",
        path="attention.backend",
        required="flash",
        sabotage=small(sabotage_adapter.step_in_a_thread),
        twin=small(),
        words=("ran in a thread of its own",),
        caught_by="unknown",
        instruments=("spy",),
    ),
    Control(
        name="an update in a thread that the spy does not see",
        path="optimizer.fused",
        required=False,
        sabotage=small(sabotage_adapter.step_in_a_thread),
        twin=small(),
        words=("ran in a thread of its own",),
        caught_by="unknown",
        instruments=("spy",),
    ),
)
