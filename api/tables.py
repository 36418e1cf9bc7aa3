"""How the commands of `machineuse` show lists of things."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, folding: Collection[str]) -> None:
    """Print a table as wide as the terminal, or as wide as it is where a program reads it.

    Where a terminal has no room for it, the `folding` columns take several lines.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in folding)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # nothing in a name is markup
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
