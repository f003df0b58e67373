"""Disables side effects of a measured script: reports to trackers, checkpoints and uploads.

It is started many times and ended in the middle, and the user wants nothing of what it would leave behind. The import
hook calls these functions with a module right after that was imported. They change arguments of libraries and nothing
of the training; what the script itself writes goes into a folder of its own
(`lorameter.run.workers.script_sandbox`).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NoReturn

QUIET: dict[str, Any] = {
    "report_to": "none",
    "push_to_hub": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
"""Arguments of transformers' Trainer that write or publish, and their values in a measured script. The best model is
loaded from a checkpoint, of which there is none."""
PUBLISHING = tuple(
    "accept add batch cancel change comment copy create delete disable duplicate edit enable grant hide merge move "
    "pause permanently preupload reject rename request rerun restart resume run scale set super suspend trigger "
    "unlike update upload".split()
)
"""First words of the methods of the hub's client that change something there: repositories, discussions, jobs, all."""


def disable_trainer_side_effects(module: ModuleType) -> None:
    """Have every TrainingArguments, and what inherits it, report, save and push nothing."""
    arguments = module.TrainingArguments
    complete = arguments.__post_init__

    def quietened(self: Any) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as transformers takes it from that; a script may stop early by it
        for name, value in QUIET.items():
            setattr(self, name, value)
        complete(self)

    arguments.__post_init__ = quietened


def block_hub_writes(module: ModuleType) -> None:
    """Have the hub's client refuse to publish, whatever the methods of its version are."""

    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "lorameter: a measured script publishes nothing. Leave the upload to the script that is not measured."
        )

    for name in dir(module.HfApi):
        if name.partition("_")[0] in PUBLISHING and name != "run_as_future":  # which calls another one elsewhere
            setattr(module.HfApi, name, refuse)
            setattr(module, name, functools.partial(refuse, None))  # of the module's own client, bound when it was made
