"""The table of commands: the function, the help and the options of each."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from lorameter.commands.options import CALIBRATED_STUDY, CALIBRATION_REPLICATES, Argument, argument, shared_options

EFFORTS = ("quick", "standard", "rigorous")
PHASES = ("train", "generate", "cold")
COMMAND_HELP = "a training command in quotes: 'python train.py --r 64'"
SIDE_HELP = "a git revision, a Python executable, or requirements such as 'peft==0.20.0'"
STUDY = argument("study", metavar="STUDY", nargs="?", help="name of a built-in study, or a TOML file")
VARIANT = argument("variant", metavar="VARIANT", help="STUDY:NAME, or a TOML file with one variant")
RUN = argument("run", metavar="RUN", help="a run id or a run directory")
MEASURING = shared_options("replicates", "max-minutes", "allow-disturbed", "sites", "on", "if-busy", "model", "data")
OUTPUT = shared_options("policy", "format", "markdown", "html", "verbose")
SIDES = (
    argument(
        "base",
        metavar="BASE",
        help="a run id, a run directory, a pytest-benchmark .json, a folder or quoted pattern of several (each is a "
        "replicate), the word baseline, or an A/B, which is both sides",
    ),
    argument(
        "candidate",
        metavar="CANDIDATE",
        nargs="?",
        help="a run id, a run directory, a pytest-benchmark .json, or a folder or quoted pattern of several",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; a name of two words is a subcommand of the first."""

    name: str
    calls: str = ""
    """MODULE:FUNCTION in `lorameter.commands`; empty for a command with subcommands."""
    help: str
    description: str | None = None
    example: str
    """An example at the end of its help."""
    arguments: tuple[Argument, ...] = ()
    has_json: bool = True


