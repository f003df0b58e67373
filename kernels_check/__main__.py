"""``python -m kernels_check``: each subcommand is a function in its own module, which is imported only when it runs.

Exit codes are those of the lorameter commands: 0 done, 2 usage or bad input, 4 a failed check, 70 unexpected error, 141
if the reader of the output has gone away. Standard output carries the result (with ``--json`` exactly one document),
standard error everything else.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

EXIT_UNEXPECTED = 70
COMMANDS = {
    "probe": ("probe", "which fast paths run on this machine (default)"),
    "selftest": ("selftest", "are twelve faults found on this machine, and do healthy runs pass"),
    "trace": ("trace.summary", "judge a recording: a Kineto/Chrome trace or an nsys cuda_gpu_kern_sum CSV"),
}
"""The module of each subcommand, and its purpose."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(["probe", *words] if words in ([], ["--json"]) else words)
    try:
        module, _ = COMMANDS[arguments.command]
        return int(import_module(f"kernels_check.{module}").run(arguments))
    except Exception:
        traceback.print_exc()
        print("kernels_check: unexpected error, see above; please report it with the command", file=sys.stderr)
        return EXIT_UNEXPECTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_check", description="Reports which code paths really ran, whatever was requested."
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, (_, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "trace":
            command.add_argument(
                "file", type=Path, metavar="FILE", help="trace .json or .json.gz, or nsys .csv (also .gz)"
            )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it without a traceback
    sys.exit(main())
