"""What the commands do that keep order among runs: `prune` and `pack`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels_check.terminal import escape_control_chars
from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS, UsageError
from lorameter.records import codec, store
from lorameter.records.units import format_bytes, format_count
from lorameter.results.pack import PRIVATE, pack
from lorameter.results.prune import parse_age, prune


def run_prune(options: argparse.Namespace) -> int:
    """Remove, and say what went and what stayed for a reason."""
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
    output = Path(options.output) if options.output else None
    target = pack(options.run, store.runs_dir(options.runs_dir), output, options.include)
    skipped = [word for word in PRIVATE if word not in options.include]
    size = target.stat().st_size
    if options.json:
        print_json({"file": str(target), "size_bytes": size, "skipped": [*skipped, "logs"]})
        return EXIT_PASS
    print(escape_control_chars(f"{target}  {format_bytes(size)}, without {', '.join([*skipped, 'logs'])}"))
    return EXIT_PASS
