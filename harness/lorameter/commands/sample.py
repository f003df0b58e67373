"""The command that shows what a trained adapter writes."""

from __future__ import annotations

import argparse
from typing import Any

from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS, UsageError


def add_commands(commands: Any, common: Any) -> None:
    """The parser of `sample`; `common` adds the options that every command has."""
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
    sample.set_defaults(command=run_sample)


def run_sample(options: argparse.Namespace) -> int:
    """Print the answers."""
    from lorameter.records import codec, store
    from lorameter.report.sample import read_samples

    if options.count is not None and options.count < 1:
        raise UsageError(f"--count = {options.count}: no answers to show. Use 1 or more, or leave it out for all.")
    run = store.read_run(options.run, store.runs_dir(options.runs_dir))
    samples = read_samples(run, options.variant, replicate=options.replicate, count=options.count)
    if options.json:
        about = {"run": run.manifest.run, "variant": options.variant, "replicate": options.replicate}
        print_json({**about, "samples": codec.to_json(samples)})
        return EXIT_PASS
    from lorameter.report.sample import describe_samples
    from lorameter.report.terminal import console_for, show

    title = f"{options.variant}, replicate {options.replicate}, {run.manifest.study['workload']['model']}"
    show(describe_samples(samples, title), console_for())
    return EXIT_PASS