COMMANDS = (
    Command(
        name="run",
        calls="run:run_study",
        help="measure a study",
        description="Measure a study and print its report.",
        example="lorameter run lora-or-qlora --effort quick",
        arguments=(
            STUDY,
            argument("--effort", choices=EFFORTS, help="3, 8 or 12 replicates"),
            *shared_options("replicates", "profile", "model", "data", "variant"),
            argument("--phase", choices=PHASES, action="append", default=[], help="only this; repeatable"),
            argument(
                "--interleave", metavar="L", help="shared-base, lockstep or replicates; default: the finest possible"
            ),
            *shared_options(
                "until-decided", "precision", "max-minutes", "allow-disturbed", "sites", "on", "mixed", "if-busy"
            ),
            argument(
                "--command",
                dest="script",
                metavar="COMMAND",
                help="training command; put the engine's flags in {braces}",
            ),
            argument("--cwd", metavar="DIR", help="folder that the command is run in; default: this one"),
            argument("--steps", type=int, metavar="N", help="timed steps of each process of the command"),
            argument("--peft-experiments", metavar="DIR", help="method_comparison/MetaMathQA of PEFT, as a study"),
            argument(
                "--select",
                metavar="GLOB",
                action="append",
                help="of these experiments, by METHOD/NAME; one that begins with ! excludes; repeatable; default: all",
            ),
            argument(
                "--quality", action="store_true", help="train these experiments for all their steps; default: some tens"
            ),
            argument("--resume", metavar="RUN", help="resume an interrupted run, by its own study and plan"),
            *shared_options("trust", "dry-run", "verbose"),
        ),
    ),
    Command(
        name="ab",
        calls="run:run_ab",
        help="measure base and candidate in one interleaved job",
        description="Measure base and candidate in one interleaved job, and judge the candidate.",
        example="lorameter ab training-step --base main --candidate HEAD",
        arguments=(
            STUDY,
            argument("--base", metavar="SIDE", help=SIDE_HELP),
            argument("--candidate", metavar="SIDE", help=SIDE_HELP),
            argument("--base-command", metavar="COMMAND", help=f"in place of STUDY and sides: {COMMAND_HELP}"),
            argument("--candidate-command", metavar="COMMAND", help="the command that is compared with it"),
            argument(
                "--command",
                dest="script",
                metavar="COMMAND",
                help=f"in place of STUDY, on the sides --base and --candidate: {COMMAND_HELP}",
            ),
            argument("--cwd", metavar="DIR", help="folder that the commands are run in; default: this one"),
            argument("--steps", type=int, metavar="N", help="timed steps of each process of a command; default 16"),
            argument("--resume", metavar="RUN", help="resume an interrupted A/B, by its own study and sides"),
            *shared_options("trust"),
            argument("--effort", choices=EFFORTS, help="at most 3, 8 or 12 replicates; default 12"),
            *MEASURING,
            *shared_options("until-decided", "precision", "mixed", "variant", "dry-run"),
            argument(
                "--phase",
                choices=PHASES,
                action="append",
                default=[],
                help="phase to measure; repeatable; default: train and generate",
            ),
            *OUTPUT,
            argument(
                "--inject-rows",
                type=int,
                default=0,
                metavar="N",
                help="injected slow-down, to test the gate: the candidate multiplies N extra rows in every adapted "
                "layer",
            ),
        ),
    ),
    Command(
        name="calibrate",
        calls="calibrate:run_calibrate",
        help="this machine's own false-alarm rate and power",
        description="Measure false-alarm rate and detectable slow-down on this machine.",
        example="lorameter calibrate --effort standard",
        arguments=(
            argument("study", metavar="STUDY", nargs="?", help=f"default: {CALIBRATED_STUDY}"),
            argument(
                "--effort",
                choices=("standard", "rigorous"),
                help=f"8 or 12 replicates; default {CALIBRATION_REPLICATES}",
            ),
            *MEASURING,
            argument("--variant", metavar="V", help="the one variant to measure; default: the reference"),
            argument(
                "--inject-rows",
                type=int,
                metavar="N",
                help="rows of extra work a layer; default: sized by a pilot for 5 %%",
            ),
            argument("--resume", metavar="RUN", help="resume an interrupted calibration"),
        ),
    ),
    Command(
        name="bisect",
        calls="calibrate:run_bisect",
        help="find the commit or release that made it slower",
        description="Find the commit or release that introduced a slow-down: compare candidates between the good and "
        "the bad end with the good one, each in one interleaved job, by bisection.",
        example="lorameter bisect training-step --good v0.1.0 --bad HEAD",
        arguments=(
            argument("study", metavar="STUDY", help="name of a built-in study, or a TOML file"),
            argument(
                "--good",
                metavar="REV|REQ",
                required=True,
                help="a git revision of the repository in the current directory, or a release such as 'peft==0.19.0'",
            ),
            argument("--bad", metavar="REV|REQ", required=True, help="the same, later and slower"),
            argument("--metric", metavar="M", default="step_time_s", help="default: step_time_s"),
            argument("--variant", metavar="V", help="default: the reference of the study"),
            argument("--effort", choices=EFFORTS, help="3, 8 or 12 replicates; default 8"),
            *shared_options("replicates", "max-minutes", "allow-disturbed", "if-busy", "model", "data"),
            argument("--resume", action="store_true", help="reuse finished comparisons in the runs directory"),
            argument("--dry-run", action="store_true", help="list the candidates; measure nothing"),
        ),
    ),
    Command(
        name="wrap",
        calls="run:run_wrap",
        help="measure a training script while it runs",
        description="Run a command as it is and measure the training in it: `lorameter wrap -- python train.py`. Its "
        "output, its exit code and signals to it pass through; the run is stored in the runs directory; the report "
        "is printed to stderr.",
        example="lorameter wrap -- python train.py --r 64",
        arguments=(
            argument(
                "--require",
                metavar="PATH=VALUE",
                nargs="+",
                action="extend",
                default=[],
                help="required paths, such as attention.backend=flash; if one is not active, the run is invalid, and "
                "the exit code is 4 where the command's is 0",
            ),
            argument("--no-report", action="store_true", help="print no report"),
            argument(
                "words", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="the command, as typed without lorameter"
            ),
        ),
        has_json=False,
    ),
    Command(
        name="doctor",
        calls="setup:run_doctor",
        help="what this machine can run and measure, and what would disturb it",
        description="Check, in about a second and without measuring, what this machine can run and measure, what "
        "would disturb a measurement, and how to fix it. Exit code 0: fit, 4: unfit.",
        example="lorameter doctor",
    ),
    Command(
        name="estimate",
        calls="setup:run_estimate",
        help="estimate a variant's peak memory without loading it; whether it fits on a GPU",
        description="Estimate the peak memory of a variant's training and generation, by kind, on this machine or on "
        "another GPU.",
        example="lorameter estimate lora-or-qlora:lora-r16 --model llama2-7b --gpu L4",
        arguments=(
            VARIANT,
            *shared_options("profile"),
            argument("--model", metavar="M", help="another model; its shape is enough, so random:M never loads"),
            argument("--data", metavar="FILE|ID", help="data of the earlier run to compare the estimate with"),
            argument(
                "--gpu",
                metavar="SIZE|NAME",
                help="whether it fits on another GPU, and what to change first if it does not: 24GiB, 24GB (of "
                '10^9 bytes), H100, "RTX 4090"',
            ),
            argument(
                "--max-batch",
                action="store_true",
                help="the largest batch and the largest length that fit on that GPU, or on this machine",
            ),
        ),
    ),
    Command(
        name="profile",
        calls="profile:run_profile",
        help="profile a training step or generation requests",
        description="Profile a training step or generation requests: phases, kernels, memory, hardware ceilings, and "
        "what to try.",
        example="lorameter profile lora-or-qlora:qlora-nf4-r16 --phase generate --try",
        arguments=(
            VARIANT,
            argument(
                "--phase",
                choices=("train", "generate"),
                default="train",
                help="train: a step; generate: requests, prefill and decode, adapter unmerged and merged, and a cold "
                "start",
            ),
            *shared_options("profile", "model", "data"),
            argument(
                "--try",
                dest="attempt",
                metavar="FINDING",
                nargs="?",
                const="",
                help="measure the remedy of a finding against the present variant; default: of the most expensive "
                "finding",
            ),
            argument("--effort", choices=EFFORTS, help="of --try: 3, 8 or 12 replicates"),
            argument(
                "--max-minutes",
                type=float,
                metavar="M",
                help="time limit: fewer timed steps or requests, and optional parts are left out; with --try half of "
                "it is for the comparison",
            ),
            *shared_options("html", "if-busy"),
        ),
    ),
    Command(
        name="parity",
        calls="profile:run_parity",
        help="whether an adapter gives the same answers merged, in 4 bits and in 16",
        description="Serve a trained adapter unmerged and merged, on its own base, in 16 bits and in 4, and compare "
        "answers, logits and held-out loss with those of the adapter as it was trained.",
        example="lorameter parity lora-or-qlora:qlora-nf4-r16 --prompts 32",
        arguments=(
            VARIANT,
            *shared_options("profile", "model", "data"),
            argument(
                "--adapter",
                metavar="DIR",
                help="a LoRA adapter that PEFT has saved; default: one is trained as the study says",
            ),
            argument("--epochs", type=float, metavar="E", help="train for at least this many epochs"),
            argument("--prompts", type=int, metavar="N", help="number of held-out records; default: the study's"),
            argument("--verbose", action="store_true", help="show some of the answers that differ, and all notices"),
            *shared_options("html", "if-busy"),
        ),
    ),
    Command(
        name="report",
        calls="report:run_report",
        help="print the report of a run",
        example="lorameter report 20261120-101500-mine-3f2a --html report.html",
        arguments=(
            argument("run", metavar="RUN", nargs="?", help="a run id or a run directory; default: the latest run"),
            *shared_options("metric"),
            argument("--variant", metavar="V", action="append", default=[], help="only this one; repeatable"),
            argument("--phase", choices=PHASES, action="append", default=[], help="only this one; repeatable"),
            argument(
                "--sort",
                choices=("study", "name", "ratio", "value", "memory"),
                default="study",
                help="the order of the variants",
            ),
            *OUTPUT,
        ),
    ),
    Command(
        name="list",
        calls="runs:run_list",
        help="list studies, variants, model sizes, models, runs, keys of files",
        example="lorameter list runs",
        arguments=(
            argument("what", choices=("studies", "variants", "sizes", "models", "runs", "keys")),
            argument("study", nargs="?", metavar="STUDY", help="the study whose variants or sizes to list"),
            argument("--model", metavar="M", help="sizes on another model; its shape is enough"),
        ),
    ),
    Command(name="model", help="fetch a model", example="lorameter model fetch smollm2-135m", has_json=False),
    Command(
        name="model fetch",
        calls="runs:run_fetch",
        help="download a catalogue model, convert it once, verify it",
        example="lorameter model fetch smollm2-135m",
        arguments=(argument("name", metavar="NAME"),),
    ),
    Command(
        name="compare",
        calls="report:run_compare",
        help="compare two runs",
        description="Compare two runs metric by metric; the exit code says how.",
        example="lorameter compare baseline 20261120-101500-mine-3f2a",
        arguments=(
            *SIDES,
            *shared_options("metric"),
            argument("--all-metrics", action="store_true", help="everything that was measured"),
            argument("--force", action="store_true", help="show ratios of sides that are not comparable"),
            *OUTPUT,
        ),
    ),
    Command(
        name="gate",
        calls="report:run_gate",
        help="pass or fail a comparison by a policy",
        description="Pass or fail a comparison by a policy file.",
        example="lorameter gate baseline 20261120-101500-mine-3f2a --format github",
        arguments=(*SIDES, *shared_options("metric"), *OUTPUT),
    ),
    Command(
        name="accept",
        calls="report:run_accept",
        help="make a run the baseline of its fingerprint",
        description="Make a valid run the baseline.",
        example="lorameter accept 20261120-101500-mine-3f2a",
        arguments=(argument("run", metavar="RUN", help="a run id, or a directory in the runs directory"),),
    ),
    Command(
        name="sample",
        calls="report:run_sample",
        help="show answers of a trained adapter",
        description="Show a variant's answers and the reference answers, before and after training.",
        example="lorameter sample 20261120-101500-mine-3f2a qlora-nf4-r16",
        arguments=(
            RUN,
            argument("variant", metavar="VARIANT", help="a variant of the run's study"),
            argument("--replicate", type=int, default=0, metavar="R", help="which trained adapter, from 0"),
            argument("--count", type=int, metavar="N", help="at most this many answers"),
        ),
    ),
    Command(
        name="claims",
        calls="report:run_claims",
        help="judge the claims of a study by a run",
        description="Judge each claim of the study by a run: supported, refuted, inconclusive, not judged.",
        example="lorameter claims 20261120-101500-mine-3f2a",
        arguments=(
            argument("run", metavar="RUN", help="a run id or a run directory; also of an unfinished run"),
            *shared_options("format", "markdown", "html", "verbose"),
        ),
    ),
    Command(
        name="export",
        calls="runs:run_export",
        help="export a run as tables or for other programs",
        description="Write a run as tables, or in the format of another program.",
        example="lorameter export 20261120-101500-mine-3f2a --format parquet",
        arguments=(
            argument("run", metavar="RUN", help="a run id, a run directory, or a packed run"),
            argument(
                "--format",
                choices=("json", "csv", "parquet", "github-action-benchmark", "bencher"),
                help="default: json",
            ),
            argument(
                "--table",
                choices=("trials", "samples", "estimates", "comparisons"),
                help="of csv and parquet only this table; default: a file for each",
            ),
            argument(
                "--metric",
                metavar="M",
                action="append",
                default=[],
                help="for github-action-benchmark and bencher: only this metric or pattern of metrics; repeatable",
            ),
            argument("--output", metavar="PATH", help="a file, or a folder for all tables; default: standard output"),
        ),
    ),
    Command(
        name="history",
        calls="runs:run_history",
        help="history of a metric across runs, and where it changed",
        description="Show a metric across all runs with the same fingerprint, with known breaks, suspected changes, "
        "and the commands that would confirm them.",
        example="lorameter history step_time_s --study training-step",
        arguments=(
            argument("metric", metavar="METRIC", nargs="?", help="default: step_time_s"),
            argument("--study", metavar="S", help="only this study, by its name"),
            argument("--variant", metavar="V", help="only this variant"),
            argument(
                "--runs", action="store_true", help="also show one row per run, with its interval, commit and versions"
            ),
            *shared_options("html"),
        ),
    ),
    Command(
        name="prune",
        calls="runs:run_prune",
        help="remove runs that are no longer needed",
        description="Remove runs: all but the newest of each study, or those older than a given age. Accepted "
        "baselines, unfinished runs and unreadable runs are kept.",
        example="lorameter prune --keep 20 --dry-run",
        arguments=(
            argument("--keep", type=int, metavar="N", help="keep the newest N runs of each study"),
            argument("--older", metavar="D", help="only runs older than this: 12h, 30d, 8w"),
            argument("--dry-run", action="store_true", help="list what would be removed; remove nothing"),
        ),
    ),
    Command(
        name="pack",
        calls="runs:run_pack",
        help="pack a run into one file",
        description="Pack a run into one file, which every command reads like a run directory. Logs and credentials "
        "are excluded, and texts of records unless asked for.",
        example="lorameter pack 20261120-101500-mine-3f2a",
        arguments=(
            RUN,
            argument("--output", metavar="FILE", help="default: RUN.lorameter.zip in this folder"),
            argument("--texts", action="store_true", help="include the examples of the data and the model's answers"),
        ),
    ),
    Command(
        name="init",
        calls="setup:run_init",
        help="write the conftest.py and test_variants.py of a benchmark suite",
        description="Write the two files that make a folder a benchmark suite for pytest. Existing files are kept.",
        example="lorameter init benchmarks",
        arguments=(
            argument(
                "folder", metavar="DIR", nargs="?", type=Path, default=Path("benchmarks"), help="default: benchmarks"
            ),
        ),
    ),
    Command(
        name="completion",
        calls="setup:run_completion",
        help="print a shell completion script",
        description="Print a shell completion script for commands and options.",
        example="lorameter completion bash > lorameter.bash",
        arguments=(argument("shell", choices=("bash", "zsh", "tcsh")),),
    ),
)
"""All commands, in the order of `--help`."""
