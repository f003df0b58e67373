"""Forms of variants: what each declares of itself, and the forms that are known.

A form declares the key that selects it in a study, its executor, and what it supports; no other module asks for the
form itself. Other packages register forms as entry points of the group `FORM_GROUP`, under the name of their key.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from lorameter.errors import UsageError, require, shorten
from lorameter.measurements.metrics import Measure
from lorameter.records import codec

FORMS = {
    "": "lorameter.studies.variant:LoraVariant",
    "command": "lorameter.studies.variant:ScriptVariant",
    "peft": "lorameter.studies.variant:PeftVariant",
    "method": "lorameter.studies.variant:FullVariant",
}
"""The forms of this package, by key; the first is taken if no key selects another."""
FORM_GROUP = "lorameter.forms"
"""The group of entry points by which other packages register forms."""
Support = Literal["workload", "built", "own training"]
"""What a form supports in addition to its measures:

- workload: model, data and requests are those of [workload]
- built: lorameter builds the model, so its memory, sizes and step times can be estimated, its base shared, extra work
  put into its adapters, and its trials placed on sites; nothing that the study names is executed
- own training: the variant trains what it defines itself, so its process reports data and software, and a single
  training can be followed without a control
"""


class AnyVariant(abc.ABC):
    """One configuration to be measured; the group key of every result.

    `name` is a label and not a part of the identity: two variants that differ only in name are the same variant.
    """

    __slots__ = ()
    key: ClassVar[str]
    """The key of a study that selects the form; for an entry point, its name."""
    form: ClassVar[str]
    """The form, as in "the variant is ..."."""
    executor: ClassVar[str] = "local"
    """The executor of its trials: a name in `lorameter.run.workers.EXECUTORS`, or MODULE:CLASS."""
    measures: ClassVar[tuple[Measure, ...]] = ("steps", "peaks")
    """What can be measured; a form without "steps" is not trained."""
    supports: ClassVar[frozenset[Support]] = frozenset()
    name: str

    @classmethod
    def trains(cls) -> bool:
        """Whether it is trained before its requests."""
        return "steps" in cls.measures

    @property
    def summary(self) -> str:
        """Its settings in one line, for a form without a workload."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())

    def on_side(self, kind: str, spec: str) -> Self:
        """The variant on a side of an A/B; only a command is itself replaced by a side."""
        return self

    def check_side(self, kind: str) -> None:  # noqa: B027 # optional
        """Raise `UsageError` if a side of this kind could not replace what the variant runs in."""

    @property
    @abc.abstractmethod
    def method_name(self) -> str:
        """The method, by PEFT's name if it has one."""

    @staticmethod
    def class_for(table: Mapping[str, Any]) -> type[AnyVariant]:
        """The class of the variant in a table of a study, a record or a message."""
        default, *others = own_forms()
        own = next((form for form in others if form.key in table), default)
        if own is not default or table.keys() <= {*form_keys(default)}:
            return own  # without a look at the installed packages, which a new process would have to read
        return next((form for form in all_forms()[1:] if form.key in table), default)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which two variants may differ, by name; the keys of a PEFT configuration are `peft.KEY`."""
        own = {key: getattr(self, key) for key in form_keys(type(self)) if key != "name"}
        return own | {f"peft.{key}": value for key, value in own.pop("peft", {}).items()}

    def setting(self, key: str) -> Any:
        """The value of one of the settings, or of "method"; None if this form does not have it."""
        return self.method_name if key == "method" else self.settings.get(key)

    @property
    def id(self) -> str:
        """Short content id: equal for equal configurations, on any machine, with keys in any order."""
        content = {
            key: value for key, value in codec.to_json(self).items() if key != "name" and key not in self._unread
        }
        return hashlib.sha256(codec.dumps(content).encode()).hexdigest()[:12]

    @property
    def _unread(self) -> tuple[str, ...]:
        """Fields without an effect, which must not distinguish two variants."""
        return ()

    def differences(self, other: AnyVariant) -> tuple[str, ...]:
        """Names of the settings in which two variants differ; for two methods, "method" and the common settings."""
        ours, theirs = self.settings, other.settings
        if type(self) is not type(other):
            own = tuple(key for key in ours if key in theirs and ours[key] != theirs[key])
            return ("method", *(key for key in own if key != "method"))
        missing = object()
        return tuple(key for key in {**ours, **theirs} if ours.get(key, missing) != theirs.get(key, missing))


def form_keys(form: type[AnyVariant]) -> tuple[str, ...]:
    """Keys of a variant of one form: its name, the fields of this form only, and those of `Variant`."""
    every = [one.name for one in dataclasses.fields(form)]  # type: ignore[arg-type]
    return tuple(sorted(every, key=lambda key: (key != "name", key not in form.__annotations__)))


@functools.cache
def own_forms() -> tuple[type[AnyVariant], ...]:
    """The forms of this package."""
    return tuple(map(pkgutil.resolve_name, FORMS.values()))


@functools.cache
def all_forms() -> tuple[type[AnyVariant], ...]:
    """The forms of this package and of the installed ones. Raises `UsageError` for one that cannot be loaded."""
    forms = list(own_forms())
    for point in importlib.metadata.entry_points(group=FORM_GROUP):
        try:
            form = point.load()
        except Exception as error:  # any code of the package may have run
            raise UsageError(
                f"{FORM_GROUP}: the form {point.name!r} of {point.value} cannot be loaded: {shorten(str(error))}. "
                "Repair or uninstall its package."
            ) from None
        require(
            isinstance(form, type) and issubclass(form, AnyVariant) and form.key == point.name,
            f"{FORM_GROUP}: {point.value} is registered as {point.name!r}, and is no form of a variant with this key. "
            "Correct its package.",
        )
        forms.append(form)
    return tuple(forms)


def all_keys() -> tuple[str, ...]:
    """Keys of a variant of any form."""
    return tuple(dict.fromkeys(key for form in all_forms() for key in form_keys(form)))
