"""Judges how the frozen base weights are stored, multiplied and kept unchanged.

The storage of a 4-bit weight can be proved from its bytes. N x K weights take ceil(NK/2) bytes; each block of 64 adds a
float32 scale (4.500 bits a weight), which double quantisation turns into a byte and a float32 per 256 blocks (4.127). A
module class or a configuration proves nothing: a skipped layer keeps its float weight in the same model, and autocast
determines the dtype of a product. So each product is attributed to the layer that called it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from kernels_check.check import (
    DTYPE,
    FLAG,
    SHARE,
    Json,
    JudgedPath,
    PathObservation,
    Requirement,
    absent,
    at_least,
    count_values,
    format_count,
    join_clauses,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.base import Storage
    from kernels_check.observe.digest import DigestDifference
    from kernels_check.observe.observation import Observation

_BITS_REMEDY = {
    4: "load with quantization_config=BitsAndBytesConfig(load_in_4bit=True) and keep targets out of its skip list",
    8: "load with quantization_config=BitsAndBytesConfig(load_in_8bit=True) and keep targets out of its skip list",
    16: "load with dtype=torch.bfloat16 and no quantization_config",
    32: "load with dtype=torch.float32 and no quantization_config",
}
_NO_BASE = "there is no base: every parameter is an adapter's"
_MISMATCHED_REMEDY = (
    "no forward in eval mode on this CPU if weights are gathered for each forward, as by FSDP2: call "
    "model.train(), or set support_avx512bf16_for_cpu=False on every Linear4bit before the first forward"
)
# bitsandbytes casts a bias to the compute dtype in the first forward pass: not training, but reported.
_CAST = "except values that the first forward cast"
_CACHE = "except buffers that the forward recomputed, which are not saved with the model"
_ROUNDED = "except rounding, because PEFT merges the adapter into nn.MultiheadAttention and unmerges it in each forward"


def judge_bits(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.bits`` over every layer with an adapter."""
    idle = dict.fromkeys(observation.idle_fourbit, "its 4-bit weight took part in no product of the step")
    stored, census = observation.storage, observation.census
    density = [item.bits_per_weight for item in stored.values() if item.bits_per_weight is not None]
    reason = f"{sum(density) / len(density):.3f} bits a weight with scales in {len(density)} layers" if density else ""
    remedy = _BITS_REMEDY.get(required) if isinstance(required, int) else None
    bits = {name: None if name in idle else item.bits for name, item in stored.items()}
    stored = {name: replace(item, problem=idle.get(name, item.problem)) for name, item in stored.items()}
    finding = _judge_layers(stored, bits, required, reason, remedy)
    known = Counter(value for value in bits.values() if value is not None)
    if not known:
        return finding
    expected = required if isinstance(required, int) else known.most_common(1)[0][0]
    rest = f"so is the whole base of {_size(census.bytes_of.total())}"
    if others := census.others(expected):
        share = 1 - census.share(expected)
        rest = f"of the whole base {share:.1%} of the bytes are not in {expected} bits: {_largest(others)}"
    return replace(finding, reason=f"{finding.reason}; {rest}")


