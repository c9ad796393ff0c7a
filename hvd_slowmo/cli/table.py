"""Tables that the subcommands print."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_slowmo.errors import escape_controls


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines of columns that are as wide as they need to be; a cell's line ends and controls are escaped.

    Example:
        >>> print(table(("setting", "value"), [("tau", "12"), ("alpha", "1.0")]))
        setting  value
        -------  -----
        tau      12
        alpha    1.0
    """
    rows = [[escape_controls(cell).replace("\n", r"\n").replace("\t", r"\t") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
