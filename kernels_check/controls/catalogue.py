"""Every negative control, as data."""

from __future__ import annotations

from kernels_check.controls import sabotage
from kernels_check.controls.control import Control, small
from kernels_check.controls.of_attention import ATTENTION, PRODUCTS
from kernels_check.controls.of_the_base import BASE
from kernels_check.controls.on_cuda import CUDA_CONTROLS

BATCH = (
    Control(
        name="packed sequences that leak",
        path="packing.isolated",
        required=True,
        sabotage=small(sabotage.pack),
        twin=small(sabotage.pack_without_cache),
        words=("train: changing the first record", "eval: changing the first record", "use_cache=False"),
        instruments=("profile",),
    ),
    Control(
        name="packed sequences that leak in evaluation only",
        path="packing.isolated",
        required=True,
        sabotage=small(sabotage.checkpoint, sabotage.pack),
        twin=small(sabotage.checkpoint, sabotage.pack_without_cache),
        words=("eval: changing the first record", "use_cache=False"),
        not_words=("train:",),
        instruments=("profile",),
    ),
    Control(
        name="a batch that is mostly padding",
        path="padding.share",
        required=0.5,
        sabotage=small(sabotage.pad_most),
        twin=small(sabotage.pad_one_token),
        words=("70 of 96 positions (73%)", "attention_mask", "sort them by length"),
    ),
)

ADAPTER = (
    Control(
        name="adapter disabled",
        path="lora.attached",
        required=True,
        sabotage=small(sabotage.disable_adapter),
        twin=small(),
        words=("adapters disabled in 4 of 4 layers", "q_proj", "enable_adapter_layers()", "lora_A not executed"),
    ),
    Control(
        name="adapter merged",
        path="lora.attached",
        required=True,
        sabotage=small(sabotage.merge_adapter, quant=None),
        twin=small(quant=None),
        words=("merged into the base in 4 of 4 layers", "q_proj", "unmerge_adapter()"),
    ),
    Control(
        name="adapter attached to nothing",
        path="lora.attached",
        required=True,
        sabotage=small(sabotage.target_nothing),
        twin=small(),
        words=("no layer carries a LoRA adapter", "target_modules matched no module"),
    ),
    Control(
        name="adapter attached to a module that never runs",
        path="lora.attached",
        required=True,
        sabotage=small(sabotage.target_what_never_runs),
        twin=small(),
        words=("lora_A not executed in 1 of 1 layers", "spare_head", "the step never calls these modules"),
    ),
    Control(
        name="adapter frozen",
        path="lora.learning",
        required=True,
        sabotage=small(sabotage.freeze_adapter),
        twin=small(),
        words=("8 of 8 factors frozen", "q_proj.lora_A", "is_trainable=True"),
    ),
    Control(
        name="dropout silently off",
        path="lora.dropout",
        required=0.05,
        sabotage=small(sabotage.dropout_off),
        twin=small(),
        words=("0 of 4 layers apply dropout 0.05", "p=0.05 but in eval mode", "model.train()"),
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

CONTROLS: tuple[Control, ...] = (*ATTENTION, *PRODUCTS, *BATCH, *BASE, *ADAPTER, *EXECUTION, *CUDA_CONTROLS)
