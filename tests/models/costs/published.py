"""Published peaks of GPU memory with their estimates, and the range of peak over estimate that they support.

    python tests/models/costs/published.py

prints every row of `published_peaks.toml` and the range that `lorameter.models.costs.memory.PEAK_RANGES` has for CUDA:
the central 95 % of the rows whose batches have one length, rounded outwards to whole percent.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import width
from lorameter.models.costs.memory import CUDA_CONTEXT_BYTES, estimate_memory
from lorameter.models.shapes import ModelShape, linear_layers
from lorameter.studies.variant import LoraVariant, Variant
from lorameter.studies.workload import Workload

TABLE = Path(__file__).with_name("published_peaks.toml")
COVERED = 0.95
"""Share of the rows within the range."""
_WORKLOAD = {field.name for field in dataclasses.fields(Workload)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published peak and its estimate, in bytes."""

    source: str
    model: str
    settings: str
    measured: str
    one_length: bool
    peak: float
    estimate: int

    @property
    def ratio(self) -> float:
        """Published over estimated peak."""
        return self.peak / self.estimate


def read_rows() -> list[Row]:
    """Every row of the table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    known = {
        name: ModelShape(**{"tied": False, "context": 2**20, **values}) for name, values in table["models"].items()
    }
    return [row for source in table["source"] for row in _rows(source, known)]


def _rows(source: dict[str, Any], known: dict[str, ModelShape]) -> Iterator[Row]:
    for row in source["rows"]:
        own = {name: value for name, value in row.items() if name not in ("model", "peak")}
        lengths = source["workload"] | {name: value for name, value in own.items() if name in _WORKLOAD}
        changes = source["variant"] | {name: value for name, value in own.items() if name not in _WORKLOAD}
        if "target_modules" in changes:
            changes["target_modules"] = tuple(changes["target_modules"])
        variant, workload = LoraVariant(name=row["model"], **changes), Workload(**lengths)
        shape = known.get(row["model"]) or shapes.shape(catalogue.resolve(f"random:{row['model']}"))
        estimate = estimate_memory(variant, workload, shape, phase=source["phase"], device="cuda").total_bytes
        if source["measured"] == "device":
            estimate += CUDA_CONTEXT_BYTES
        if source.get("keeps_4bit_inputs"):
            estimate += _kept_inputs(variant, workload, shape)
        settings = [f"{workload.batch_size} × {workload.sequence_length}"] if source["phase"] == "train" else []
        yield Row(
            source=source["name"], model=row["model"], measured=source["measured"], peak=row["peak"] * source["unit"],
            one_length=source.get("one_length", True), estimate=estimate,
            settings=" ".join([*settings, *(str(value) for name, value in own.items() if name not in _WORKLOAD)]),
        )  # fmt: skip


def _kept_inputs(variant: Variant, workload: Workload, shape: ModelShape) -> int:
    """Bytes that bitsandbytes kept before 0.43.2 (its pull request 1270): the input of each 4-bit layer, unless it is
    kept anyway, as that of the attention's output projection."""
    if not variant.is_4bit or variant.gradient_checkpointing:
        return 0
    inputs = {layer.stage: layer.inputs for layer in linear_layers(shape).values() if layer.stage != "attended"}
    tokens = workload.batch_size * workload.sequence_length
    return shape.layers * tokens * sum(inputs.values()) * width(variant.dtype)


def supported_range(rows: Sequence[Row]) -> tuple[float, float]:
    """The central `COVERED` of published over estimated peaks of batches of one length, rounded outwards to percent."""
    ratios = sorted(row.ratio for row in rows if row.one_length)
    out = math.floor((1 - COVERED) / 2 * len(ratios))  # rows left out at each end
    return math.floor(100 * ratios[out]) / 100, math.ceil(100 * ratios[-1 - out]) / 100


def main() -> None:
    """Print the comparison and the range."""
    rows = read_rows()
    print(f"{'GB of 10^9 bytes':42}{'':20}{'measured':>10}{'estimate':>10}{'published':>10}{'over estimate':>15}")
    for row in rows:
        print(
            f"{row.source:42}{row.model:20}{row.measured:>10}{row.estimate / 1e9:10.2f}{row.peak / 1e9:10.2f}"
            f"{row.ratio - 1:+15.1%}  {row.settings}"
        )
    low, high = supported_range(rows)
    counted = [row.ratio for row in rows if row.one_length]
    within = sum(low <= ratio <= high for ratio in counted)
    print(f"\nPEAK_RANGES['cuda'] = ({low}, {high}): {within} of {len(counted)} peaks of batches of one length")
    for what in ("allocated", "reserved", "device"):
        one = [row.ratio for row in rows if row.one_length and row.measured == what]
        print(f"  {what}: {len(one)} peaks, {min(one) - 1:+.1%} to {max(one) - 1:+.1%}")
    varied = [row.ratio for row in rows if not row.one_length]
    print(f"of varied lengths, not counted: {len(varied)} peaks, {min(varied) - 1:+.1%} to {max(varied) - 1:+.1%}")


if __name__ == "__main__":
    main()
