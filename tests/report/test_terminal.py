"""Tests of the terminal renderer: it prints what the document says, whatever the text contains.

Tests that foreign text has no effect on a terminal and that its credentials are never repeated, in every command and
rendering.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from lorameter.cli import main
from lorameter.errors import InvalidRunError, UsageError, redact
from lorameter.records import codec
from lorameter.records.record import Notice
from lorameter.records.store import read_manifest
from lorameter.report.blocks import (
    Cell,
    Collapsible,
    ColumnHeader,
    Line,
    Panel,
    Row,
    Section,
    Span,
    Table,
    to_line,
    write_row,
)
from lorameter.report.terminal import render_text, show
from lorameter.run.workers import sides
from lorameter.terminal import escape_control_chars

HOSTILE = "a [/b] [red]c :smile: \x1b]0;title\x07\x9b2J \udc80 end"
ESCAPED = "a [/b] [red]c :smile: \\x1b]0;title\\x07\\x9b2J \\udc80 end"
STYLED = re.compile(r"\x1b\[[0-9;]*m")


def hostile_document():
    """Return a document with the same text in every field that takes text."""
    cell = Cell(name=HOSTILE, text=HOSTILE, interval=HOSTILE, detail=HOSTILE, command=HOSTILE, verdict=HOSTILE)
    heads = (ColumnHeader(text=HOSTILE), ColumnHeader(text=HOSTILE, right=True))
    rows = (Row(cells=(cell, Cell(text=HOSTILE)), strong=True), write_row(HOSTILE, cell))
    lines = (to_line(HOSTILE, Span(text=HOSTILE, tone="alarm")),)
    return (
        Line(spans=(Span(text=HOSTILE),), indented=False),
        Section(title=HOSTILE, lines=lines, tone="bad"),
        Table(title=HOSTILE, heads=heads, rows=rows, notes=lines),
        Collapsible(summary=to_line("a line"), lines=lines),
        Panel(title=HOSTILE, passages=((HOSTILE, HOSTILE),)),
    )


@pytest.mark.parametrize("coloured", [False, True])
def test_foreign_text_is_printed_literally(coloured):
    """Text in any field is not interpreted as markup, an emoji or an escape sequence."""
    document = hostile_document()
    text = render_text(document, width=4000, coloured=coloured, verbose=True)
    assert ("\x1b" in text) is coloured
    plain = STYLED.sub("", text)
    assert not [one for one in plain if one != "\n" and not one.isprintable()]
    unfolded = repr([block for block in document if not isinstance(block, Collapsible)])
    assert plain.count(ESCAPED) == unfolded.count(repr(HOSTILE)[1:-1]) + 2  # the two spans of the collapsed line


def test_a_collapsed_block_is_its_summary_and_verbose_expands_it():
    """A collapsed block shows its summary and the number of lines that --verbose adds; a line below the report repeats
    it."""
    fold = Collapsible(summary=to_line("noise  ", "one two three four five six"), lines=(to_line("all of it"),))
    hint = "--verbose shows full notices and statistics.\n"
    assert render_text((fold,), width=60, coloured=False) == f"  noise  one two three four five six\n{hint}"
    assert render_text((fold,), width=24, coloured=False).splitlines()[:2] == [
        "  noise  one two three",
        "  four five six",
    ]
    assert render_text((fold,), width=24, coloured=False, verbose=True) == "  all of it\n"
    several = Collapsible(summary=to_line("noise"), lines=(to_line("one"), to_line("two")))
    assert render_text((several,), width=60, coloured=False) == f"  noise (2 lines with --verbose)\n{hint}"


@pytest.mark.parametrize("verbose", [False, True])
def test_every_report_fits_80_columns_and_keeps_a_number_with_its_unit(every_report, verbose):
    """No line breaks inside an interval or between a number and its unit, in tables and in sentences."""
    for name, document in every_report.items():
        for line in render_text(document, width=80, coloured=False, verbose=verbose).splitlines():
            assert cell_len(line) <= 80, name
            assert not re.search(r"\[-?[\d.]+,$", line.rstrip()), (name, line)
            assert not re.match(r"\s*(%|[mµ]?s\b|[KMG]iB)", line), (name, line)


def test_a_terminal_without_colour_shows_the_same_words(every_report, monkeypatch):
    """NO_COLOR removes the colours but no word; every finding has its own word."""
    coloured = render_text(every_report["run"], width=120, coloured=True)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = render_text(every_report["run"], width=120, coloured=True)
    assert re.search(r"\x1b\[[\d;]*3[0-8]", coloured)
    assert not re.search(r"\x1b\[[\d;]*3[0-8]", plain)
    assert STYLED.sub("", plain) == STYLED.sub("", coloured)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
SECRET = "hunter2"
URLS = (
    f"https://user:{SECRET}@example.org/peft-1.0-py3-none-any.whl",
    f"git+https://{SECRET}@example.org/peft.git",
    f"git+ssh://git:{SECRET}@example.org/peft.git@v1",
    f"https://user:p@{SECRET}@example.org/peft.whl",
    f"https://example.org/peft.whl?sig={SECRET}&t=1",
    f"http://{SECRET}:{SECRET}@proxy:3128",
    f"https://user:p'{SECRET}@example.org/peft.whl",
    f"https://example.org/peft.whl?a='&sig='{SECRET}",
    f"https://user:p#{SECRET}@example.org/peft.whl",
    f"https://user:p/{SECRET}@example.org/peft.whl",
    f"//user:{SECRET}@example.org/peft.whl",
    f"user:{SECRET}@example.org:peft.git",
    f"https:user:{SECRET}@example.org/peft.whl",
)


def has_control_chars(text: str) -> bool:
    return escape_control_chars(text) != text


@pytest.mark.parametrize("url", URLS)
def test_a_credential_in_an_address_is_left_out(url):
    """Users, passwords, tokens and queries are removed; host and path stay, so that the address is recognisable."""
    assert SECRET not in redact(f"could not reach {url}: refused")
    assert redact(url).split("@")[-1].split("?")[0] == url.split("@")[-1].split("?")[0] or "ssh" in url
    for kind in (UsageError, InvalidRunError):
        assert SECRET not in str(kind(f"side {url!r}: no"))


def test_text_without_a_credential_is_unchanged():
    """A requirement, a decorated name, an address without a user, a revision after a path, a digest and a document are
    unchanged."""
    for text in (
        "peft==0.20.0 torch>=2", "a@b.c", "https://example.org/x#egg=peft", "peft @ file:///tmp/peft.whl",
        "peft @ git+https://example.org/peft.git@v1", "https://example.org:8443/peft.git@v1", "http://[::1]:80/x@y",
        "image:tag@sha256:ab", '{"a":"b@c"}', "said at 12:30 @ noon: a @ b",
    ):  # fmt: skip
        assert redact(text) == text


@pytest.mark.parametrize(
    "line",
    [
        ["report", "--sort", URLS[0], "x"],
        ["run", "lora-or-qlora", f"--nope={URLS[0]}"],
        ["run", "lora-or-qlora", f"--replicates={URLS[1]}"],
        ["list", URLS[0]],
        [URLS[0]],
    ],
)
def test_the_parser_repeats_no_credential_in_its_errors(line, capsys):
    """The parser refuses unknown options, values out of range and unknown commands without repeating a credential."""
    with pytest.raises(SystemExit):
        main(line)
    errors = capsys.readouterr().err
    assert (
        "example.org" in errors or "unknown option --nope." in errors
    )  # the value of an unknown option is not repeated
    assert SECRET not in errors


@pytest.mark.parametrize("url", URLS[:1])
def test_a_side_holds_no_credential(url, write_run, capsys):
    """Neither the manifest nor its renderings (text, document, Markdown, annotations) hold a credential."""
    side = sides.name_side(f"peft @ {url}", Path()).to_json()
    assert SECRET not in str(side)
    path = write_run("ab", {"plain": [1.0] * 5, "nf4": [1.0] * 5})
    manifest = read_manifest(path)
    described = side | {"worker": "1", "facts": {"packages": {}}}
    document = codec.to_json(manifest) | {"sides": {"base": described, "candidate": described}}
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", str(path)]) in (0, 4, 5)
    for form in (["--json"], ["--markdown"], ["--format", "github"], ["--html", str(path / "page.html")]):
        assert main(["report", str(path), *form]) in (0, 4, 5)
    assert SECRET not in (path / "page.html").read_text()
    assert SECRET not in "".join(capsys.readouterr()) + (path / "manifest.json").read_text()


def test_pip_gets_a_credential_that_nothing_prints(tmp_path, monkeypatch, capsys):
    """pip reads the full address from a file that only its owner can read; its command line, which every user can see,
    its progress and its errors hold no credential."""
    requirement = f"peft@ {URLS[0]}"
    seen: list[list[str]] = []
    read: list[tuple[str, int]] = []

    def run(command, requirements, report):
        seen.append(list(command))
        report(f"Collecting {requirement}")
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        else:
            listed = Path(command[command.index("--requirement") + 1])
            read.append((listed.read_text(), listed.stat().st_mode & 0o777))
            raise UsageError(f"ab: an environment with {requirement} could not be made")

    monkeypatch.setattr("lorameter.run.workers.environment._run", run)
    monkeypatch.setattr("lorameter.run.workers.environment.site_packages", lambda python: tmp_path)
    with (
        pytest.raises(UsageError) as caught,
        sides.open_side(sides.name_side(f"peft @ {URLS[0]}", tmp_path), repository=tmp_path, cache=tmp_path / "cache"),
    ):
        pass
    ((text, mode),) = read
    assert text.endswith(f"@ {URLS[0]}\n")
    assert mode == 0o600
    assert len(seen) == 2
    assert SECRET not in str(seen)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    shown = "".join(capsys.readouterr())
    assert "example.org" in shown
    assert SECRET not in shown + str(caught.value)


# --- terminals --------------------------------------------------------------------------------------------------------


def hostile_run(write_run, *, sides_too=False):
    """Write a run with an escape sequence in every foreign text."""
    path = write_run(
        "hostile",
        {"plain": [1.0] * 5, "nf4": [1.1] * 5},
        change=lambda record: record.replaced(
            notices=(Notice(code=f"n{ESCAPE}", message=f"m{ESCAPE}", remedy=f"r{ESCAPE}"),),
            log=f"logs/{ESCAPE}",
        ),
    )
    document = codec.to_json(read_manifest(path))
    document["study"] |= {"title": f"a [/b] c {ESCAPE}", "notes": [f"note {ESCAPE}"]}
    document |= {"run": f"hostile{ESCAPE}", "stopped": f"why {ESCAPE}", "why": ESCAPE}
    document["provenance"] |= {"device_name": f"GPU [/x] {ESCAPE}"}
    document["tokens"] = {"data": f"file{ESCAPE}.jsonl"}
    if sides_too:
        side = {"label": f"[/b]{ESCAPE}", "worker": ESCAPE, "facts": {"packages": {f"p{ESCAPE}": "1"}}}
        document["sides"] = {"base": side, "candidate": side | {"facts": {"packages": {}}}}
    (path / "manifest.json").write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "line",
    ["report {} --verbose", "report {} --format github", "gate {} {}", "gate {} {} --format github", "list runs"],
)
def test_no_command_prints_control_characters(line, write_run, capsys):
    """Titles, notices, notes and names of runs, devices and files are escaped, on standard output and on standard
    error."""
    path = hostile_run(write_run)
    words = [word.replace("{}", str(path)) for word in line.split()]
    assert main([*words, "--runs-dir", str(path.parent)]) in (0, 1, 2, 3, 4, 5)
    out, errors = capsys.readouterr()
    assert not has_control_chars(out)
    assert not has_control_chars(errors)


@pytest.mark.parametrize(
    "line",
    [["report", ESCAPE], [ESCAPE], ["run", f"--{ESCAPE}"], ["run", ESCAPE], ["list", ESCAPE], ["report", "x", ESCAPE],
     ["run", "lora-or-qlora", "--model", ESCAPE], ["model", "fetch", ESCAPE],
     ["run", "x", "--runs-dir", f"/dev/null/{ESCAPE}"]],
)  # fmt: skip
def test_no_error_message_prints_control_characters(line, capsys, tmp_path, monkeypatch):
    """lorameter's and argparse's errors, which repeat arguments, are escaped, since scripts pass names of files."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main(line)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    errors = capsys.readouterr().err
    assert errors
    assert not has_control_chars(errors)


def test_an_unexpected_error_is_escaped(monkeypatch, capsys):
    """The traceback of an unexpected error is escaped."""

    def broken(*_, **__):
        raise RuntimeError(f"constructed {ESCAPE} {URLS[0]}")

    monkeypatch.setattr("lorameter.records.store.list_runs", broken)
    assert main(["list", "runs"]) == 70
    shown = capsys.readouterr().err
    assert "constructed" in shown
    assert not has_control_chars(shown)
    assert SECRET not in shown


@pytest.mark.parametrize(("verbose", "named"), [(None, False), (False, True), (True, False)])
def test_only_a_command_with_the_option_verbose_names_it(verbose, named):
    """Without the option, collapsed blocks stay collapsed, and no footer names what the command refuses."""
    console = Console(file=io.StringIO(), width=80)
    show((Collapsible(summary=to_line("statistics"), lines=(to_line("all"),)),), console, verbose=verbose)
    assert ("--verbose" in console.file.getvalue()) == named
