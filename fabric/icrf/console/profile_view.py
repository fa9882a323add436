"""Where the time of a run's rounds went, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.console.terminal import Terminal
from icrf.profiling import profile_table
from icrf.protocol import RoundResult


def show_profile(terminal: Terminal, rounds: Sequence[RoundResult]) -> None:
    """A row per host, then shares and the median round; nothing for a run without a profile."""
    table = profile_table(rounds)
    if table is None:
        return
    terminal.line()
    terminal.table(table.columns, table.rows, right=table.columns[1:])
    if table.left_out:
        terminal.line(f"and {table.left_out} more hosts in profile.jsonl")