def judge_bytes_in_4bit(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.bytes_in_4bit``, a minimum: the share of all bytes of the base, as stored, that are 4-bit weights.

    Scales count as bytes of their weights. Unreadable parts may be 4-bit or not.
    """
    census = observation.census
    total, share, unread, others = census.bytes_of.total(), census.share(4), census.share(None), census.others(4)
    if not total:
        return absent(_NO_BASE)
    reason = join_clauses(
        f"{share:.1%} of the {_size(total)} of the base are 4-bit weights with their scales",
        f"the largest that are not: {_largest(others)}" if others else "",
        f"{unread:.1%} could not be read and may be either" if unread else "",
    )
    return at_least(share, required, reason, perhaps=share + unread)


def _largest(others: list[tuple[str, int]]) -> str:
    """Name the two largest parts."""
    rest = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return ", ".join(f"{name} {_size(size)}" for name, size in others[:2]) + rest


def _size(size: int) -> str:
    scale, unit = next((pair for pair in ((2**30, "GiB"), (2**20, "MiB")) if size >= pair[0]), (2**10, "KiB"))
    return f"{size / scale:.1f} {unit}"


def judge_format(
    observation: Observation, required: Json, *, name: Literal["quant_type", "double_quant"], setting: str
) -> PathObservation:
    """Judge ``base.quant_type`` or ``base.double_quant``.

    Args:
        observation: the observed step.
        required: the required value.
        name: name of the path, below ``base``.
        setting: the argument of ``BitsAndBytesConfig``.
    """
    stored, default = observation.storage, "'fp4'" if name == "quant_type" else "False"
    remedy = f"set {setting}={required!r} (the library's default is {default})"
    return _judge_layers(stored, {layer: getattr(item, name) for layer, item in stored.items()}, required, "", remedy)


def judge_frozen(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.frozen``: no part of the base changes, receives a gradient, or would change with one."""
    digest, change = observation.after, observation.change
    if not digest.parts and not observation.before.parts and not digest.unseen:
        return absent(_NO_BASE)
    what = f"every byte of {_size(digest.total_bytes)} in {len(digest.parts)} parts"
    steps = format_count(observation.calls, "step")
    faults, notes = _find_trained(observation)
    remedies = (
        ["requires_grad_(False) on the base, and only the adapter's parameters for the optimizer"] if faults else []
    )
    unknown = _find_unread(observation, change)
    if digest.mismatched:
        named = name_some(f"{name} ({why})" for name, why in digest.mismatched.items())
        faults.append(f"{len(digest.mismatched)} 4-bit weights do not fit their states: {named}")
        remedies.append(_MISMATCHED_REMEDY)
    if change.changed and observation.before.packed != digest.packed:
        unknown.insert(
            0, "an eval forward repacked Linear4bit weights in place (AVX512 layout): bytes cannot be compared"
        )
    elif change.changed:
        names = name_some(change.changed)
        faults.append(f"{what} compared: {len(change.changed)} changed over {steps}: {names}")
        if all(name in digest.parts and digest.parts[name].kind == "buffer" for name in change.changed):
            remedies.append("eval() on the layers whose buffers move, such as BatchNorm's statistics")
    exceptions = ((_CAST, change.cast), (_CACHE, change.caches), (_ROUNDED, change.rounded))
    notes += [f"{words}: {name_some(names)}" for words, names in exceptions if names]
    if biases := observation.biases_of_adapters:
        settings = join_values(biases.values())
        notes.append(f"{len(biases)} biases train with the adapter, as PEFT is configured by {settings}")
    good = [] if faults or unknown else [f"{what} unchanged over {steps}, no gradient, not optimised"]
    advice = [f"remedy: {remedy}" for remedy in remedies]
    return PathObservation(
        observed=False if faults else None if unknown else True,
        reason=join_clauses(*good, *faults, *advice, *unknown, *notes),
        status="unknown" if unknown and not faults else None,
    )


def judge_learning(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.learning``, for full fine-tuning: gradients reach all of the base and an update changes it.

    A 16-bit weight need not change at every step: updates below its precision are lost to rounding.
    """
    if observation.adapter_layers:
        return PathObservation(observed=False, present=False, reason="an adapter trains in place of the base")
    base, moved = observation.base_parameters, set(observation.change.changed)
    if not observation.optimizer_steps:
        return undecided(f"no torch.optim.Optimizer stepped in {format_count(observation.calls, 'call')}")
    faults = _count_parameters(
        ("require no gradient", [name for name, value in base.items() if not value.requires_grad]),
        ("received no gradient", [name for name in base if name not in observation.gradients]),
        (
            "are not given to the optimizer",
            [name for name, value in base.items() if id(value) not in observation.optimized],
        ),
    )
    if not moved:
        faults.append("no byte of the base changed: the learning rate is 0, or updates round away in its type")
    good = f"gradients reached all {len(base)} parameters of the base and updates changed {len(moved)} of them"
    return PathObservation(observed=not faults, reason=join_clauses(*faults) or good)


def _find_unread(observation: Observation, change: DigestDifference) -> list[str]:
    """Why parts of the base could not be compared, so that they may have changed."""
    unseen = [f"{name} ({why})" for name, why in {**observation.before.unseen, **observation.after.unseen}.items()]
    unused = [] if observation.optimizers else _find_unused(observation)
    reasons = (
        (f"the bytes of {len(unseen)} parts could not be read", unseen),
        ("sharded at one time and whole at the other, so that they cannot be compared", change.incomparable),
        ("no optimizer stepped, so it is unknown whether one holds what trains", unused),
    )
    return [f"{words}: {name_some(names)}" for words, names in reasons if names]


def _find_trained(observation: Observation) -> tuple[list[str], list[str]]:
    """Faults of base parameters that train or would train, and notes about those that an optimizer holds but skips."""
    base = observation.base_parameters
    in_optimizer = {name for name, value in base.items() if id(value) in observation.optimized}
    reached = [name for name in base if name in observation.gradients]
    train = [
        name
        for name, value in base.items()
        if value.requires_grad and (name in in_optimizer or name in observation.gradients)
    ]
    faults = _count_parameters(
        ("require gradients", train),
        ("received a gradient", reached),
        ("are given to the optimizer", [name for name in train if name in in_optimizer]),
    )
    idle = in_optimizer - {*train, *reached}
    notes = [f"{len(idle)} frozen base parameters are given to the optimizer, which skips them"] if idle else []
    if observation.optimizers and (unused := _find_unused(observation)):
        notes.append(f"no gradient reached and no optimizer holds, though they require gradients: {name_some(unused)}")
    return faults, notes


def _count_parameters(*problems: tuple[str, list[str]]) -> list[str]:
    return [f"{len(names)} base parameters {problem}: {name_some(names)}" for problem, names in problems if names]


def _find_unused(observation: Observation) -> list[str]:
    """Base parameters that require gradients, received none, and belong to no optimizer that stepped."""
    return [
        name
        for name, value in observation.base_parameters.items()
        if value.requires_grad and id(value) not in observation.optimized and name not in observation.gradients
    ]


def _judge_layers(
    stored: Mapping[str, Storage], values: Mapping[str, Json], required: Json, reason: str, remedy: str | None
) -> PathObservation:
    """Compare one property over all targeted layers and name the exceptions."""
    if not stored:
        return absent("no layer carries an adapter")
    known = [value for value in values.values() if value is not None]
    expected = required if required is not None or not known else Counter(known).most_common(1)[0][0]
    odd = [f"{name} ({value})" for name, value in values.items() if value != expected and value is not None]
    unread = [name for name, value in values.items() if value is None]
    problems = [f"{name}: {item.problem}" for name, item in stored.items() if item.problem]
    packed = [name for name, item in stored.items() if item.packed_for_cpu]
    named = (
        ("exceptions: ", odd),
        ("unknown for ", (problems or unread) if unread else []),
        ("repacked in place for AVX512 by an eval forward, bfloat16 scales: ", packed),
    )
    return PathObservation(
        observed=known[0]
        if len(set(known)) == 1
        else join_values(part for one in known for part in str(one).split("+")),
        reason=join_clauses(
            f"{sum(value == expected for value in values.values())} of {len(values)} targeted layers: {expected}",
            reason,
            *(f"{words}{name_some(names)}" for words, names in named if names),
            f"remedy: {remedy}" if odd and required is not None and remedy else "",
        ),
        status="unknown" if unread and not odd else None,
        satisfies=not odd and not unread,
    )


_BITS = Requirement(kind="bits", choices=(4, 8, 16, 32))
_QUANT_TYPE = Requirement(kind="choice", choices=("nf4", "fp4", "int8", "none"))


def judge_compute_dtype(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.compute_dtype`` over every layer with an adapter, by its products."""
    stored = observation.storage
    values = {name: join_values(observation.base_products.dtypes(name)) for name in stored}
    claims = {item.compute_dtype for name, item in stored.items() if item.compute_dtype not in (None, values[name])}
    reason = join_clauses(
        "by the products that they called",
        f"layers claim {join_values(str(claim) for claim in claims)}" if claims else "",
        *sorted({item.note for item in stored.values() if item.note}),
    )
    remedy = f"set bnb_4bit_compute_dtype=torch.{required} (the library's default is torch.float32)"
    in_4bit = any(item.bits == 4 for item in stored.values())
    return _judge_layers(stored, values, required, reason, remedy if in_4bit else None)


def judge_gemm_path(observation: Observation, required: Json) -> PathObservation:
    """Judge ``base.gemm_path`` by the operators inside the 4-bit operators of the forward pass."""
    layers = observation.fourbit_products
    paths = [str(call.path) for call in layers.all]
    if not paths:
        if layers.names or observation.census.bytes_of[4]:  # compiled layers call no hooks, and have no name
            reason = "4-bit weights but no known 4-bit operator ran"
            return absent(reason) if observation.untouched else undecided(reason)
        return PathObservation(observed=None, status="not_applicable", present=False, reason="the base is not 4-bit")
    kernels = {
        rule: count for rule, count in observation.profile.kernels.items() if rule.startswith(("BNB-GEMM", "BNB-DEQ"))
    }
    bypassed, total = [*layers.without, *layers.bypassed], len(layers.names)
    named = f"{total - len(bypassed)} of {total} 4-bit layers, without one ran: {name_some(bypassed)}"
    wrong = required is not None and any(path not in (required, "unknown") for path in paths)
    return PathObservation(
        observed=join_values([*paths, "bypassed"] if bypassed else paths),
        reason=join_clauses(
            f"forward 4-bit products: {count_values(paths)}",
            f"kernels {kernels}" if kernels else "",
            named if bypassed else "",
        ),
        status="unknown" if "unknown" in paths and not wrong and not bypassed else None,
    )


PATHS: Mapping[str, JudgedPath] = {
    "base.bits": JudgedPath(requirement=_BITS, judge=judge_bits, by_modules=False),
    "base.bytes_in_4bit": JudgedPath(requirement=SHARE, judge=judge_bytes_in_4bit, by_modules=False),
    "base.quant_type": JudgedPath(
        requirement=_QUANT_TYPE,
        judge=partial(judge_format, name="quant_type", setting="bnb_4bit_quant_type"),
        by_modules=False,
    ),
    "base.double_quant": JudgedPath(
        requirement=FLAG,
        judge=partial(judge_format, name="double_quant", setting="bnb_4bit_use_double_quant"),
        by_modules=False,
    ),
    "base.learning": JudgedPath(requirement=FLAG, judge=judge_learning, by_modules=False, needs_update=True),
    "base.frozen": JudgedPath(
        requirement=FLAG,
        judge=judge_frozen,
        by_modules=False,
        further_steps=(
            "PEFT merges the adapter into nn.MultiheadAttention for each forward and out again, so that some changes "
            "show in the step after: open the same watch around that, too"
        ),
    ),
    "base.compute_dtype": JudgedPath(requirement=DTYPE, judge=judge_compute_dtype, by_operators=True),
    "base.gemm_path": JudgedPath(
        requirement=Requirement(kind="choice", choices=("dequantize", "fused", "packed_cpu")),
        judge=judge_gemm_path,
        by_operators=True,
    ),
}
