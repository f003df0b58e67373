"""Attaches the meter to a process's first training; every interpreter of a wrapped command imports this module first.

lorameter itself is imported only when a training starts: when a Trainer is built or an optimizer updates. So the hook
costs a launcher, a data worker or an unrelated script next to nothing. The user's own `sitecustomize`, which this one
hides, is imported after it. The module uses only the standard library, since it must work in any interpreter.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
FIRST_FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
PACKAGE_FOLDERS = (FIRST_FOLDER, os.path.dirname(FIRST_FOLDER))  # in a checkout, each package is in its own
PACKAGES = ("lorameter", "kernels_check")
DEPENDENCIES = ("filelock", "msgspec")
MIN_PYTHON = (3, 11)


class PackageFinder:
    """Finds the packages of lorameter, but no other modules in their folders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.PathFinder.find_spec(name, PACKAGE_FOLDERS) if name in PACKAGES else None


class ImportHook:
    """Finds a module with the other finders, and calls a function with it after its import."""

    def __init__(self, calls: Any) -> None:
        self.calls = calls

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        call = self.calls.pop(name, None)
        if call is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders: this finder no longer looks for it
        self.calls[name] = call
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self.execute, loader.exec_module)
        return spec

    def execute(self, execute: Any, module: Any) -> None:
        execute(module)
        if module.__name__ in self.calls:
            call_safely(self.calls.pop(module.__name__), module)
        if not self.calls and self in sys.meta_path:
            sys.meta_path.remove(self)  # each finder costs every later import, and accelerate tries two in each step


def call_safely(call: Any, *args: Any) -> Any:
    """Call a function of lorameter; if it fails, print the error and let the script continue."""
    try:
        return call(*args)
    except Exception as error:
        print_notice("the training is not measured: {}: {}".format(type(error).__name__, error))
        return None


def print_notice(text: str) -> None:
    """Print a line on the standard error that the process was started with."""
    if sys.__stderr__ is not None:
        visible = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
        print("lorameter: " + visible, file=sys.__stderr__, flush=True)


def call_own(module: str, name: str, *args: Any) -> Any:
    """Call a function of a module of lorameter, whether or not this interpreter has it installed."""
    finder = PackageFinder()
    sys.meta_path.insert(0, finder)
    try:
        for package in PACKAGES:  # their own modules are found by their folders
            importlib.import_module(package)
    finally:
        sys.meta_path.remove(finder)
    return getattr(importlib.import_module("lorameter.attach." + module), name)(*args)


@functools.lru_cache(maxsize=None)
def report_missing_packages() -> bool:
    """Whether this interpreter lacks a package that the meter needs; if so, print that and write it into the file that
    says that the hook was loaded."""
    missing = [name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]
    if sys.version_info < MIN_PYTHON:
        text = "{} is older than Python {}.{}. Use a newer one".format(sys.executable, *MIN_PYTHON)
    elif missing:
        text = "{0} lacks {1}. Install: {0} -m pip install {1}".format(sys.executable, " ".join(missing))
    else:
        return False
    hooked = os.environ.get("LORAMETER_HOOKED")
    if hooked:
        with open(hooked, "w") as file:
            file.write(text)
    print_notice("a training in this process is not measured: {}".format(text))
    return True


def attach_trainer(module: Any) -> None:
    """Give every Trainer a meter when it is built, unless the script has given it one."""
    if report_missing_packages():
        return
    build = module.Trainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        call_safely(call_own, "meter", "add_meter", self)

    module.Trainer.__init__ = functools.wraps(build)(init)


def attach_optimizers(module: Any) -> None:
    """Measure the time between two updates as a step, if no other source defines steps.

    torch wraps the `step` of each optimizer class in a function, and this function wraps that one. A torch hook would
    be called inside torch's wrapper, where the end of a watched step could not remove the hooks of its check.
    """
    if report_missing_packages():
        return
    source: "list[Any]" = []
    plain = module.Optimizer.profile_hook_step

    def profile_hook_step(func: Any) -> Any:
        step, compiling = plain(func), sys.modules["torch"].compiler.is_dynamo_compiling

        @functools.wraps(step)
        def update(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if not compiling():  # Dynamo takes it for true, and traces nothing else of this function
                if not source:
                    source.append(call_safely(call_own, "sources", "OptimizerSource"))
                if source[0] is not None:
                    source[0].end_update(args[0])
            return result

        return update

    module.Optimizer.profile_hook_step = staticmethod(profile_hook_step)


def install() -> None:
    """Wait for the imports of the modules that define trainers and optimizers."""
    hooked = os.environ.get("LORAMETER_HOOKED")
    if hooked:
        with open(hooked, "a"):
            pass
    calls = {"transformers.trainer": attach_trainer, "torch.optim.optimizer": attach_optimizers}
    if os.environ.get("LORAMETER_TURN_SOCKET"):
        disable = functools.partial(call_own, "disable_side_effects")
        calls["transformers.training_args"] = functools.partial(disable, "disable_trainer_side_effects")
        calls["huggingface_hub.hf_api"] = functools.partial(disable, "block_hub_writes")
    sys.meta_path.insert(0, ImportHook(calls))


def import_shadowed_sitecustomize() -> None:
    """Import the user's own sitecustomize under its usual name, and remove this module's folder from the path."""
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("LORAMETER_OBSERVER"):
    call_safely(install)
import_shadowed_sitecustomize()
