"""Storage formats of base weights: what each one stores, needs and supports. No other module knows them by name.

`BUILT_IN` has those of bitsandbytes. Another package adds one by an entry point of the group `lorameter.quantizations`,
whose name is that of the format, and whose object is a `Quantization`; docs/extending.md has an example.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

from lorameter.errors import UsageError, format_error, require, shorten, suggest

GROUP = "lorameter.quantizations"
"""Group of the entry points."""
FIELDS = ("double_quant", "compute_dtype")
"""Fields of a variant that only have an effect with a format that reads them."""
NESTED_BLOCK = 256
"""Scales that share a float32 scale under double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
NESTED_BYTES = 256 * 4 + 4
"""With double quantisation: the table of the 8-bit scale values, and the mean of the scales; for each layer."""
REPACKED_SCALE_BYTES = 2
"""The packed CPU layout of bitsandbytes has bfloat16 scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A storage format of the linear layers of a base."""

    name: str
    """Its name in studies."""
    implementation: str
    """How a base gets it: "module:class" of a subclass of `lorameter.trial.building.quantizers.Quantizer`."""
    bits: int | None
    """Bits of a stored weight, without scales, as kernels_check reads them from the bytes (`base.bits`); None for those
    of the variant's dtype: such weights are not quantised."""
    block: int | None = None
    """Weights that share a scale; None: those of one output."""
    scale_bytes: int = 4
    """Bytes of a scale."""
    table_bytes: int = 0
    """Bytes of further constants of each layer, such as the values of a code."""
    fields: tuple[str, ...] = ()
    """The fields of a variant in `FIELDS` that it reads. kernels_check must confirm each of them, as `base.FIELD`."""
    quant_type: str | None = None
    """The value that kernels_check must read for `base.quant_type`; None if it has none for the format."""
    libraries: tuple[str, ...] = ()
    """Packages that it needs besides torch, transformers and PEFT."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which it runs."""
    repacked_block: int = 0
    """On CPUs with AVX512-BF16, the library repacks the weights at the first forward pass in eval mode, and cannot do
    this for widths that are no multiple of this number. 0: it does not repack."""
    unpacks: bool = True
    """Whether a product first unpacks the whole weight of its layer."""
    gradients: bool = True
    """Whether gradients pass through its layers to the adapters before them."""
    merges: bool = True
    """Whether an adapter can be merged into its weights."""
    dequantises: bool = True
    """Whether the base can be converted to its dtype (`Quantizer.dequantise`)."""
    fsdp2_since: str | None = None
    """The first version of torch whose FSDP2 shards it; None: no version does."""
    fsdp2_obstacle: str = "does not shard this format, as far as is known"
    """What FSDP2 of other versions does."""
    loses_state: bool = False
    """Whether FSDP2 can lose the quantisation state of its layers, which `repair` of the workload prevents."""

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored in another form than their dtype; such weights do not train."""
        return self.bits is not None

    def constant_bytes(self, inputs: int, outputs: int, *, nested: bool, repacked: bool = False) -> int:
        """Bytes of the constants of a layer. `nested`: with double quantisation, which the packed CPU layout
        (`repacked`, `_convert_weight_packed_for_cpu` of bitsandbytes 0.50) does not have."""
        scales = outputs if self.block is None else -(-inputs * outputs // self.block)
        if nested and not repacked:
            return self.table_bytes + scales + 4 * -(-scales // NESTED_BLOCK) + NESTED_BYTES
        return self.table_bytes + scales * (REPACKED_SCALE_BYTES if repacked else self.scale_bytes)

    def is_sharded_by(self, torch: str | None) -> bool:
        """Whether FSDP2 of this version of torch shards it; an unknown version counts as a new one."""
        from packaging.version import Version

        if self.fsdp2_since is None or torch is None:
            return self.fsdp2_since is not None
        return Version(torch).release >= Version(self.fsdp2_since).release


_IMPLEMENTATIONS = "lorameter.trial.building.quantizers"
_4_BIT = functools.partial(
    Quantization,
    implementation=f"{_IMPLEMENTATIONS}:FourBit",
    bits=4,
    block=64,  # Dettmers et al. 2023, arXiv 2305.14314, section 3
    table_bytes=16 * 4,
    fields=FIELDS,
    libraries=("bitsandbytes",),
    repacked_block=64,
    fsdp2_since="2.12",  # before, every shard has a gradient, which integers cannot have: pytorch/pytorch#177844
    fsdp2_obstacle="shards no integers, as which 4-bit weights are stored",
    loses_state=True,
)
BUILT_IN = {
    one.name: one
    for one in (
        Quantization(
            name="none", implementation=f"{_IMPLEMENTATIONS}:Unquantised", bits=None, scale_bytes=0, quant_type="none",
            unpacks=False, dequantises=False, fsdp2_since="2.0",
        ),
        Quantization(
            name="int8", implementation=f"{_IMPLEMENTATIONS}:EightBit", bits=8, quant_type="int8",
            libraries=("bitsandbytes",), unpacks=False,
            fsdp2_obstacle="does not shard the weights of LLM.int8, whose scales are stored separately",
        ),
        _4_BIT(name="nf4", quant_type="nf4"),
        _4_BIT(name="fp4", quant_type="fp4"),
    )
}  # fmt: skip
"""By name."""
SMALLEST = BUILT_IN["nf4"]
"""The format that remedies for a lack of memory name."""


@functools.cache  # one reading of the installed packages for each name
def find_quantization(name: str) -> Quantization:
    """The format of that name. Raises `UsageError` with the nearest name if there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    points = metadata.entry_points(group=GROUP)
    if name not in points.names:
        why = "neither lorameter nor an installed package has such a format"
        near = suggest(name, sorted({*BUILT_IN, *points.names}))
        raise UsageError(f"quantization = {shorten(repr(name), 60)}: {why}. {near}")
    point = points[name]
    try:
        found = point.load()
    except Exception as error:  # code of another package
        raise UsageError(
            f"quantization = {name!r}: {point.value} cannot be loaded ({format_error(error).rstrip('.')}). Install the "
            "package that has it again."
        ) from None
    require(
        isinstance(found, Quantization) and found.name == name and set(found.fields) <= {*FIELDS},
        f"quantization = {name!r}: {point.value} is no Quantization of this name whose fields are among "
        f"{', '.join(FIELDS)}. Correct the entry point of the package that has it.",
    )
    declared: Quantization = found
    return declared
