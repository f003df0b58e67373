"""Refuses studies that cannot work before any model is loaded; merely unexpected facts give a notice.

`Variant` and `Workload` refuse values that no machine can run. This module uses the model's shape and the machine: it
refuses widths that this CPU's 4-bit kernels do not support, attention that this device does not have, and more tokens
than the model's context. It refuses nothing on a guess: if a model's layers are unknown, it gives a notice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence

from lorameter.errors import UsageError, require, shorten
from lorameter.machine.nvml import VARIABLE, describe_gpus, shared_boards, visible_devices, visible_gpus
from lorameter.machine.products import describe_products, lacks_products
from lorameter.machine.provenance import Machine, library_version
from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import as_lora, missing_formula, unknown_targets
from lorameter.models.costs.memory import MemoryEstimate, baseline_bytes, estimate_peak, peak_range
from lorameter.models.methods import check_methods
from lorameter.models.shapes import ModelShape, linear_layers, unknown_layers
from lorameter.records.record import Notice
from lorameter.records.units import first_few, format_bytes
from lorameter.run.plan import Arm, build_arms, list_workloads
from lorameter.run.workers import open_executor
from lorameter.studies.study import Study
from lorameter.studies.variant import PAGED, DType, LoraVariant, Variant
from lorameter.studies.workload import Workload
from lorameter.trial.data.records import describe_data

NOT_HERE = "needs-gpu"
"""Code of the notice about a displayed plan whose engine needs another device."""
MAX_NAMED = 5
"""Maximum variants that a notice names."""


def check_feasible(
    study: Study,
    machine: Machine,
    arms: Sequence[Arm] = (),
    *,
    free_bytes: int | None = None,
    phases: Sequence[str] = (),
    shown_only: bool = False,
) -> tuple[Notice, ...]:
    """Refuse a study that this model or machine cannot run.

    Args:
        study: the study to measure.
        machine: the machine that measures.
        arms: selected arms; default: all.
        free_bytes: memory that is free there now; None if unknown.
        phases: phases to measure; default: those of the study.
        shown_only: whether the plan is only displayed: if an engine needs another device, that is then only a notice.

    Returns:
        Notices about facts that do not prevent the run.

    Raises:
        UsageError: the message names study, variant, key, value and remedy.
    """
    obstacle = study.obstacle(machine.device)
    require(not obstacle or shown_only, f"study {study.name}: {obstacle}.")
    remedy = f"lorameter run {study.name} there; nothing of this plan would be measured here."
    elsewhere = (Notice(code=NOT_HERE, message=f"{obstacle}.", remedy=remedy),) if obstacle else ()
    arms = arms or build_arms(study)
    _check_requirements(study)
    if not study.supports("built"):
        variants = {one.variant.id: one.variant for one in arms}
        return (*elsewhere, *open_executor(study.form.executor).check_variants(variants.values()))
    check_methods(f"study {study.name}", list({one.variant.name: one.built for one in arms}.values()))
    sources = {one.model: catalogue.resolve(one.model) for one in list_workloads(study, arms)}
    shape_of = {model: shapes.shape(source) for model, source in sources.items()}
    for workload in list_workloads(study, arms):
        _check_lengths(study.name, workload, shape_of[workload.model])
    describe_data(study.workload)
    if elsewhere:
        return elsewhere
    unknown = {model: reason for model, shape in shape_of.items() if (reason := unknown_layers(shape))}
    notices: list[Notice] = []
    measured = phases or study.protocol.phases
    answers = "generate" in measured or "cold" in measured
    for variant, workload in {one.variant.name: (one.built, one.workload) for one in arms}.values():
        where = f"study {study.name}, variant {variant.name!r}"
        shape = shape_of[workload.model]
        _check_support(where, variant, workload, machine, here=study.protocol.is_plain)
        notices += _variant_notices(variant, workload, machine)
        if workload.model in unknown:
            continue
        check_widths(where, variant, shape, machine)
        if missing_formula(variant, shape):
            continue
        variant = as_lora(variant, shape)
        notices += _target_notices(where, variant, workload.model, shape)
        if workload.strategy == "fsdp2":  # no formula gives the memory of one rank
            continue
        expected = estimate_peak(
            variant,
            workload,
            shape,
            answers=answers,
            device=machine.device,
            repacks=machine.avx512_bf16,
            process_bytes=baseline_bytes(machine.cuda),
        )
        has, (low, _) = _memory(machine), peak_range(expected.needed_bytes, machine.device)
        if has is not None and low > has:
            raise UsageError(
                f"{where}: needs about {format_bytes(expected.needed_bytes)} and this machine has {format_bytes(has)}. "
                f"{_less_memory(expected)} `lorameter estimate` shows what takes it."
            )
        notices += memory_notices(variant, expected, machine, free_bytes)
    notices += type_notices(list({one.variant.name: one.built for one in arms}.values()), machine)
    notices += [layers_notice(model, reason) for model, reason in unknown.items()]
    notices += [
        Notice(
            code="random-weights",
            message=f"{model} has random weights: time and memory are those of the architecture, losses say only that "
            "training works.",
            remedy="Use --lorameter-model (pytest) or --model with a pretrained model to judge losses.",
        )
        for model, source in sources.items()
        if source.random
    ]
    return tuple(notices)


def layers_notice(model: str, unknown: str) -> Notice:
    """A notice that memory and FLOPs of a model are unknown; `unknown` is the reason."""
    return Notice(
        code="layers-unknown",
        message=f"{model}: parameters, FLOPs, memory and what a token reads are unknown before they are measured: "
        f"{unknown}.",
        remedy="Start with a small batch_size, since it is unknown whether it fits.",
    )


def _check_lengths(study: str, workload: Workload, shape: ModelShape) -> None:
    for key, length in (
        ("sequence_length", workload.sequence_length),
        ("prompt_tokens + new_tokens", workload.prompt_tokens + workload.new_tokens),
        (
            "open_ended_prompt_tokens + open_ended_tokens",
            workload.open_ended_prompt_tokens + workload.open_ended_tokens,
        ),
    ):
        require(
            length <= shape.context,
            f"study {study}, [workload]: {key} = {length}: longer than the context of {workload.model}, "
            f"{shape.context} tokens. Use {shape.context} or fewer.",
        )


def _check_requirements(study: Study) -> None:
    """Refuse paths that kernels_check does not know, and requirements that it would refuse in every trial."""
    from kernels_check.judges.paths import PATHS, validate

    try:
        validate(study.requirements)
    except ValueError as error:
        raise UsageError(
            f"study {study.name}, [requirements]: {shorten(str(error), 1000)}. Write a known path in quotes."
        ) from None
    for path in study.engine.proof if study.engine is not None else ():
        require(
            path in PATHS,
            f"study {study.name}, [engine.proof]: {shorten(path, 60)}: no path of kernels_check, so nothing would "
            f"prove that the engine runs. Known: {', '.join(PATHS)}.",
        )


def type_notices(variants: Sequence[Variant], machine: Machine) -> Iterator[Notice]:
    """Notices about variants that compute in a dtype which this machine emulates."""
    dtypes: tuple[DType, ...] = ("bfloat16", "float16")
    for dtype in dtypes:
        names = [one.name for one in variants if dtype in one.dtypes]
        if not names or not lacks_products(machine, dtype):
            continue
        if machine.device == "cuda":
            how = f"a {machine.device_name} has no products of that type"
            remedy = 'Write "float16" in its place, in dtype, compute_dtype and autocast.'
        else:
            how = f"this CPU emulates it, {describe_products(machine, dtype)}"
            remedy = 'Set dtype and compute_dtype to "auto", which is float32 here.'
        yield Notice(code="dtype-emulated", message=f"{dtype} in {first_few(names, MAX_NAMED)}: {how}.", remedy=remedy)


def memory_notices(variant: Variant, expected: MemoryEstimate, machine: Machine, free: int | None) -> Iterator[Notice]:
    """Notices about a variant that may not fit into the memory of this machine, or into its `free` bytes."""
    has, (_, high) = _memory(machine), peak_range(expected.needed_bytes, machine.device)
    about = f"{variant.name}: needs about {format_bytes(expected.needed_bytes)}, or up to {format_bytes(high)}"
    if has is not None and high > has:
        yield Notice(
            code="memory-short",
            message=f"{about}, and this machine has {format_bytes(has)}.",
            remedy=_less_memory(expected),
        )
    elif free is not None and high > free:
        yield Notice(
            code="memory-taken",
            message=f"{about}, and only {format_bytes(free)} are free now: other processes use the rest.",
            remedy="End them (`lorameter doctor` names those on the GPU), or measure where that much is free.",
        )


def _memory(machine: Machine) -> int | None:
    """Total memory of the measuring device."""
    return machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes


def _less_memory(expected: MemoryEstimate) -> str:
    """A remedy that reduces memory in the phase with the largest peak."""
    if expected.phase == "generate":
        return 'Use a smaller request_batch, fewer prompt_tokens, quantization = "nf4", or a smaller model.'
    return 'Use quantization = "nf4", gradient_checkpointing = true, a smaller batch_size, or a smaller model.'


def _check_support(where: str, variant: Variant, workload: Workload, machine: Machine, *, here: bool) -> None:
    """Refuse what this device or installation does not have, what several ranks do not support, and adapters that PEFT
    does not support several times on one base, or in one batch (PEFT 0.21: any bitsandbytes quantisation is supported).

    `here`: whether the ranks use the first GPUs that this process sees; otherwise the given sites define them.
    """
    cpu, ranks, adapters = machine.device == "cpu", workload.ranks > 1, workload.adapters > 1
    lora, on_cpu = variant if isinstance(variant, LoraVariant) else None, "and this machine measures on the CPU"
    flash, liger = variant.attention == "flash_attention_2", "liger_kernel = True"
    attention, quantization = f"attention = {variant.attention!r}", f"quantization = {variant.quantization!r}"
    stored, absent = variant.format, [one for one in variant.format.libraries if importlib.util.find_spec(one) is None]
    initialisation = f"init_lora_weights = {getattr(variant, 'init_lora_weights', None)!r}"
    sharded, torch, ddp = ranks and workload.strategy == "fsdp2", library_version("torch"), 'Use strategy = "ddp"'
    with_ranks, with_adapters = f"with ranks = {workload.ranks}", f"with adapters = {workload.adapters}"
    refusals = (
        (cpu and flash, attention, f"the flash-attn package needs a CUDA device, {on_cpu}",
         'Use attention = "sdpa", whose flash kernel runs here.'),
        (cpu and variant.attention == "flex_attention", attention,
         f"flex attention has no backward pass on a CPU, {on_cpu}",
         'Use attention = "sdpa", whose flash kernel runs here.'),
        (flash and importlib.util.find_spec("flash_attn") is None, attention,
         "the package flash-attn is not installed",
         'Run pip install "lorameter[flash-attn]", or use attention = "sdpa".'),
        (variant.liger_kernel and cpu, liger, f"its kernels are Triton's, which need a GPU, {on_cpu}",
         "Leave it out here."),
        (variant.liger_kernel and importlib.util.find_spec("liger_kernel") is None, liger,
         "the package liger-kernel is not installed", "Run pip install liger-kernel."),
        (variant.tf32 and cpu, "tf32 = True", "a CPU has no TF32", "Leave it out here."),
        (ranks and lora is None, f"ranks = {workload.ranks}",
         f"of several ranks LoRA in its short form is measured, and the method is {variant.method_name}",
         "Leave ranks out."),
        (ranks and variant.compile, "compile = True", f"{with_ranks}, ranks are measured without it", "Leave it out."),
        (sharded and stored.fsdp2_since is None, quantization, f"{with_ranks}, FSDP2 {stored.fsdp2_obstacle}",
         f"{ddp}, or another quantization."),
        (sharded and not stored.is_sharded_by(torch), quantization,
         f"{with_ranks}, FSDP2 of torch {torch} {stored.fsdp2_obstacle}",
         f'Use torch {stored.fsdp2_since} or later, or strategy = "ddp".'),
        (absent, quantization, f"it needs the package {', '.join(absent)}, which is not installed",
         f"Run pip install {' '.join(absent)}."),
        (machine.device not in stored.devices, quantization,
         f"it runs on {' and '.join(stored.devices)} only, and this machine measures on {machine.device}",
         "Use another quantization here."),
        (not stored.gradients, quantization, "no gradient passes through its layers, so nothing trains before them",
         "Use another quantization."),
        (sharded and variant.optimizer in PAGED, f"optimizer = {variant.optimizer!r}",
         f"{with_ranks}, optimizers of bitsandbytes take no sharded parameters",
         'Use "adamw" or "adamw_fused", or strategy = "ddp".'),
        (sharded and variant.rewrites_base, initialisation,
         f"{with_ranks}, it rewrites the base, of which each rank would have to hold the whole", f"{ddp}."),
        (adapters and lora is None, f"adapters = {workload.adapters}",
         f"several adapters are measured of LoRA in its short form, and the method is {variant.method_name}",
         "Leave adapters out."),
        (adapters and lora is not None and lora.use_dora and workload.request_batch > 1, "use_dora = True",
         f"{with_adapters}, PEFT does not mix adapters of DoRA in one batch",
         "Use request_batch = 1, which measures switching alone, or leave use_dora out."),
        (adapters and variant.merge_adapter, "merge_adapter = True",
         f"{with_adapters}, a merged adapter can neither be switched off nor share its base with others",
         "Leave merge_adapter out; requests with the adapter merged are measured as well, by `merged`."),
        (adapters and lora is not None and lora.bias != "none", f"bias = {getattr(variant, 'bias', None)!r}",
         f"{with_adapters}, PEFT has one adapter on a base whose biases train", 'Use bias = "none".'),
        (adapters and variant.rewrites_base, initialisation,
         f"{with_adapters}, it rewrites the base for one adapter, and the others would use the changed one",
         'Use "default", "gaussian" or "orthogonal".'),
    )  # fmt: skip
    for applies, what, why, remedy in refusals:
        require(not applies, f"{where}: {what}: {why}. {remedy}")
    if ranks and here and not cpu:
        _check_gpus(where, workload.ranks)


def check_widths(where: str, variant: Variant, shape: ModelShape, machine: Machine) -> None:
    """Raise `UsageError` for quantised layers of a width that the format cannot run on this CPU."""
    block = variant.format.repacked_block
    if not (block and machine.device == "cpu" and machine.avx512_bf16):
        return
    taken = {layer.inputs for layer in linear_layers(shape).values()}
    widths = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "heads × head_dim": shape.heads * shape.head_dim,
    }
    for name, width in widths.items():
        require(
            width not in taken or width % block == 0,
            f"{where}: quantization = {variant.quantization!r}: {name} is {width}, which blocks of {block} do "
            f"not divide, and {', '.join(variant.format.libraries)} cannot run such a layer on a CPU with AVX512-BF16. "
            f'Use a model whose widths are multiples of {block}, or quantization = "none".',
        )


def _target_notices(where: str, variant: LoraVariant, model: str, shape: ModelShape) -> Iterator[Notice]:
    """A notice about target modules that the model lacks. Raises `UsageError` if it lacks all of them: PEFT would
    refuse."""
    missing, layers = unknown_targets(variant, shape), ", ".join(linear_layers(shape))
    require(
        not missing or len(missing) < len(variant.target_modules),
        f"{where}: target_modules = {list(missing)}: the model {model} has no such module. Its linear layers are "
        f"{layers}.",
    )
    if missing:
        yield Notice(
            code="target-unknown",
            message=f"{variant.name}: target_modules: the model {model} has no module {', '.join(missing)}; only the "
            "others get an adapter.",
            remedy=f"Check the names: its linear layers are {layers}.",
        )


def _variant_notices(variant: Variant, workload: Workload, machine: Machine) -> list[Notice]:
    """Notices about paged optimizers on a CPU, and about 4-bit weights with FSDP2."""
    sharded_4bit = workload.ranks > 1 and workload.strategy == "fsdp2" and variant.format.loses_state
    notices = (
        (variant.optimizer in PAGED and machine.device == "cpu", "paged-on-cpu",
         f"{variant.optimizer} pages nothing on a CPU; its trials are invalid unless the study allows the fallback.",
         'Use optimizer = "adamw_fused" here, or allow_fallback = true to measure what really runs.'),
        (sharded_4bit and workload.repair, "bitsandbytes-fsdp2-patched",
         f"bitsandbytes is mended for FSDP2 ({workload.repair}): the quantisation state is set on the weight of the "
         "layer. Without this repair the released package may compute another model.",
         "Train with the same repair; otherwise these numbers do not describe your training."),
        (sharded_4bit and not workload.repair, "ranks-fsdp2-4bit",
         "4-bit weights of bitsandbytes under FSDP2 can be silently wrong from the second step on; every trial checks "
         "it over three, and one that is wrong is invalid.",
         'Write repair = "quant_state" in [workload] where it is, or use strategy = "ddp".'),
    )  # fmt: skip
    return [
        Notice(code=code, message=f"{variant.name}: {message}", remedy=remedy)
        for applies, code, message, remedy in notices
        if applies
    ]


def processes_on_device(workload: Workload, device: str) -> int:
    """The number of processes of one trial that share the memory of a device: each rank has its own GPU, and the
    process that takes turns with all ranks shares the GPU of the first."""
    if workload.ranks == 1:
        return 1
    return (1 if device == "cuda" else workload.ranks) + workload.scaling


def _check_gpus(where: str, ranks: int) -> None:
    """Check the visible GPUs: the ranks use the first of them, one each (`lorameter.trial.ranks.trial`)."""
    known, listed = visible_gpus().value, visible_devices(os.environ)
    if known is None and listed is None:
        return
    gpus = len(listed or ()) if known is None else len(known)
    require(
        gpus >= ranks,
        f"{where}: ranks = {ranks}: {gpus} GPU{'s are' if gpus != 1 else ' is'} available here, and ranks that "
        "share one measure each other. Use fewer ranks, or make more GPUs visible.",
    )
    for shared in shared_boards((known or ())[:ranks]):
        raise UsageError(
            f"{where}: ranks = {ranks}: {describe_gpus(shared)} are parts of one GPU, and ranks that share one measure "
            f"each other. Use fewer ranks, or let {VARIABLE} begin with parts of different GPUs."
        )
