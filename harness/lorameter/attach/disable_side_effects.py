"""Disables side effects of a measured script: reports to trackers, checkpoints and uploads.

The script is started many times and killed in the middle, and the user does not want its outputs. The import hook calls
these functions with a module right after its import. They change arguments of libraries but not the training; files
that the script itself writes go into a separate folder (`lorameter.run.workers.script_sandbox`).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NoReturn

TRAINER_OVERRIDES: dict[str, Any] = {
    "report_to": "none",
    "push_to_hub": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
"""Arguments of transformers' Trainer that write or publish, and their values in a measured script. The best model would
be loaded from a checkpoint, which does not exist."""
PUBLISHING = tuple(
    "accept add batch cancel change comment copy create delete disable duplicate edit enable grant hide merge move "
    "pause permanently preupload reject rename request rerun restart resume run scale set super suspend trigger "
    "unlike update upload".split()
)
"""First words of the hub client's methods that change repositories, discussions or jobs."""


def disable_trainer_side_effects(module: ModuleType) -> None:
    """Change TrainingArguments and its subclasses so that they report, save and push nothing."""
    arguments = module.TrainingArguments
    original_post_init = arguments.__post_init__

    def post_init(self: Any) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # transformers' default; a script may use it for early stopping
        for name, value in TRAINER_OVERRIDES.items():
            setattr(self, name, value)
        original_post_init(self)

    arguments.__post_init__ = post_init


def block_hub_writes(module: ModuleType) -> None:
    """Make the hub client refuse to publish, whatever methods its version has."""

    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "lorameter: a measured script publishes nothing. Upload from a run of the script that is not measured."
        )

    for name in dir(module.HfApi):
        if name.partition("_")[0] in PUBLISHING and name != "run_as_future":  # it runs another method, which may refuse
            setattr(module.HfApi, name, refuse)
            setattr(module, name, functools.partial(refuse, None))  # the module's functions are its client's methods
