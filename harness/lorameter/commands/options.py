"""Options shared by several commands, or by a command and the pytest plugin."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Argument: TypeAlias = tuple[tuple[str, ...], Mapping[str, Any]]
"""Names and settings, as arguments of `add_argument`."""
DEFAULT_STUDY = "lora-or-qlora"
"""Default study of a pytest session."""
CALIBRATED_STUDY = "training-step"
CALIBRATION_REPLICATES = 24
"""Enough for three independent gates of 8, and about 4 minutes of the default study on two cores."""
PYTEST_PREFIX = "--lorameter-"
SHARED: Mapping[str, dict[str, Any]] = {
    "replicates": {"type": int, "metavar": "N", "help": "number of replicates, instead of {prefix}effort"},
    "profile": {"metavar": "P", "help": "a profile of the study; default: the one of this machine"},
    "model": {"metavar": "M", "help": "catalogue name, hub id, directory, GGUF file, or random:M"},
    "data": {"metavar": "FILE|ID", "help": "a file, a folder, a hub id, or synthetic"},
    "variant": {"metavar": "V", "action": "append", "default": [], "help": "only this variant; repeatable"},
    "metric": {
        "metavar": "M",
        "action": "append",
        "default": [],
        "help": "only this metric or pattern of metrics; repeatable",
    },
    "policy": {"metavar": "FILE", "help": "TOML file: limits, gated metrics, how to treat inconclusive"},
    "format": {"choices": ("text", "json", "markdown", "github"), "help": "default: text"},
    "markdown": {"action": "store_true", "help": "the same as {prefix}format markdown"},
    "html": {"metavar": "FILE", "help": "also write one self-contained HTML page"},
    "dry-run": {"action": "store_true", "help": "show the plan and its expected cost; measure nothing"},
    "verbose": {"action": "store_true", "help": "show full notices and statistics"},
    "precision": {
        "type": float,
        "metavar": "F",
        "help": "stop when every interval is within ±F of its ratio; a fraction: 0.05 is 5 %%",
    },
    "until-decided": {
        "action": argparse.BooleanOptionalAction,
        "default": None,
        "help": "end as soon as every comparison is decided, at planned looks after 3 to 12 replicates; {prefix}effort "
        "and {prefix}replicates set the maximum",
    },
    "max-minutes": {"type": float, "metavar": "M", "help": "time limit; fewer rounds for every variant"},
    "allow-disturbed": {"action": "store_true", "help": "keep trials measured under disturbance"},
    "sites": {
        "metavar": "0,1,…",
        "help": "measure replicates on these GPUs at once, or on as many shares of this machine's CPUs, 0+1,2+3 for "
        "trials of two ranks; with {prefix}on, on these nodes",
    },
    "on": {
        "metavar": "CLUSTER",
        "help": "measure replicates on the nodes of a Ray cluster (ray: that of this machine; ray://HOST:PORT: behind "
        "a client port), in jobs of SLURM (slurm:sites=4,partition=gpu,gres=gpu:1,time=60); "
        "here: in place of what the study says",
    },
    "mixed": {"action": "store_true", "help": "allow different hardware; results are reported per site"},
    "if-busy": {
        "choices": ("wait", "refuse", "share"),
        "default": "wait",
        "help": "if the device is in use by another lorameter: wait (default), refuse, or share it",
    },
    "trust": {"action": "store_true", "help": "of --resume: execute commands that another user may have written"},
    "runs-dir": {"metavar": "DIR", "help": "default: $LORAMETER_RUNS or ./.lorameter/runs"},
}
"""Options shared by several commands, by name."""


def argument(*names: str, **settings: Any) -> Argument:
    """An argument of one command."""
    return names, settings


def shared_options(*names: str, prefix: str = "--") -> tuple[Argument, ...]:
    """Options shared by several commands; pytest uses another prefix."""
    return tuple(((f"{prefix}{name}",), SHARED[name] | {"help": SHARED[name]["help"].format(prefix=prefix)})
                 for name in names)  # fmt: skip


def add_arguments(add: Callable[..., object], arguments: Sequence[Argument]) -> None:
    """Add arguments by `add_argument` of argparse or `addoption` of pytest."""
    for names, settings in arguments:
        add(*names, **settings)
