"""What the commands do that keep order among runs: `prune` and `pack`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kernels_check.terminal import escape_control_chars
from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS, UsageError
from lorameter.records.units import format_count

PRIVATE = ("paths", "hosts", "texts")
"""As `lorameter.results.pack.PRIVATE`, which would load what only the command needs; a test holds them equal."""


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
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
    prune.set_defaults(command=run_prune)

    pack = commands.add_parser(
        "pack",
        help="pack a run into one file",
        description="Pack a run into one file, which every command reads like a run directory. Paths, names of hosts "
        "and users, and texts of records are excluded unless included explicitly; logs are always excluded.",
    )
    pack.add_argument("run", metavar="RUN", help="a run id or a run directory")
    pack.add_argument("--output", metavar="FILE", help="default: RUN.lorameter.zip in this folder")
    pack.add_argument("--include", choices=PRIVATE, action="append", default=[], help="include this; repeatable")
    common(pack)
    pack.set_defaults(command=run_pack)


def run_prune(options: argparse.Namespace) -> int:
    """Remove, and say what went and what stayed for a reason."""
    from lorameter.records import codec, store
    from lorameter.records.units import format_bytes
    from lorameter.results.prune import parse_age, prune

    if options.keep is None and options.older is None:
        raise UsageError("prune: nothing says what goes. Give --keep N, --older D, or both.")
    if options.keep is not None and options.keep < 0:
        raise UsageError(f"--keep = {options.keep}: no number of runs. Use 0 or more.")
    older_s = None if options.older is None else parse_age(options.older)
    runs = store.runs_dir(options.runs_dir)
    found = prune(runs, keep=options.keep, older_s=older_s, dry_run=options.dry_run)
    if options.json:
        removed, kept = codec.to_json(found.removed), codec.to_json(found.staying)
        print_json({"dry_run": options.dry_run, "removed": removed, "kept_for_a_reason": kept})
        return EXIT_PASS
    word = "would go" if options.dry_run else "removed"
    for one in found.removed:
        print(escape_control_chars(f"{word}  {one.run}  {format_bytes(one.size_bytes)}  {one.study}"))
    for one in found.staying:
        print(escape_control_chars(f"stays  {one.run}  {one.why}"))
    freed = format_bytes(sum(one.size_bytes for one in found.removed))
    said = f"{format_count(len(found.removed), 'run')}, {freed}{' would be' if options.dry_run else ''} freed"
    print(f"{said}; {found.kept} kept as asked for")
    return EXIT_PASS


def run_pack(options: argparse.Namespace) -> int:
    """Write the file and say where it is and what is not in it."""
    from lorameter.records import store
    from lorameter.records.units import format_bytes
    from lorameter.results.pack import PRIVATE, pack

    output = Path(options.output) if options.output else None
    target = pack(options.run, store.runs_dir(options.runs_dir), output, options.include)
    skipped = [word for word in PRIVATE if word not in options.include]
    size = target.stat().st_size
    if options.json:
        print_json({"file": str(target), "size_bytes": size, "skipped": [*skipped, "logs"]})
        return EXIT_PASS
    print(escape_control_chars(f"{target}  {format_bytes(size)}, without {', '.join([*skipped, 'logs'])}"))
    return EXIT_PASS
