"""The campaign on a GPU: one command runs every step, resumes where it was stopped, and judges the claims.

    make gpu                                  all remaining steps; without a GPU, a rehearsal of all
    make gpu GPU_OPTIONS='--minutes 9.5'      at most 9.5 minutes, for machines with a time limit per command
    make gpu GPU_OPTIONS='--again study'      repeat a step (`all`: every step)

The journal and the outputs are in a folder (--state, default .gpu/state), the report is under reports/ with the device
in its name, and docs/gpu.md is updated. If $OUT names a folder, all of it is also packed into OUT/campaign.tar.gz, for
a machine that keeps no files; `python -m benchmarks.gpu.pack` packs the libraries for such a machine.

Exit code 0: all steps are done and no claim is refuted (without a GPU: all were rehearsed) · 3: steps remain, run the
command again · 4: a step failed or a claim is refuted · 2: the state belongs to another device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import page, report
from benchmarks.gpu.claims import CLAIMS
from benchmarks.gpu.evidence import Evidence, newest_run
from benchmarks.gpu.journal import Entry, Journal, Outcome
from benchmarks.gpu.loop import REPORT_S, is_pending, run_process, run_steps
from benchmarks.gpu.pack import pack_results
from benchmarks.gpu.steps import STEPS, Step, build_command
from lorameter.machine.provenance import describe_origin, device_id, harness_identity, probe_machine

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".gpu" / "state"
REHEARSAL_S = 300.0
"""Limit of a rehearsed step: on a machine without a GPU nothing is measured, but libraries are imported."""
EXIT_REMAINING, EXIT_FAILED, EXIT_OTHER_DEVICE = 3, 4, 2
ALL = "all"


def main(variables: Mapping[str, str], arguments: list[str] | None = None) -> int:
    """Resume the campaign, or rehearse it; `variables` is the environment of the steps' processes."""
    options = _options(arguments)
    if options.list:
        for one in STEPS:
            print(f"{one.name:22} {one.expected_s:5.0f} s expected, at most {one.limit_s:.0f} s  {one.question}")
        return 0
    begin = time.monotonic()
    machine, state = probe_machine(), Path(options.state)
    rehearsing = machine.device != "cuda"
    if rehearsing:
        state = state.with_name("rehearsal")
    journal = Journal(state)
    if others := {entry.device for entry in journal.entries} - {machine.device_name}:
        here = f"this is {machine.device_name}: give another folder with --state"
        print(f"campaign: {state} is of {', '.join(others)}, and {here}", file=sys.stderr)
        return EXIT_OTHER_DEVICE
    repeats_all = rehearsing or ALL in options.again
    journal.forget([one.name for one in STEPS] if repeats_all else options.again)
    gpu_uuid, harness = device_id(), harness_identity()
    chosen = [one for one in STEPS if not options.only or one.name in options.only]

    def left_s() -> float:
        return options.minutes * 60 - (time.monotonic() - begin) - REPORT_S

    def run(step: Step, limit_s: float) -> Entry:
        last, started = journal.last(step.name), time.time()
        stopped = last is not None and last.outcome == "stopped" and bool(step.resume_command)
        words = build_command(
            step, python=sys.executable, state=state, rehearsing=rehearsing,
            resumed_run=newest_run(step.name, state) if stopped else None, newest=newest_run("sweep", state),
        )  # fmt: skip
        code, last_line = run_process(
            words, limit_s=max(limit_s, REHEARSAL_S) if rehearsing else limit_s, outputs=state / "outputs",
            name=step.name, folder=ROOT, variables=variables,
        )  # fmt: skip
        return Entry(
            step=step.name, outcome=_outcome(step, code, rehearsing=rehearsing), code=code,
            took_s=time.time() - started, begun_unix_s=started, device=machine.device_name, gpu_uuid=gpu_uuid,
            harness=harness, last_line=last_line,
        )  # fmt: skip

    run_steps(chosen, journal, left_s=left_s, run=run)
    decisions = report.decide(CLAIMS, Evidence(state, journal), rehearsed=rehearsing)
    document = report.build_document(machine, describe_origin(ROOT), journal, decisions)
    print(report.format_text(document, rehearsed=rehearsing), end="")
    if not rehearsing:
        print(f"written to {report.write(document, page.REPORTS, state)}", file=sys.stderr)
        text = page.update_page(page.PAGE.read_text(encoding="utf-8"), CLAIMS, page.read_campaigns(page.REPORTS))
        page.PAGE.write_text(text, encoding="utf-8")
    if out := os.environ.get("OUT"):
        print(f"packed into {pack_results(Path(out), state, page.REPORTS, page.PAGE)}", file=sys.stderr)
    return exit_code(chosen, journal, [decision.verdict for _, decision in decisions])


def exit_code(steps: Sequence[Step], journal: Journal, verdicts: Sequence[str]) -> int:
    """Return the exit code of the call: a failure takes precedence over remaining steps."""
    if "refuted" in verdicts or any(last.outcome == "failed" for one in steps if (last := journal.last(one.name))):
        return EXIT_FAILED
    remaining = [one.name for one in steps if is_pending(one, journal)]
    if remaining:
        print(f"{len(remaining)} steps remain ({', '.join(remaining)}): the same command resumes them", file=sys.stderr)
    return EXIT_REMAINING if remaining else 0


def _outcome(step: Step, code: int | None, *, rehearsing: bool) -> Outcome:
    if code is None:
        return "stopped"
    if code not in ((0,) if rehearsing and step.rehearsal else step.result_codes):
        return "failed"
    return "rehearsed" if rehearsing else "done"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [one.name for one in STEPS]
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="time limit of this call; default: none"
    )
    parser.add_argument("--only", action="append", default=[], metavar="STEP", choices=names)
    parser.add_argument("--again", action="append", default=[], metavar="STEP", choices=[*names, ALL])
    parser.add_argument("--state", default=str(STATE), metavar="DIR")
    parser.add_argument("--list", action="store_true", help="print the steps with their limits, and do nothing")
    return parser.parse_args(arguments)
