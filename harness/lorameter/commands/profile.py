"""The commands `profile` and `parity`.

`profile` profiles the time and memory of a step or of a request; `parity` checks whether a merged adapter, or one on
another base, gives the same answers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorameter.commands.output import print_json, print_progress, save_page, show_result
from lorameter.commands.run import measure_study
from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS, require
from lorameter.machine.products import make_target
from lorameter.models import catalogue, shapes
from lorameter.parity import (
    Judgement,
    Likeness,
    Parity,
    check_adapter,
    judge_parity,
    measure_parity,
    with_prompts,
)
from lorameter.profile import accounting
from lorameter.profile.evidence import gather_evidence, gather_request_evidence
from lorameter.profile.measure import profile_requests, profile_variant
from lorameter.profile.remedy import RemedyResult, choose_finding, finding_phase, judge_remedy, make_pair
from lorameter.profile.rules import REQUEST_RULES, RULES, Finding, diagnose, diagnose_requests
from lorameter.records import codec, store
from lorameter.report.blocks import Document, to_line
from lorameter.report.parity import describe_differing_answers, describe_parity
from lorameter.report.profile import describe_profile, describe_remedy, describe_requests
from lorameter.report.terminal import console_for, show
from lorameter.run.sites.placement import Placement
from lorameter.run.workers import hold_devices, open_executor
from lorameter.studies.protocol import HERE
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_variant
from lorameter.studies.variant import LoraVariant, Variant


def run_profile(options: argparse.Namespace) -> int:
    """Profile, report the findings, and with --try measure a remedy."""
    profiles_requests = options.phase == "generate"
    known = tuple(REQUEST_RULES if profiles_requests else RULES)
    require(
        not options.attempt or options.attempt in known,
        f"--try {options.attempt}: no such finding. Known: {', '.join(known)}.",
    )
    minutes = options.max_minutes if options.attempt is None or options.max_minutes is None else options.max_minutes / 2
    executor, runs = open_executor(), store.runs_dir(options.runs_dir, make=True)
    study, variant = load_variant(options.variant, profile=options.profile, target=make_target(executor.machine()))
    study = study.with_overrides(
        model=options.model, data=options.data, effort=options.effort, on=HERE, max_minutes=minutes
    )
    take_profile = _profile_requests if profiles_requests else _profile_step
    with hold_devices([executor], options.if_busy):
        folder, document, report, findings = take_profile(study, variant, executor, runs=runs, progress=print_progress)
    folder_line = to_line(f"All facts and the profiler's trace are in {folder}", indented=False)
    report = (*report, folder_line)
    if not options.json:
        show(report, console_for())
    save_page(options.html, report, lambda: {"title": f"Profile of {options.variant}"})
    tried = None
    try:
        if options.attempt is not None:
            tried = _try(study, variant, choose_finding(findings, options.attempt or None), options)
    finally:  # a failing remedy must not lose the profile
        if options.json:
            print_json({"path": str(folder), **document, "tried": tried})
    if tried is None:
        return EXIT_PASS
    if not options.json:
        show(describe_remedy(tried), console_for())
    if not tried.valid:
        return EXIT_INVALID
    return EXIT_INCONCLUSIVE if tried.comparison and tried.comparison.verdict == "inconclusive" else EXIT_PASS


def _try(study: Study, variant: Variant, finding: Finding, options: argparse.Namespace) -> RemedyResult:
    """Measure the current variant and the suggested one, like any two variants."""
    pair, phases = make_pair(study, variant, finding), (finding_phase(finding),)
    return judge_remedy(measure_study(pair, Placement(), options, phases=phases), finding)


_ProfileResult = tuple[Path, dict[str, Any], Document, Sequence[Finding]]
"""Folder, JSON document, report and findings of a profile."""


def _profile_step(*args: Any, **options: Any) -> _ProfileResult:
    profile, folder = profile_variant(*args, **options)
    step = accounting.step_account(profile)
    tokens, ceilings = accounting.token_shares(profile), accounting.compute_ceilings(profile, step.step)
    findings = diagnose(gather_evidence(profile, step, tokens))
    document = {
        "step": codec.to_json(step) | {"explained": step.explained},
        "categories_s": accounting.categories_s(profile, step),
        "tokens": tokens,
        "ceilings": ceilings,
        "findings": findings,
        "profile": profile,
    }
    return folder, document, describe_profile(profile, step, tokens, ceilings, findings), findings


def _profile_requests(*args: Any, **options: Any) -> _ProfileResult:
    profile, folder = profile_requests(*args, **options)
    served, merged = accounting.request_accounts(profile)
    findings = diagnose_requests(gather_request_evidence(profile, served, merged))
    sides = (("served", profile, served), ("merged", profile.merged, merged))
    document = {
        "requests": {
            name: codec.to_json(account) | {"categories_s": accounting.categories_s(side, account.whole)}
            for name, side, account in sides
            if side is not None and account is not None
        },
        "cold_parts_s": profile.cold_parts_s,
        "findings": findings,
        "profile": profile,
    }
    return folder, document, describe_requests(profile, served, merged, findings), findings


def run_parity(options: argparse.Namespace) -> int:
    """Train or load the adapter, serve it in each mode, and report the differences."""
    require(
        options.adapter is None or options.epochs is None,
        "--adapter and --epochs: a given adapter is not trained. Leave one of them out.",
    )
    adapter = None if options.adapter is None else check_adapter(options.adapter)
    executor = open_executor()
    study, variant = load_variant(options.variant, profile=options.profile, target=make_target(executor.machine()))
    require(
        isinstance(variant, LoraVariant),
        f"parity: variant {variant.name!r}: only LoRA in its short form can be compared, and its method is "
        f"{variant.method_name}. Name another variant.",
    )
    study = study.with_overrides(model=options.model, data=options.data)
    study = with_prompts(study, prompts=options.prompts, epochs=options.epochs)
    runs = store.runs_dir(options.runs_dir, make=True)
    with hold_devices([executor], options.if_busy):
        parity, folder = measure_parity(study, variant, executor, runs=runs, adapter=adapter, progress=print_progress)
    judgement = judge_parity(parity)
    document = (
        *describe_parity(parity, judgement),
        *(describe_differing_answers(parity, _decoder(parity)) if options.verbose else ()),
        to_line(f"All facts are in {folder}", indented=False),
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
    controls = (judgement.noise_floor, judgement.base_alone)
    likenesses = {one.way: one for one in (*judgement.likenesses, *controls) if one is not None}
    failed_row = {field.name: None for field in dataclasses.fields(Likeness)} | {"within_floor": False}
    ways = [
        (codec.to_json(likenesses[way.name]) if way.name in likenesses else failed_row)
        | {
            "way": way.name,
            "verdict": likenesses[way.name].verdict if way.name in likenesses else "failed",
            "quantization": way.variant.quantization,
            "dtype": way.variant.dtype,
            "adapter": way.adapter,
            "merged": way.merged,
            "dequantised": way.dequantised,
            "failure": judgement.failures.get(way.name, ""),
        }
        for way in parity.ways[1:]
    ]
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
