"""The parsers of all commands: options and the function that each command calls, by the name of its module.

Nothing of a command is imported before it is chosen, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorameter.commands.options import CALIBRATED_STUDY, CALIBRATION_REPLICATES, add_options

EFFORTS = ("quick", "standard", "rigorous")
PHASES = ("train", "generate", "cold")
SORTS = ("study", "name", "ratio", "value", "memory")
PACKED_PRIVATE = ("paths", "hosts", "texts")
SHELLS = ("bash", "zsh", "tcsh")
EXPORT_FORMATS = ("json", "csv", "parquet", "github-action-benchmark", "bencher")
EXPORT_TABLES = ("trials", "samples", "estimates", "comparisons")
"""As `lorameter.results.files` has them, which would load what only a command needs; a test holds them equal."""
COMMAND_HELP = "a training command in quotes: 'python train.py --r 64'"
SIDE_HELP = "a git revision, a Python executable, or requirements such as 'peft==0.20.0'"
END_HELP = "a git revision of the repository in the current directory, or a release such as 'peft==0.19.0'"


def add_commands(commands: Any, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """The parsers of all commands, in the order of `--help`; `common` adds the options that every command has.

    `options.command` is "MODULE:FUNCTION" of `lorameter.commands`.
    """
    measuring = (_add_run, _add_ab, _add_bisect, _add_wrap, _add_doctor, _add_estimate, _add_profile, _add_parity)
    showing = (_add_report, _add_list_cmd, _add_compare, _add_sample, _add_claims, _add_export, _add_history,
               _add_prune_pack, _add_init, _add_completion)  # fmt: skip
    for add in (*measuring, *showing):
        add(commands, common)


def _add_run(commands: Any, common: Any) -> None:
    run = commands.add_parser("run", help="measure a study", description="Measure a study and print its report.")
    run.add_argument("study", metavar="STUDY", nargs="?", help="name of a built-in study, or a TOML file")
    run.add_argument("--effort", choices=EFFORTS, help="3, 8 or 12 replicates")
    add_options(run.add_argument, "replicates", "profile", "model", "data", "variant")
    run.add_argument("--phase", choices=PHASES, action="append", default=[], help="only this; repeatable")
    run.add_argument(
        "--interleave", metavar="L", help="shared-base, lockstep or replicates; default: the finest possible"
    )
    add_options(run.add_argument, "precision", "max-minutes", "allow-disturbed", "sites", "on", "mixed", "if-busy")
    run.add_argument(
        "--command", dest="script", metavar="COMMAND", help="training command; put the engine's flags in {braces}"
    )
    run.add_argument("--cwd", metavar="DIR", help="folder that the command is run in; default: this one")
    run.add_argument("--steps", type=int, metavar="N", help="timed steps of each process of the command")
    run.add_argument("--peft-experiments", metavar="DIR", help="method_comparison/MetaMathQA of PEFT, as a study")
    run.add_argument("--select", metavar="GLOB", help="of these experiments, by METHOD/NAME; default: all")
    run.add_argument(
        "--quality", action="store_true", help="train these experiments for all their steps; default: some tens"
    )
    run.add_argument("--resume", metavar="RUN", help="resume an interrupted run, by its own study and plan")
    add_options(run.add_argument, "dry-run", "verbose")
    common(run)
    run.set_defaults(command="run:run_study")


def _add_ab(commands: Any, common: Any) -> None:
    ab = commands.add_parser(
        "ab",
        help="measure base and candidate in one interleaved job",
        description="Measure base and candidate in one interleaved job, and judge the candidate.",
    )
    ab.add_argument("study", metavar="STUDY", nargs="?", help="name of a built-in study, or a TOML file")
    ab.add_argument("--base", metavar="SIDE", help=SIDE_HELP)
    ab.add_argument("--candidate", metavar="SIDE", help=SIDE_HELP)
    ab.add_argument("--base-command", metavar="COMMAND", help=f"in place of STUDY and sides: {COMMAND_HELP}")
    ab.add_argument("--candidate-command", metavar="COMMAND", help="the command that is compared with it")
    ab.add_argument(
        "--command",
        dest="script",
        metavar="COMMAND",
        help=f"in place of STUDY, on the sides --base and --candidate: {COMMAND_HELP}",
    )
    ab.add_argument("--cwd", metavar="DIR", help="folder that the commands are run in; default: this one")
    ab.add_argument("--steps", type=int, metavar="N", help="timed steps of each process of a command; default 16")
    ab.add_argument("--resume", metavar="RUN", help="resume an interrupted A/B, by its own study and sides")
    _measuring(ab, EFFORTS, "3, 8 or 12 replicates; default 8")
    add_options(ab.add_argument, "precision", "mixed", "variant", "dry-run")
    ab.add_argument(
        "--phase", choices=PHASES, action="append", default=[],
        help="phase to measure; repeatable; default: train and generate",
    )  # fmt: skip
    add_options(ab.add_argument, "policy", "format", "markdown", "html", "verbose")
    ab.add_argument(
        "--inject-rows",
        type=int,
        default=0,
        metavar="N",
        help="injected slow-down, to test the gate: the candidate multiplies N extra rows in every adapted layer",
    )
    common(ab)
    ab.set_defaults(command="run:run_ab")

    calibrate = commands.add_parser(
        "calibrate",
        help="this machine's own false-alarm rate and power",
        description="Measure false-alarm rate and detectable slow-down on this machine.",
    )
    calibrate.add_argument("study", metavar="STUDY", nargs="?", help=f"default: {CALIBRATED_STUDY}")
    _measuring(calibrate, ("standard", "rigorous"), f"8 or 12 replicates; default {CALIBRATION_REPLICATES}")
    calibrate.add_argument(
        "--variant", metavar="V", action="append", default=[], help="the one variant to measure; default: the reference"
    )
    calibrate.add_argument(
        "--inject-rows", type=int, metavar="N", help="rows of extra work a layer; default: sized by a pilot for 5 %%"
    )
    calibrate.add_argument("--resume", metavar="RUN", help="resume an interrupted calibration")
    common(calibrate)
    calibrate.set_defaults(command="calibrate:run_calibrate")


def _measuring(command: argparse.ArgumentParser, efforts: tuple[str, ...], said: str) -> None:
    command.add_argument("--effort", choices=efforts, help=said)
    add_options(command.add_argument, "replicates", "max-minutes", "allow-disturbed", "sites", "on", "if-busy")
    add_options(command.add_argument, "model", "data")


def _add_bisect(commands: Any, common: Any) -> None:
    bisect = commands.add_parser(
        "bisect",
        help="find the commit or release that made it slower",
        description="Find the commit or release that introduced a slow-down: compare candidates between the good and "
        "the bad end with the good one, each in one interleaved job, by bisection.",
    )
    bisect.add_argument("study", metavar="STUDY", help="name of a built-in study, or a TOML file")
    bisect.add_argument("--good", metavar="REV|REQ", required=True, help=END_HELP)
    bisect.add_argument("--bad", metavar="REV|REQ", required=True, help="the same, later and slower")
    bisect.add_argument("--metric", metavar="M", default="step_time_s", help="default: step_time_s")
    bisect.add_argument("--variant", metavar="V", help="default: the reference of the study")
    bisect.add_argument("--effort", choices=EFFORTS, help="3, 8 or 12 replicates; default 8")
    add_options(bisect.add_argument, "replicates", "max-minutes", "allow-disturbed", "if-busy", "model", "data")
    bisect.add_argument("--resume", action="store_true", help="reuse finished comparisons in the runs directory")
    bisect.add_argument("--dry-run", action="store_true", help="list the candidates; measure nothing")
    common(bisect)
    bisect.set_defaults(command="calibrate:run_bisect")


def _add_wrap(commands: Any, common: Any) -> None:
    wrap = commands.add_parser(
        "wrap",
        help="measure a training script while it runs",
        description="Run a command as it is and measure the training in it: `lorameter wrap -- python train.py`. Its "
        "output, its exit code and signals to it pass through; the run is stored in the runs directory; the report "
        "is printed to stderr.",
    )
    wrap.add_argument(
        "--require",
        metavar="PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="required paths, such as attention.backend=flash; if one is not active, the run is invalid, and the "
        "exit code is 4 where the command's is 0",
    )
    wrap.add_argument("--runs-dir", metavar="DIR", help="default: $LORAMETER_RUNS or ./.lorameter/runs")
    wrap.add_argument("--no-report", action="store_true", help="print no report")
    wrap.add_argument(
        "words", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="the command, as typed without lorameter"
    )
    wrap.set_defaults(command="wrap:run_wrap")


def _add_doctor(commands: Any, common: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run and measure, and what would disturb it",
        description="Check, in about a second and without measuring, what this machine can run and measure, what "
        "would disturb a measurement, and how to fix it. Exit code 0: fit, 4: unfit.",
    )
    common(doctor)
    doctor.set_defaults(command="setup:run_doctor")


def _add_estimate(commands: Any, common: Any) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="estimate a variant's peak memory without loading it; whether it fits on a GPU",
        description="Estimate the peak memory of a variant's training and generation, by kind, on this machine or on "
        "another GPU.",
    )
    estimate.add_argument("variant", metavar="VARIANT", help="STUDY:NAME, or a TOML file with one variant")
    add_options(estimate.add_argument, "profile")
    estimate.add_argument("--model", metavar="M", help="another model; its shape is enough, so random:M never loads")
    estimate.add_argument("--data", metavar="FILE|ID", help="data of the earlier run to compare the estimate with")
    estimate.add_argument(
        "--gpu",
        metavar="SIZE|NAME",
        help="whether it fits on another GPU, and what to change first if it does not: 24GiB, 24GB (of "
        '10^9 bytes), H100, "RTX 4090"',
    )
    estimate.add_argument(
        "--max-batch",
        action="store_true",
        help="the largest batch and the largest length that fit on that GPU, or on this machine",
    )
    common(estimate)
    estimate.set_defaults(command="estimate:run_estimate")


def _add_profile(commands: Any, common: Any) -> None:
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
        const="",
        help="measure the remedy of a finding against the present variant; default: of the most expensive finding",
    )
    profile.add_argument("--effort", choices=EFFORTS, help="of --try: 3, 8 or 12 replicates")
    profile.add_argument(
        "--max-minutes", type=float, metavar="M",
        help="time limit: fewer timed steps or requests, and optional parts are left out; with --try half of it is "
        "for the comparison",
    )  # fmt: skip
    add_options(profile.add_argument, "html", "if-busy")
    common(profile)
    profile.set_defaults(command="profile:run_profile")


def _add_parity(commands: Any, common: Any) -> None:
    parity = commands.add_parser(
        "parity",
        help="whether an adapter gives the same answers merged, in 4 bits and in 16",
        description="Serve a trained adapter unmerged and merged, on its own base, in 16 bits and in 4, and compare "
        "answers, logits and held-out loss with those of the adapter as it was trained.",
    )
    parity.add_argument("variant", metavar="VARIANT", help="STUDY:NAME, or a TOML file with one variant")
    add_options(parity.add_argument, "profile", "model", "data")
    parity.add_argument(
        "--adapter", metavar="DIR", help="a LoRA adapter that PEFT has saved; default: one is trained as the study says"
    )
    parity.add_argument("--epochs", type=float, metavar="E", help="train for at least this many epochs")
    parity.add_argument("--prompts", type=int, metavar="N", help="number of held-out records; default: the study's")
    parity.add_argument("--verbose", action="store_true", help="show some of the answers that differ, and all notices")
    add_options(parity.add_argument, "html", "if-busy")
    common(parity)
    parity.set_defaults(command="parity:run_parity")


def _add_report(commands: Any, common: Any) -> None:
    report = commands.add_parser("report", help="print the report of a run")
    report.add_argument(
        "run", metavar="RUN", nargs="+", help="a run id or a run directory; of several A/B runs one table"
    )
    add_options(report.add_argument, "metric")
    report.add_argument("--variant", metavar="V", action="append", default=[], help="only this one; repeatable")
    report.add_argument("--phase", choices=PHASES, action="append", default=[], help="only this one; repeatable")
    report.add_argument("--sort", choices=SORTS, default="study", help="the order of the variants")
    add_options(report.add_argument, "policy", "format", "markdown", "html", "verbose")
    common(report)
    report.set_defaults(command="report:run_report")


def _add_list_cmd(commands: Any, common: Any) -> None:
    listing = commands.add_parser(
        "list", help="list studies, variants, model sizes, models, runs, keys of files, JSON documents"
    )
    listing.add_argument("what", choices=("studies", "variants", "sizes", "models", "runs", "keys", "documents"))
    listing.add_argument("study", nargs="?", metavar="STUDY", help="the study whose variants or sizes to list")
    listing.add_argument("--model", metavar="M", help="sizes on another model; its shape is enough")
    common(listing)
    listing.set_defaults(command="list_cmd:run_list")

    model = commands.add_parser("model", help="fetch a model")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download a catalogue model, convert it once, verify it")
    fetch.add_argument("name", metavar="NAME")
    common(fetch)
    fetch.set_defaults(command="list_cmd:run_fetch")


def _add_compare(commands: Any, common: Any) -> None:
    compare = commands.add_parser(
        "compare", help="compare two runs", description="Compare two runs metric by metric; the exit code says how."
    )
    _sides(compare)
    add_options(compare.add_argument, "metric")
    compare.add_argument("--all-metrics", action="store_true", help="everything that was measured")
    compare.add_argument("--force", action="store_true", help="show ratios of sides that are not comparable")
    add_options(compare.add_argument, "policy", "format", "markdown", "html", "verbose")
    common(compare)
    compare.set_defaults(command="compare:run_compare")

    gate = commands.add_parser(
        "gate", help="pass or fail a comparison by a policy", description="Pass or fail a comparison by a policy file."
    )
    _sides(gate)
    add_options(gate.add_argument, "metric", "policy", "format", "markdown", "html", "verbose")
    common(gate)
    gate.set_defaults(command="compare:run_gate")

    accept = commands.add_parser(
        "accept", help="make a run the baseline of its fingerprint", description="Make a valid run the baseline."
    )
    accept.add_argument("run", metavar="RUN", help="a run id, or a directory in the runs directory")
    common(accept)
    accept.set_defaults(command="compare:run_accept")


def _sides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base",
        metavar="BASE",
        help="a run id, a run directory, a pytest-benchmark .json, a folder or quoted pattern of several (each is a "
        "replicate), the word baseline, or an A/B, which is both sides",
    )
    command.add_argument(
        "candidate",
        metavar="CANDIDATE",
        nargs="?",
        help="a run id, a run directory, a pytest-benchmark .json, or a folder or quoted pattern of several",
    )


def _add_sample(commands: Any, common: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="show answers of a trained adapter",
        description="Show a variant's answers and the reference answers, before and after training.",
    )
    sample.add_argument("run", metavar="RUN", help="a run id or a run directory")
    sample.add_argument("variant", metavar="VARIANT", help="a variant of the run's study")
    sample.add_argument("--replicate", type=int, default=0, metavar="R", help="which trained adapter, from 0")
    sample.add_argument("--count", type=int, metavar="N", help="at most this many answers")
    common(sample)
    sample.set_defaults(command="report:run_sample")


def _add_claims(commands: Any, common: Any) -> None:
    claims = commands.add_parser(
        "claims",
        help="judge the claims of a study by a run",
        description="Judge each claim of the study by a run: supported, refuted, inconclusive, not judged.",
    )
    claims.add_argument("run", metavar="RUN", help="a run id or a run directory; also of an unfinished run")
    add_options(claims.add_argument, "format", "markdown", "html", "verbose")
    common(claims)
    claims.set_defaults(command="report:run_claims")


def _add_export(commands: Any, common: Any) -> None:
    export = commands.add_parser(
        "export",
        help="export a run as tables or for other programs",
        description="Write a run as tables, or in the format of another program.",
    )
    export.add_argument("run", metavar="RUN", help="a run id, a run directory, or a packed run")
    export.add_argument("--format", choices=EXPORT_FORMATS, help="default: json")
    export.add_argument(
        "--table", choices=EXPORT_TABLES, help="of csv and parquet only this table; default: a file for each"
    )
    export.add_argument(
        "--metric", metavar="M", action="append", default=[],
        help="for github-action-benchmark and bencher: only this metric or pattern of metrics; repeatable",
    )  # fmt: skip
    export.add_argument("--output", metavar="PATH", help="a file, or a folder for all tables; default: standard output")
    common(export)
    export.set_defaults(command="export:run_export")


def _add_history(commands: Any, common: Any) -> None:
    history = commands.add_parser(
        "history",
        help="history of a metric across runs, and where it changed",
        description="Show a metric across all runs with the same fingerprint, with known breaks, suspected changes, "
        "and the commands that would confirm them.",
    )
    history.add_argument("metric", metavar="METRIC", nargs="?", help="default: step_time_s")
    history.add_argument("--study", metavar="S", help="only this study, by its name")
    history.add_argument("--variant", metavar="V", help="only this variant")
    history.add_argument(
        "--runs", action="store_true", help="also show one row per run, with its interval, commit and versions"
    )
    add_options(history.add_argument, "html")
    common(history)
    history.set_defaults(command="history:run_history")


def _add_prune_pack(commands: Any, common: Any) -> None:
    prune = commands.add_parser(
        "prune",
        help="remove runs that are no longer needed",
        description="Remove runs: all but the newest of each study, or those older than a given age. Accepted "
        "baselines, unfinished runs and unreadable runs are kept.",
    )
    prune.add_argument("--keep", type=int, metavar="N", help="keep the newest N runs of each study")
    prune.add_argument("--older", metavar="D", help="only runs older than this: 12h, 30d, 8w")
    prune.add_argument("--dry-run", action="store_true", help="list what would be removed; remove nothing")
    common(prune)
    prune.set_defaults(command="prune_pack:run_prune")

    pack = commands.add_parser(
        "pack",
        help="pack a run into one file",
        description="Pack a run into one file, which every command reads like a run directory. Paths, names of hosts "
        "and users, and texts of records are excluded unless included explicitly; logs are always excluded.",
    )
    pack.add_argument("run", metavar="RUN", help="a run id or a run directory")
    pack.add_argument("--output", metavar="FILE", help="default: RUN.lorameter.zip in this folder")
    pack.add_argument("--include", choices=PACKED_PRIVATE, action="append", default=[], help="include this; repeatable")
    common(pack)
    pack.set_defaults(command="prune_pack:run_pack")


def _add_init(commands: Any, common: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write the conftest.py and test_variants.py of a benchmark suite",
        description="Write the two files that make a folder a benchmark suite for pytest. Existing files are kept.",
    )
    init.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=Path("benchmarks"), help="default: benchmarks"
    )
    common(init)
    init.set_defaults(command="setup:run_init")


def _add_completion(commands: Any, common: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description="Print a shell completion script for commands and options.",
    )
    completion.add_argument("shell", choices=SHELLS)
    common(completion)
    completion.set_defaults(command="setup:run_completion")
