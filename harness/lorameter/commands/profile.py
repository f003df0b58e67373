"""The command that says where the time and memory of a step, or of a request, go: `profile`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorameter.commands.options import add_options
from lorameter.commands.output import print_json
from lorameter.commands.page import check_page, save_page
from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS

if TYPE_CHECKING:
    from lorameter.profile.remedy import Tried
    from lorameter.profile.rules import Finding
    from lorameter.report.blocks import Document
    from lorameter.run.workers import Executor
    from lorameter.studies.study import Study
    from lorameter.studies.variant import Variant

DEAREST = ""
"""`--try` without a finding."""


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    profile = commands.add_parser(
        "profile",
        help="profile a training step or generation requests",
        description="Profile a training step or generation requests: phases, kernels, memory, hardware ceilings, and "
        "what to try.",
    )
    profile.add_argument("variant", metavar="VARIANT", help="STUDY:NAME, or a TOML file with one variant")
    profile.add_argument(
        "--phase",
        choices=("train", "generate"),
        default="train",
        help="train: a step; generate: requests, prefill and decode, adapter unmerged and merged, and a cold start",
    )
    add_options(profile.add_argument, "profile", "model", "data")
    profile.add_argument(
        "--try",
        dest="attempt",
        metavar="FINDING",
        nargs="?",
        const=DEAREST,
        help="measure the remedy of a finding against the present variant; default: of the most expensive finding",
    )
    profile.add_argument("--effort", choices=("quick", "standard", "rigorous"), help="of --try: 3, 8 or 12 replicates")
    profile.add_argument(
        "--max-minutes", type=float, metavar="M",
        help="time limit: fewer timed steps or requests, and optional parts are left out; with --try half of it is "
        "for the comparison",
    )  # fmt: skip
    add_options(profile.add_argument, "html", "if-busy")
    common(profile)
    profile.set_defaults(command=run_profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProfileResult:
    """What was profiled, as it is printed and shown, and what can be tried."""

    folder: Path
    document: dict[str, Any]
    said: Document
    findings: Sequence[Finding]


def run_profile(options: argparse.Namespace) -> int:
    """Profile, say what was found, and try a remedy where one is asked for."""
    from lorameter.profile.remedy import choose_finding
    from lorameter.profile.request_rules import REQUEST_RULES
    from lorameter.profile.rules import RULES, check_code
    from lorameter.records import codec, store
    from lorameter.report.blocks import Span, say
    from lorameter.report.profile import describe_tried
    from lorameter.report.terminal import console_for, show
    from lorameter.run.device_lock import hold_device
    from lorameter.run.workers import open_executor
    from lorameter.studies.placement import HERE
    from lorameter.studies.study_file import load_variant

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
    from lorameter.profile import accounting
    from lorameter.profile.evidence import evidence_of
    from lorameter.profile.measure import profile_variant
    from lorameter.profile.rules import diagnose
    from lorameter.records import codec
    from lorameter.report.profile import describe_profile

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
    from lorameter.profile.accounting import categories_s, request_accounts
    from lorameter.profile.evidence import evidence_of_requests
    from lorameter.profile.measure import profile_requests
    from lorameter.profile.request_rules import diagnose_requests
    from lorameter.records import codec
    from lorameter.report.requests import describe_requests

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
    from lorameter.profile.remedy import judge_remedy, make_pair, phase_of
    from lorameter.report.live import LiveDisplay
    from lorameter.report.notices import warn_before_run
    from lorameter.report.terminal import console_for, show
    from lorameter.run.build_plan import build_plan
    from lorameter.run.measure import measure

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
