"""Markdown from text that comes from anywhere: a device's name can make no heading, no table and no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def plain(text: object) -> str:
    r"""Return text as one line in which nothing is markup.

    >>> plain("GPU <b>\n# x")
    'GPU \\\\<b\\\\> \\\\# x'
    """
    return re.sub(r"([\\`*#<>\[\]|])", r"\\\1", " ".join(str(text).split()))


def table_lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table of text that is markup already.

    >>> table_lines(["L", "holds"], [[16, "yes"]])
    ['| L | holds |', '|---|---|', '| 16 | yes |']
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
