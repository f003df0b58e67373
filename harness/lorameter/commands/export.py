"""What hands out a run to other programs: `export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernels_check.terminal import escape_control_chars
from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS, UsageError
from lorameter.records import store
from lorameter.results.files import OF_TRENDS, TABULAR, text_of, write_tables, write_text


def run_export(options: argparse.Namespace) -> int:
    """Write the run; what was written is said, one path a line."""
    form = options.format or "json"
    if options.json and not options.output and form != "json":
        raise UsageError(f"--json and --format {form} both choose what is printed. Give one of them, or an --output.")
    if options.table and form not in TABULAR:
        raise UsageError(f"--table {options.table}: --format {form} is no table. Use csv or parquet.")
    if options.metric and form not in OF_TRENDS:
        raise UsageError(f"--metric: --format {form} has all metrics. Leave it out.")
    run = store.read_run(options.run, store.runs_dir(options.runs_dir))
    if form in TABULAR and options.output:
        written = write_tables(run, form, Path(options.output), options.table)
    else:
        text = text_of(run, form, table=options.table, metrics=options.metric)
        if not options.output:
            sys.stdout.writelines(map(escape_control_chars, text))
            return EXIT_PASS
        written = write_text(text, Path(options.output))
    if options.json:
        print_json({"run": run.manifest.run, "files": [str(path) for path in written]})
    else:
        print(escape_control_chars("\n".join(map(str, written))))
    return EXIT_PASS
