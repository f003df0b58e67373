"""Verify a fine-tuning step: watch it, judge each requirement, leave no trace.

The evidence comes from the process and the step that are measured, in calls of their own: nothing here runs while a
step is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from kernels_check.check import REQUIREMENTS, Check, Finding, Json, validate
from kernels_check.judges import adapter, attention, base_layers, execution, optimizer
from kernels_check.judges.batch import broken, find_isolation, judge_padding
from kernels_check.observation import storage
from kernels_check.observation.observe import Instrument, observe
from kernels_check.observation.restore import as_found


def verify(
    model: nn.Module,
    step: Callable[[], object],
    requirements: Mapping[str, Json],
    *,
    batch: Mapping[str, Any] | None = None,
    instrument: Instrument = "profile",
) -> list[Check]:
    """Judge what really runs in ``step`` against ``requirements``.

    Args:
        model: the model that ``step`` trains, as PEFT returned it.
        step: does one forward, backward and optimizer step; called two or three times under the
            profiler, once or twice under the spy.
        requirements: path to expected value, see ``REQUIREMENTS``. Paths nobody asked for are reported too, with
            ``required`` None.
        batch: packed inputs of ``model(**batch)`` to probe for isolation; needed by ``packing.isolated``.
        instrument: ``profile`` sees operators, kernels and compiled code, for the price of several steps; ``spy`` sees
            operators only, and how often compiled code is entered, for that of a step (see ``spy``). It is meant for
            the further replicates of a run whose first was profiled.

    Returns:
        One check per path, in the order of ``REQUIREMENTS``. A requirement is met only by status ``active``.
        A path that the spy cannot judge in this step is left out, required or not: a check that is there and not met
        is a failure by either instrument, and a path that is missing needs a profile. Left out are
        ``packing.isolated``; ``tf32`` on CUDA; what operators show where the step enters compiled code; on CUDA the
        paths of which no operator was called; and ``padding.share`` of a model compiled in place.

    Raises:
        ValueError: unknown path or a value of the wrong kind; ``step`` has not been called then.
        Exception: whatever ``step`` raises, after everything has been restored.
    """
    validate(requirements, has_batch=batch is not None or instrument == "spy")
    if instrument not in get_args(Instrument):
        raise ValueError(f"instrument {instrument!r} is none of {', '.join(get_args(Instrument))}")
    with as_found(model) as snapshot:
        before = storage.digest(model)
        seen = observe(model, step, snapshot, instrument)
        after = storage.digest(model)
        required = {path: requirements.get(path) for path in REQUIREMENTS}
        judges: dict[str, Callable[[], Finding]] = {
            "attention.backend": lambda: attention.judge_backend(model, seen, required["attention.backend"]),
            "attention.dtype": lambda: attention.judge_dtype(seen),
            "attention.mask": lambda: attention.judge_mask(seen),
            "padding.share": lambda: judge_padding(seen.padding, required["padding.share"]),
            "base.bits": lambda: base_layers.judge_bits(model, required["base.bits"]),
            "base.quant_type": lambda: base_layers.judge_quant_type(model, required["base.quant_type"]),
            "base.double_quant": lambda: base_layers.judge_double_quant(model, required["base.double_quant"]),
            "base.compute_dtype": lambda: base_layers.judge_compute_dtype(model, seen, required["base.compute_dtype"]),
            "base.frozen": lambda: base_layers.judge_frozen(model, seen, before, after),
            "base.gemm_path": lambda: base_layers.judge_gemm_path(model, seen),
            "lora.attached": lambda: adapter.judge_attached(model, seen),
            "lora.learning": lambda: adapter.judge_learning(model, seen),
            "lora.dtype": lambda: adapter.judge_dtype(model),
            "lora.dropout": lambda: adapter.judge_dropout(model, seen, required["lora.dropout"]),
            "optimizer.class": lambda: optimizer.judge_class(seen, required["optimizer.class"]),
            "optimizer.fused": lambda: optimizer.judge_fused(seen, required["optimizer.fused"]),
            "optimizer.paged_share": lambda: optimizer.judge_paged_share(seen, required["optimizer.paged_share"]),
            "checkpointing": lambda: execution.judge_checkpointing(model, seen, required["checkpointing"]),
            "tf32": lambda: execution.judge_tf32(seen),
            "compile": lambda: execution.judge_compile(seen, required["compile"]),
            "mode": lambda: execution.judge_mode(seen, required["mode"]),
        }
        hidden = set(seen.profile.blind)
        if seen.bare and seen.padding is None:
            hidden.add("padding.share")  # a model compiled in place calls no hook of its own
        checks = {path: _judge(path, required[path], judge) for path, judge in judges.items() if path not in hidden}
    if batch is not None and instrument == "profile":
        packed = batch
        path = "packing.isolated"
        checks[path] = _judge(path, required[path], lambda: find_isolation(model, packed))
    return [checks[path] for path in REQUIREMENTS if path in checks]


def _judge(path: str, required: Json, judge: Callable[[], Finding]) -> Check:
    try:
        return judge().against(path, required)
    except Exception as error:
        return broken(path, required, error)
