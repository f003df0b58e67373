"""The ways in which one trained adapter is served: unmerged or merged, and on which base.

The reference is the unmerged adapter on the base that it was trained on. Everything else is what is done to serve it:
merge it, put it on the 16-bit weights, quantise the base. A 4-bit base offers two merges, and both are
taken: PEFT adds the update to the dequantised weights and quantises the sum again, which loses what is smaller than a
step of the 4-bit grid; or the weights are dequantised for good and the sum stays in the base's type.

Two ways are controls. The reference is asked once more in another process, which shows the noise. And the base is asked
without the adapter: if that makes no difference, no way of merging can.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant, Quantization, Variant

AGAIN = ", asked again"
WITHOUT = "no adapter, "


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMode:
    """One way of serving an adapter."""

    name: str
    """For people, and unique among the ways of a variant."""
    variant: Variant
    """Says the base: its type and quantisation, and in which attention it is run."""
    merged: bool = False
    adapter: bool = True
    """Whether the adapter takes part at all."""
    dequantised: bool = False
    """Whether the base's quantised weights are turned back into its type before anything else."""

    @property
    def is_control(self) -> bool:
        """Whether it is there to judge the others by."""
        return not self.adapter or self.name.endswith(AGAIN)


def ways_of(variant: Variant) -> tuple[tuple[ServingMode, ...], ...]:
    """All that apply, in groups of those that one process serves from one loaded base; the first is the reference.

    Within a group a merge comes last: it changes the base.
    """
    own = dataclasses.replace(variant, merge_adapter=False)
    if isinstance(own, LoraVariant):
        own = dataclasses.replace(own, init_lora_weights="default")
    name = _stored(own)
    reference = ServingMode(name=f"unmerged, {name}", variant=own)
    groups: list[tuple[ServingMode, ...]] = [
        (
            reference,
            dataclasses.replace(reference, name=f"{WITHOUT}{name}", adapter=False),
            dataclasses.replace(reference, name=f"merged into {name}", merged=True),
        ),
        (dataclasses.replace(reference, name=f"{reference.name}{AGAIN}"),),
    ]
    if own.quantization != "none":
        groups.append((ServingMode(name=f"merged, {name} dequantised", variant=own, merged=True, dequantised=True),))
    for other in _other_bases(own):
        beside = ServingMode(name=f"unmerged, {_stored(other)}", variant=other)
        groups.append((beside, dataclasses.replace(beside, name=f"merged into {_stored(other)}", merged=True)))
    return tuple(groups)


def _other_bases(own: Variant) -> list[Variant]:
    """The 16-bit base and the 4-bit one, as far as they are not the variant's own. The 16-bit type is the variant's,
    where it has one; the 4-bit one is NF4, with the other settings of the variant."""
    sixteen = own.dtype if own.dtype != "float32" else "bfloat16"
    plain = dataclasses.replace(own, quantization="none", prepare_for_kbit=False)
    wanted = [dataclasses.replace(plain, dtype=sixteen)]
    if not own.is_4bit:
        wanted.append(dataclasses.replace(plain, quantization=_FOUR_BITS))
    return [other for other in wanted if _stored(other) != _stored(own)]


_FOUR_BITS: Quantization = "nf4"


def _stored(variant: Variant) -> str:
    """How the base stores its linear layers, in a word."""
    return variant.dtype if variant.quantization == "none" else variant.quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """What a process is asked: to serve an adapter in the ways of one group."""

    trial: TrialRequest
    """Says the workload, the prompts, the device and the folder in which the reference's logits lie."""
    adapter: str
    """Folder of the adapter, as PEFT saves it."""
    ways: tuple[ServingMode, ...]
    reference: tuple[tuple[int, ...], ...] = ()
    """The reference's answers, over which logits are compared; empty where the first way is the reference."""
