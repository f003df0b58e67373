"""Rows of data sets that are no plain files: those that `datasets` saved in a folder, and those of the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError
from lorameter.models.catalogue import hub_answers
from lorameter.studies.data_source import REMEDY, DataSource
from lorameter.trial.data.files import ROWS, DataTable, Placed, said_by


def open_saved(source: DataSource, where: str) -> DataTable:
    """A folder of save_to_disk, or one split of it. Raises `UsageError` where it cannot be read."""
    if not source.files:
        return DataTable(names=None, place=where, rows=lambda _: iter(()))
    datasets = _library()
    folder = Path(source.name) / source.split
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # which exception depends on the library beneath
        raise UsageError(f"{where}: cannot be read: {said_by(error)}. Save it again.") from None
    return _table(found, where)


def open_hub(source: DataSource, where: str) -> DataTable:
    """A split of a data set of the hub, fetched into its cache. Raises `UsageError` where it cannot be had."""
    datasets = _library()
    answers = hub_answers(f"datasets/{source.name}/resolve/main/README.md")
    try:
        with contextlib.nullcontext() if answers else _offline(datasets):
            found = datasets.load_dataset(source.name, source.config or None, split=source.split)
    except Exception as error:  # as above
        said = f"{type(error).__name__}: {said_by(error)}"
        raise UsageError(f"{where}: cannot be read: {said}. {REMEDY}") from error
    return _table(found, where)


def _library() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Meanwhile the library takes what its cache holds; it would ask a hub that never answers for six minutes."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _table(found: Any, where: str) -> DataTable:
    def rows(columns: Sequence[str]) -> Iterator[Placed]:
        try:
            taken = found.select_columns(list(columns)).with_format(None)
        except Exception as error:  # as above
            raise UsageError(f"{where}: cannot be read: {said_by(error)}. Save it again.") from None
        for begin in range(0, len(taken), ROWS):
            try:
                batch = taken[begin : begin + ROWS]
            except Exception as error:  # as above
                raise UsageError(
                    f"{where}, row {begin + 1}: cannot be read: {said_by(error)}. Save it again."
                ) from None
            for number, values in enumerate(zip(*(batch[name] for name in columns), strict=True), begin + 1):
                yield f"{where}, row {number}", dict(zip(columns, values, strict=True))

    return DataTable(names=tuple(found.column_names) if len(found) else None, place=where, rows=rows)
