"""Renders blocks as GitHub Markdown: tables as tables, collapsed blocks as `details`.

Text from outside is escaped: it cannot start markup, a link, a mention or mathematics. GitHub accepts 1 MiB for the
summary of a step and 65,536 characters for a comment, and shows nothing of a longer text. So a report that does not fit
loses its details, then its end, with a note.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator, Sequence

from lorameter.errors import shorten
from lorameter.report.blocks import Block, ChartGroup, Collapsible, Document, Line, Panel, Section, Table
from lorameter.report.terminal import render_text
from lorameter.terminal import escape_control_chars

SUMMARY_BYTES = 2**20
"""Limit of a step's summary."""
COMMENT_CHARACTERS = 65_536
"""Limit of a comment, and of the body of an issue."""
_CHART_WIDTH = 80
_SUMMARY = 120
"""Maximum characters of a summary; the full text follows below it."""
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$!])")
_LIST = re.compile(r"^(\d*)([.)+-])(?=\s|$)|^()([-=]+)$")
_ADDRESS = re.compile(r"\b(https?|ftp)(:)//|\b(www)(\.)", re.IGNORECASE)
_CUT = "\nThe rest is left out, as this would be too long.\n"
_BREAK = "<!-- -->"
"""An invisible comment that splits text which would become a mention or a link."""


def to_markdown(document: Document, *, max_characters: int = COMMENT_CHARACTERS) -> str:
    """Render a document in at most `max_characters` characters, and at most four times as many bytes."""
    text = _text(document)
    if len(text) > max_characters:
        text = _text([block for block in document if not isinstance(block, (Collapsible, ChartGroup, Panel))]) + _CUT
    if len(text) > max_characters:
        beginning = text[: max_characters - len(_CUT)]
        text = beginning[: beginning.rfind("\n") + 1] + _CUT
    return text


def escape_markdown(text: str) -> str:
    """Escape outside text, on one line, so that it starts no markup."""
    text = _MARKUP.sub(r"\\\1", escape_control_chars(" ".join(text.split())).replace("&", "&amp;"))
    text = _LIST.sub(lambda found: f"{found[1] or ''}\\{found[2] or found[4]}", text)
    text = _ADDRESS.sub(lambda found: f"{found[1] or found[3]}{_BREAK}{found[0][len(found[1] or found[3]) :]}", text)
    return text.replace("@", f"@{_BREAK}")


def _text(document: Sequence[Block]) -> str:
    first = next((block for block in document if isinstance(block, Section)), None)
    parts = [part for block in document for part in _block(block, "###" if block is first else "####")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block, level: str) -> Iterator[str]:
    if isinstance(block, Line):
        yield _line(block)
    elif isinstance(block, Section):
        yield f"{level} {escape_markdown(block.title)}"
        yield _bullets(block.lines)
    elif isinstance(block, Collapsible):
        yield _details(block.summary.text, _bullets(block.lines))
    elif isinstance(block, Table):
        yield f"#### {escape_markdown(block.title)}" if block.title else ""
        yield _table(block)
        yield _bullets(block.notes)
    elif isinstance(block, ChartGroup):
        drawn = render_text((dataclasses.replace(block, title=""),), width=_CHART_WIDTH, coloured=False)
        yield _details(block.title, _fenced(drawn.strip("\n")))
    else:
        passages = [
            f"**{escape_markdown(author)}**\n\n{_fenced(escape_control_chars(text))}" for author, text in block.passages
        ]
        yield _details(block.title, "\n\n".join(passages))


def _line(line: Line) -> str:
    return (f"**{escape_markdown(line.label)}** " if line.label else "") + escape_markdown(line.text)


def _bullets(lines: Sequence[Line]) -> str:
    return "\n".join(f"- {_line(line)}" for line in lines if line.text or line.label)


def _table(table: Table) -> str:
    rows = [
        [escape_markdown(head.text) for head in table.heads],
        ["---:" if head.right else "---" for head in table.heads],
    ]
    rows += [
        [f"**{text}**" if row.strong and text else text for text in (escape_markdown(cell.words) for cell in row.cells)]
        for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _details(summary: str, body: str) -> str:
    """A `details` element; its summary is HTML, without Markdown."""
    text = html.escape(shorten(escape_control_chars(" ".join(summary.split())), _SUMMARY), quote=False)
    return f"<details><summary>{text.replace('@', f'@{_BREAK}')}</summary>\n\n{body}\n\n</details>"


def _fenced(text: str) -> str:
    """The unchanged text, in a fence longer than any fence inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
