"""Records of a workload: read in an order fixed by the seed, recognised, and each held against its form."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from lorameter.errors import UsageError, shorten
from lorameter.models import catalogue
from lorameter.models.chat_template import has_chat_template, no_chat_template
from lorameter.studies.data_source import DataSource, resolve
from lorameter.studies.workload import Workload
from lorameter.trial.data.detect_format import SAID, Form, recognise
from lorameter.trial.data.encoding import AnyRecord
from lorameter.trial.data.files import MOST_UNPACKED, DataTable, Placed, most_unpacked, open_table
from lorameter.trial.data.messages import Conversation
from lorameter.trial.data.probe import is_risky, probe_in_subprocess
from lorameter.trial.data.sets import open_hub, open_saved
from lorameter.trial.data.synthetic import synthetic_records

LOOKED_AT = 32 << 20
"""Characters of records that are looked at before anything is started: more would take seconds."""
TEXT_CHARACTERS = 4 << 30
"""Of all records together, which are held in memory to be shuffled."""


def read_records(workload: Workload) -> tuple[Iterator[AnyRecord], str]:
    """The records of a workload in an order fixed by `data_seed`, and what they are in words.

    Raises:
        UsageError: data that cannot be read, is empty, or holds a record without a text that it needs or that this
            workload cannot use; the file and the line are named.
    """
    source = resolve(workload.data)
    if source.kind == "synthetic":
        return synthetic_records(workload.data_seed), f"synthetic instruction records, seed {workload.data_seed}"
    form, found = _open(source, workload)
    records = []
    read, most = 0, _most_characters(source)
    for record in found:
        records.append(record)
        read += _characters(record)
        if read > most:
            over = f"more than {most >> 20} MiB of text"
            said = over if most == TEXT_CHARACTERS else f"{over}, over {MOST_UNPACKED} times what its files hold"
            raise UsageError(f"data {shorten(repr(workload.data))}: {said}. Use a part of it.")
    if not records:
        raise _empty(workload)
    random.Random(workload.data_seed).shuffle(records)
    return iter(records), f"{source.label}, {len(records)} records of {form.title}"


def describe_data(workload: Workload) -> str:
    """What the data is in words, from its first records, without anything being loaded; of a data set of the hub only
    which it is.

    Raises:
        UsageError: data that `read_records` would refuse, as far as it is looked at; or what reads it dies of it.
    """
    return probe_in_subprocess(workload) if is_risky(resolve(workload.data)) else look_here(workload)


def look_here(workload: Workload) -> str:
    """The same in this process, whatever may become of it."""
    source = resolve(workload.data)
    if source.kind == "synthetic":
        return f"synthetic instruction records, seed {workload.data_seed}"
    if source.kind == "hub":
        return f"{source.label} of the hub, looked into when it is fetched"
    form, found = _open(source, workload)
    count = read = 0
    for record in found:
        count, read = count + 1, read + _characters(record)
        if read > LOOKED_AT:
            return f"{source.label}, records of {form.title}; the first {count} were looked at"
    if not count:
        raise _empty(workload)
    if count <= workload.held_out_records:
        raise UsageError(
            f"data {workload.data!r}: {count} records, and held_out_records = {workload.held_out_records}: none is "
            "left to train on. Hold out fewer, or use more data."
        )
    return f"{source.label}, {count} records of {form.title}"


def _open(source: DataSource, workload: Workload) -> tuple[Form, Iterator[AnyRecord]]:
    """The form of the records, and they themselves, file by file."""
    form: Form | None = None
    tables: list[tuple[str, DataTable]] = []
    for where, table in _tables(source, f"data {shorten(repr(workload.data))}"):
        if table.names is None:
            continue
        found = recognise(table.names, workload.columns, table.place)
        if form is not None and found != form:
            raise UsageError(f"{where}: {found.title}, and {tables[0][0]} has {form.title}. Part them.")
        form = found
        tables.append((where, table))
    if form is None:
        raise _empty(workload)
    _check_use(form, workload)
    rows = itertools.chain.from_iterable(table.rows(tuple(form.columns.values())) for _, table in tables)
    return form, _records(form, rows)


def _records(form: Form, rows: Iterator[Placed]) -> Iterator[AnyRecord]:
    return (form.record(row, place) for place, row in rows)


def _tables(source: DataSource, where: str) -> Iterator[tuple[str, DataTable]]:
    if source.kind == "hub":
        yield where, open_hub(source, where)
    elif source.kind == "saved":
        yield where, open_saved(source, where)
    else:
        for path in source.files:
            place = f"{where}, {path.name}" if source.kind == "folder" else where
            yield place, open_table(path, place)


def _check_use(form: Form, workload: Workload) -> None:
    """Raises `UsageError` for what a workload asks of records that have it not."""
    if not form.has_prompt and workload.loss == "answer":
        raise UsageError(
            f"workload: loss = 'answer': {form.title} has no answer to tell from a prompt. Use loss = \"all\"."
        )
    if not form.has_prompt and workload.natural_tokens:
        raise UsageError(
            f"workload: natural_tokens = {workload.natural_tokens}: {form.title} has no prompts that a model could "
            "answer. Use natural_tokens = 0."
        )
    if "instruction" not in form.columns and workload.prompt_format != "answer-instruction":
        raise UsageError(
            f"workload: prompt_format = {workload.prompt_format!r}: it is for instructions with responses, and the "
            f"data has {form.title}. Leave it out."
        )
    if form.is_chat and has_chat_template(catalogue.resolve(workload.model)) is False:
        raise no_chat_template(workload.model)


def _most_characters(source: DataSource) -> int:
    """Of all records of a source; a few bytes can say one text a million times. Nothing is known of the hub's."""
    if not source.files:
        return TEXT_CHARACTERS
    return min(TEXT_CHARACTERS, most_unpacked(sum(path.stat().st_size for path in source.files)))


def _characters(record: AnyRecord) -> int:
    if isinstance(record, Conversation):
        return sum(len(message.content) for message in record.messages)
    return sum(map(len, record.values()))


def _empty(workload: Workload) -> UsageError:
    return UsageError(f"data {workload.data!r}: no records are in it. Known are records of {SAID}.")
