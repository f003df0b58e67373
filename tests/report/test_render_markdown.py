"""Tests of Markdown as GitHub renders it: tables stay tables, foreign text stays text, and size limits hold."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lorameter.report.blocks import (
    Axis,
    Cell,
    Chart,
    ChartGroup,
    Collapsible,
    ColumnHeader,
    Curve,
    Panel,
    Point,
    Section,
    Table,
    to_line,
    write_row,
)
from lorameter.report.render_markdown import COMMENT_CHARACTERS, escape_markdown, to_markdown

HOSTILE = (
    "a|b *c* _d_ `e` <img src=x onerror=1> [f](http://g.example) ![h](i) **j** ~~k~~ # l $m$ &amp; @octocat \\| "
    "https://evil.example www.evil.example </details> \x1b[31m\u202e"
)
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def kinds(text):
    """Yield the type of every token, including those within a line."""
    for token in READER.parse(text):
        yield token.type
        yield from (child.type for child in token.children or ())


def visible_text(text):
    """Return the visible text and code."""
    return "".join(
        child.content
        for token in READER.parse(text)
        for child in token.children or ()
        if child.type in ("text", "code_inline")
    )


def everywhere(text):
    """Return a document with the text in every field."""
    heads = (ColumnHeader(text=text), ColumnHeader(text="b", right=True))
    curve = Curve(name=text, points=tuple(Point(x=place, y=place) for place in (1.0, 2.0, 3.0)))
    return (
        Section(title=text, lines=(to_line(text, label=text),)),
        to_line(text),
        Table(title=text, heads=heads, rows=(write_row(text, Cell(name=text, verdict=text)),), notes=(to_line(text),)),
        Collapsible(summary=to_line(text), lines=(to_line(text),)),
        ChartGroup(title=text, charts=(Chart(across=Axis(title=text), up=Axis(title=text), curves=(curve,)),)),
        Panel(title=text, passages=((text, f"{text}\n```\n{text}"),)),
    )


def test_foreign_text_creates_no_markup():
    """Foreign text in any field creates no link, picture, code, emphasis, tag or mention, and is displayed as
    written."""
    text = to_markdown(everywhere(HOSTILE))
    found = set(kinds(text))
    assert not found & {"link_open", "image", "em_open", "code_inline", "s_open"}
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.M | re.S)  # fenced blocks are code
    assert "\\<img" in outside
    assert "&lt;img" in outside  # the summary of a collapsed block is HTML
    assert "<img" not in outside.replace("\\<img", "")
    assert "@octocat" not in outside
    assert outside.count("<details>") == outside.replace("\\</details", "").count("</details>") == 3
    assert "\x1b" not in text
    assert "\u202e" not in text


TEXTS = (
    "a|b", "*a*", "_a_", "`a`", "<b>", "[a](b)", "# a", "1. a", "- a", "+ a", "===", "a@b", "https://a.example/b",
    "&lt;", "$a$", "~~a~~", "\\|", "| a |", "---", "1.5 ms",
)  # fmt: skip


def test_an_escaped_text_is_read_as_itself():
    """A parser of GitHub's Markdown reads the text on its own line and in a table."""
    for text in TEXTS:
        assert visible_text(escape_markdown(text)) == text
        found = [kind for kind in kinds(escape_markdown(text)) if kind not in ("text", "html_inline")]
        assert found == ["paragraph_open", "inline", "paragraph_close"], text
        table = f"| a | b |\n| --- | --- |\n| {escape_markdown(text)} | x |"
        assert list(kinds(table)).count("td_open") == 2, text
        assert text in visible_text(table)


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp", "Cf", "Cs")), min_size=1))
def test_any_escaped_text_is_one_paragraph(text):
    """No character of an escaped text is markup."""
    shown = set(kinds(f"x {escape_markdown(text)}"))
    assert shown <= {"paragraph_open", "inline", "paragraph_close", "text", "html_inline", "text_special"}


def test_every_report_is_markdown(every_report):
    """Each table has all rows, each row has all cells, and every details element is closed."""
    for name, document in every_report.items():
        text = to_markdown(document)
        tables = [block for block in document if isinstance(block, Table) and block.heads]
        assert list(kinds(text)).count("table_open") == len(tables), name
        cells = sum(len(table.heads) * (1 + len(table.rows)) for table in tables)
        found = list(kinds(text))
        assert found.count("td_open") + found.count("th_open") == cells, name
        assert text.count("<details>") == text.count("</details>"), name


@pytest.mark.parametrize("max_characters", [2_000, COMMENT_CHARACTERS])
def test_a_long_report_drops_details_and_then_rows_with_a_notice(max_characters):
    """A long report drops details first and then whole rows at its end; the first section and the first rows always
    stay."""
    rows = tuple(write_row(f"variant-{place}", "x" * 40) for place in range(3_000))
    long = Collapsible(summary=to_line("statistics"), lines=tuple(to_line("y" * 100) for _ in range(3_000)))
    table = Table(title="Training", heads=(ColumnHeader(text="variant"), ColumnHeader(text="b")), rows=rows)
    text = to_markdown((Section(title="Gate failed"), table, long), max_characters=max_characters)
    assert len(text) <= max_characters
    assert text.startswith("### Gate failed\n")
    assert "variant-0 " in text
    assert text.endswith("The rest is left out, as this would be too long.\n")
    assert "yyy" not in text
    assert [line.count("|") for line in text.splitlines() if "variant-" in line][-1] == 3
