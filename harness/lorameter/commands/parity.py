"""The command `parity`: checks whether a merged adapter, or one on another base, gives the same answers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorameter.commands.output import say_progress, show_result
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError
from lorameter.models import catalogue, shapes
from lorameter.parity.facts import Parity
from lorameter.parity.judgement import Judgement, Likeness, judge_parity
from lorameter.parity.measure import check_adapter, measure_parity, with_prompts
from lorameter.records import codec, store
from lorameter.report.blocks import say
from lorameter.report.parity import describe_parity, show_differing
from lorameter.run.device_lock import hold_device
from lorameter.run.workers import open_executor
from lorameter.studies.study_file import load_variant
from lorameter.studies.variant import LoraVariant


def run_parity(options: argparse.Namespace) -> int:
    """Train or load the adapter, serve it in each mode, and report the differences."""
    if options.adapter is not None and options.epochs is not None:
        raise UsageError("--adapter and --epochs: an adapter that is given is not trained. Leave one of them out.")
    adapter = None if options.adapter is None else check_adapter(options.adapter)
    executor = open_executor()
    study, variant = load_variant(options.variant, profile=options.profile, device=executor.machine().kind)
    if not isinstance(variant, LoraVariant):
        raise UsageError(
            f"parity: variant {variant.name!r}: answers of LoRA in its short form are compared, and its method is "
            f"{variant.method_name}. Name another variant."
        )
    study = study.with_overrides(model=options.model, data=options.data)
    study = with_prompts(study, prompts=options.prompts, epochs=options.epochs)
    runs = store.runs_dir(options.runs_dir, make=True)
    with hold_device(executor, options.if_busy):
        parity, folder = measure_parity(study, variant, executor, runs=runs, adapter=adapter, say=say_progress)
    judgement = judge_parity(parity)
    document = (
        *describe_parity(parity, judgement),
        *(show_differing(parity, _decoder(parity)) if options.verbose else ()),
        say(f"All facts are in {folder}", indented=False),
    )
    show_result(
        options,
        document,
        lambda: encode_parity(parity, judgement, folder),
        page=lambda: {"title": f"Parity of {options.variant}"},
    )
    return EXIT_PASS if judgement.whole else EXIT_INVALID


def _decoder(parity: Parity) -> Callable[[Sequence[int]], str]:
    """A function that decodes tokens with the model's tokenizer."""
    from lorameter.trial.data.tokens import load_tokenizer

    source = catalogue.resolve(parity.workload.model)
    tokenizer, _ = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def encode_parity(parity: Parity, judgement: Judgement, folder: Path) -> dict[str, Any]:
    """The JSON document, without its schema."""
    controls = (judgement.floor, judgement.without)
    known = {one.way: one for one in (*judgement.likenesses, *controls) if one is not None}
    nothing = {field.name: None for field in dataclasses.fields(Likeness)} | {"within_floor": False}
    ways = []
    for way in parity.ways[1:]:
        likeness = known.get(way.name)
        about = {
            "way": way.name,
            "verdict": likeness.verdict if likeness else "failed",
            "quantization": way.variant.quantization,
            "dtype": way.variant.dtype,
            "adapter": way.adapter,
            "merged": way.merged,
            "dequantised": way.dequantised,
            "failure": judgement.failures.get(way.name, ""),
        }
        ways.append((codec.to_json(likeness) if likeness else nothing) | about)
    return {
        "path": str(folder),
        "study": parity.study,
        "variant": parity.variant.name,
        "model": parity.workload.model,
        "device": parity.device_name,
        "adapter": parity.adapter,
        "training_steps": None if parity.record is None else round(parity.record.values["training_steps"]),
        "reference": parity.reference.way,
        "reference_loss": sum(parity.reference.losses) / len(parity.reference.losses),
        "distinct_answers": judgement.distinct,
        "ways": ways,
        "trouble": judgement.trouble,
        "valid": judgement.whole,
    }
