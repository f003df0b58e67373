"""The command that says where the time and memory of a step, or of a request, go: `profile`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.commands.output import check_page, print_json, save_page
from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS
from lorameter.profile import accounting
from lorameter.profile.accounting import categories_s, request_accounts
from lorameter.profile.evidence import evidence_of, evidence_of_requests
from lorameter.profile.measure import profile_requests, profile_variant
from lorameter.profile.remedy import Tried, choose_finding, judge_remedy, make_pair, phase_of
from lorameter.profile.request_rules import REQUEST_RULES, diagnose_requests
from lorameter.profile.rules import RULES, Finding, check_code, diagnose
from lorameter.records import codec, store
from lorameter.report.blocks import Document, Span, say
from lorameter.report.live import LiveDisplay
from lorameter.report.notices import warn_before_run
from lorameter.report.profile import describe_profile, describe_requests, describe_tried
from lorameter.report.terminal import console_for, show
from lorameter.run.build_plan import build_plan
from lorameter.run.device_lock import hold_device
from lorameter.run.measure import measure
from lorameter.run.workers import Executor, open_executor
from lorameter.studies.placement import HERE
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_variant
from lorameter.studies.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProfileResult:
    """What was profiled, as it is printed and shown, and what can be tried."""

    folder: Path
    document: dict[str, Any]
    said: Document
    findings: Sequence[Finding]


def run_profile(options: argparse.Namespace) -> int:
    """Profile, say what was found, and try a remedy where one is asked for."""
    of_requests = options.phase == "generate"
    if options.attempt:
        check_code(options.attempt, REQUEST_RULES if of_requests else RULES)
    minutes = options.max_minutes if options.attempt is None or options.max_minutes is None else options.max_minutes / 2
    check_page(options.html)
    executor, runs = open_executor(), store.runs_dir(options.runs_dir, make=True)
    study, variant = load_variant(options.variant, profile=options.profile, device=executor.machine().kind)
    study = study.with_overrides(
        model=options.model, data=options.data, effort=options.effort, on=HERE, max_minutes=minutes
    )
    errors = console_for(stderr=True)

    def tell(text: str) -> None:
        show((say(Span(text=text, tone="faint"), indented=False),), errors)

    with hold_device(executor, options.if_busy):
        seen = (_see_requests if of_requests else _see_step)(study, variant, executor, runs, tell)
    where = say(f"All facts and the profiler's trace are in {seen.folder}", indented=False, blank_line_before=True)
    said = (*seen.said, where)
    if not options.json:
        show(said, console_for())
    save_page(options.html, said, f"Profile of {options.variant}")
    tried = None
    try:
        if options.attempt is not None:
            finding = choose_finding(seen.findings, options.attempt or None)
            with hold_device(executor, options.if_busy):
                tried = _try(study, variant, finding, executor, runs)
    finally:  # what cannot be tried must not cost what was seen
        if options.json:
            print_json({"path": str(seen.folder)} | seen.document | {"tried": codec.to_json(tried)})
    if tried is None:
        return EXIT_PASS
    if not options.json:
        show(describe_tried(tried), console_for())
    if not tried.valid:
        return EXIT_INVALID
    return EXIT_INCONCLUSIVE if tried.comparison and tried.comparison.verdict == "inconclusive" else EXIT_PASS


def _see_step(
    study: Study, variant: Variant, executor: Executor, runs: Path, tell: Callable[[str], None]
) -> _ProfileResult:
    profile, folder = profile_variant(study, variant, executor, runs=runs, say=tell)
    step = accounting.step_account(profile)
    tokens, found = accounting.token_shares(profile), accounting.ceilings(profile, step.step)
    findings = diagnose(evidence_of(profile, step, tokens, found))
    document = {
        "step": codec.to_json(step) | {"explained": step.explained},
        "categories_s": accounting.categories_s(profile, step),
        "tokens": codec.to_json(tokens),
        "ceilings": codec.to_json(found),
        "findings": codec.to_json(findings),
        "profile": codec.to_json(profile),
    }
    said = describe_profile(profile, step, tokens, found, findings)
    return _ProfileResult(folder=folder, document=document, said=said, findings=findings)


def _see_requests(
    study: Study, variant: Variant, executor: Executor, runs: Path, tell: Callable[[str], None]
) -> _ProfileResult:
    profile, folder = profile_requests(study, variant, executor, runs=runs, say=tell)
    served, merged = request_accounts(profile)
    findings = diagnose_requests(evidence_of_requests(profile, served, merged))
    sides = {"served": (profile, served)}
    if profile.merged is not None and merged is not None:
        sides["merged"] = (profile.merged, merged)
    document = {
        "requests": {
            name: codec.to_json(account) | {"categories_s": categories_s(side, account.whole)}
            for name, (side, account) in sides.items()
        },
        "cold_parts_s": profile.cold_parts_s,
        "findings": codec.to_json(findings),
        "profile": codec.to_json(profile),
    }
    said = describe_requests(profile, served, merged, findings)
    return _ProfileResult(folder=folder, document=document, said=said, findings=findings)


def _try(study: Study, variant: Variant, finding: Finding, executor: Executor, runs: Path) -> Tried:
    """Measure the present variant and the suggested one, as any two."""
    pair = make_pair(study, variant, finding, protocol=study.protocol)
    machine = executor.machine()
    plan, notices = build_plan(
        pair.study,
        machine,
        free_bytes=executor.free_bytes(),
        phases=(phase_of(finding),),
        runs=runs,
        own_workloads=pair.own_workloads,
    )
    errors = console_for(stderr=True)
    show(warn_before_run(notices), errors)
    with LiveDisplay(errors) as display:
        run = measure(plan, runs=runs, display=display, notices=notices)
    return judge_remedy(run, finding)
