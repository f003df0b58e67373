"""Negative controls of how the step is executed, as data: modes, recomputation, compilation, the update."""

from __future__ import annotations

from functools import partial

from kernels_check.controls import sabotage
from kernels_check.controls import sabotage_execution as execution
from kernels_check.controls.control import Control, small

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
        words=("0 of 2 blocks computed again", "the flag is on but nothing recomputes in eval"),
    ),
    Control(
        name="the update of another model alone",
        path="optimizer.class",
        required="torch.optim.AdamW",
        sabotage=small(partial(execution.train_another_model, by="AdamW", alone=True)),
        twin=small(execution.train_another_model),
        words=("torch.optim.adamw.AdamW stepped and holds no parameter of the model",),
        caught_by="unknown",
    ),
    Control(
        name="a paged optimizer that pages nothing",
        path="optimizer.paged_share",
        required=0.4,
        sabotage=small(make_optimizer=execution.paged_adamw),
        twin=small(make_optimizer=execution.half_paged),
        words=("0 of ", "bytes of optimizer state are paged", "Paged optimizers are not supported on CPU"),
    ),
    Control(
        name="a fused optimizer that fell back",
        path="optimizer.fused",
        required=True,
        sabotage=small(execution.lose_fused, make_optimizer=execution.fused_adamw),
        twin=small(make_optimizer=execution.fused_adamw),
        words=("addcdiv", "built with fused=True", "load_state_dict()"),
    ),
    Control(
        name="compile that hit the recompile limit and went eager",
        path="compile",
        required=True,
        sabotage=small(execution.reach_recompile_limit, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("0 compiled regions", "ran eagerly", "recompile limit", "recompiles refused", "size mismatch"),
    ),
    Control(
        name="compile that breaks the graph",
        path="compile",
        required=True,
        sabotage=small(execution.break_graphs, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("1 graph breaks (Call to `torch._dynamo.graph_break()` at controls/sabotage_execution.py:",),
        caught_by="reason",
    ),
    Control(
        name="compile that compiles again for every length",
        path="compile",
        required=True,
        sabotage=small(execution.change_lengths, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("2 recompiles (", "size mismatch at index 1. expected 16, actual 15"),
        caught_by="reason",
    ),
    Control(
        name="compile of a loss alone",
        path="compile",
        required=True,
        sabotage=small(execution.compile_loss, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("0 of 2 blocks ran in compiled code", "1 regions outside of its blocks, as of a loss"),
    ),
    Control(
        name="compile of one layer of two",
        path="compile",
        required=True,
        sabotage=small(execution.compile_one_layer, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("1 of 2 blocks ran in compiled code", "eager: base_model.model.model.layers.1"),
    ),
    Control(
        name="compile of the feed-forward layers alone",
        path="compile.share",
        required=1.0,
        sabotage=small(execution.compile_feed_forward, quant=None),
        twin=small(execution.compile_layers, quant=None),
        words=("0 of 2 blocks ran in compiled code", "eager in part: base_model.model.model.layers.0"),
    ),
    Control(
        name="checkpointing of one layer of two",
        path="checkpointing.layers",
        required=1.0,
        sabotage=small(partial(execution.checkpoint_layers, choose=lambda layer, _: layer == 0), quant=None),
        twin=small(execution.keep_attention, quant=None),
        words=("1 of 2 blocks computed again", "without base_model.model.model.layers.1"),
    ),
    Control(
        name="checkpointing of one feed-forward layer of two",
        path="checkpointing",
        required=True,
        sabotage=small(
            partial(execution.checkpoint_layers, choose=lambda layer, _: layer == 0, part="mlp"), quant=None
        ),
        twin=small(partial(execution.checkpoint_layers, choose=lambda *_: True, part="mlp"), quant=None),
        words=("1 of 2 blocks computed again", "modules of base_model.model.model.layers.0"),
    ),
    Control(
        name="checkpointing of one micro-batch of two",
        path="checkpointing",
        required=True,
        sabotage=small(
            execution.two_passes,
            partial(execution.checkpoint_layers, choose=lambda _, micro_batch: micro_batch == 0),
            quant=None,
        ),
        twin=small(execution.two_passes, partial(execution.checkpoint_layers, choose=lambda *_: True), quant=None),
        words=("0 of 2 blocks computed again", "layers.0 (1 of 2 calls)"),
    ),
    Control(
        name="SDPA forced to math under selective checkpointing",
        path="attention.backend",
        required="flash",
        sabotage=small(execution.keep_attention, sabotage.force_math, quant=None),
        twin=small(execution.keep_attention, quant=None),
        words=("math", "not as required in"),
    ),
    Control(
        name="a layer in eval mode for one micro-batch of two",
        path="mode",
        required="train",
        sabotage=small(execution.forget_a_layer, quant=None),
        twin=small(execution.evaluate_inside, quant=None),
        words=("not in train mode", "layers.1.self_attn", "now train, now eval"),
    ),
    Control(
        name="a fused group beside one that is not",
        path="optimizer.fused",
        required=True,
        sabotage=small(make_optimizer=execution.half_fused),
        twin=small(execution.clip_in_closure, make_optimizer=execution.fused_adamw),
        words=("4 of 8 parameters updated by fused kernels", "not by fused kernels: group 1 of AdamW"),
    ),
    Control(
        name="a loop inside a step with a profiler of its own",
        path="optimizer.fused",
        required=True,
        sabotage=small(execution.record_inside),
        twin=small(execution.record_inside, make_optimizer=execution.fused_adamw),
        words=("0 of 8 parameters updated by fused kernels", "addcdiv"),
    ),
)
